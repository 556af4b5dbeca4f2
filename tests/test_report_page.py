"""The report's figures, page and TensorBoard tab, from hand-made runs: six pictures, two questions about each."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.errors import UserError
from llava.eval import plots
from llava.eval.comparison import ObjectRow, compare
from llava.eval.diagnostics import Diagnostics
from llava.eval.evaluated import Group, Run, SetAnswers
from llava.eval.hparams import write_hparams
from llava.eval.page import write_page
from llava.eval.plots import changed, flips, labels, overlay, seen_square, shown_flips, threshold_curve, write_plots
from llava.eval.pope import Confusion

ROOT = Path(__file__).resolve().parent.parent
PICTURES = [f"COCO_val2014_{number:012}.jpg" for number in range(6)]
TRUTH = np.array([True, False] * 6)  # the dog is there, the cat is not
BASE = {"random": "yyyynyynyyyn", "adversarial": "yyyyyyynyyyn"}
TUNED = {
    "random": "ynyynnynynyn",  # fixes questions 2, 6 and 10
    "adversarial": "ynnyynynyyyn",  # fixes 2 and 6, breaks 3
}


def scored(said):
    return np.where([c == "y" for c in said], 0.7, 0.2) + np.linspace(0, 0.1, len(said))


def answered(name, said, scores=True):
    yes = np.array([c == "y" for c in said])
    return SetAnswers(
        name=name,
        labels_file=Path(f"coco_pope_{name}.json"),
        sha256=f"{'ab' * 31}{len(name):02}",
        ids=np.arange(1, 13),
        images=np.repeat(PICTURES, 2),
        questions=["Is there a dog in the image?", "Is there a cat in the image?"] * 6,
        truth=TRUTH,
        said=yes,
        scores=scored(said) if scores else None,
        texts=['Yes, <there> & "is" $1$.' if one else "No." for one in yes],
        unparsed=0,
    )


def made_run(name, said, folder, *, seed=None, settings=None, scores=True):
    card = {
        "command": f"python pope_eval.py --model-path '{name}' <&>",
        "working_directory": str(folder),
        "arguments": {"coco_path": "coco", "model_path": name},
        "git": {"commit": "c0ffee", "diff": "+x"},
        "versions": {"python": "3.11", "torch": "2"},
        "hardware": {"platform": "Linux", "cpus": 8, "gpus": ["L4", "L4"], "world_size": 2},
        "started": "2026-01-02T03:04:05+00:00",
        "wall_time_s": 61.2,
    }
    return Run(
        name=name,
        folder=folder / name,
        answers=folder / name / "pope",
        sets={one: answered(one, text, scores) for one, text in said.items()},
        dev={},
        model="llava",
        root="hub/llava",
        start="" if seed is None else "hub/llava",
        hadpo=seed is not None,
        settings={"prompt": "hadpo", "conv_mode": "llava_v1", **(settings or {})},
        seed=seed,
        card=card,
        training=None if seed is None else {**card, "data": {"pairs.json": {"sha256": "f00d"}}},
    )


@pytest.fixture
def folder(tmp_path):
    """A working directory with the pictures of all questions but the last."""
    (tmp_path / "coco/val2014").mkdir(parents=True)
    for number, name in enumerate(PICTURES[:-1]):
        Image.new("RGB", (40, 20), (40 * number, 90, 120)).save(tmp_path / "coco/val2014" / name)
    return tmp_path


def groups(folder, scores=True):
    base = made_run("base", BASE, folder, scores=scores)
    worse = {"random": "nnnnnnnnnnnn", "adversarial": "nnnnnnnnnnnn"}
    return [
        Group((base,), base.settings),
        Group(
            tuple(made_run(f"b0.1-seed{n}", TUNED, folder, seed=n, settings={"beta": 0.1}) for n in (0, 1)),
            {**base.settings, "beta": 0.1},
        ),
        Group(
            (made_run("b<0.5>", worse, folder, seed=0, settings={"beta": 0.5}, scores=scores),),
            {**base.settings, "beta": 0.5},
        ),
    ]


@pytest.fixture
def comparison(folder):
    return compare(groups(folder), None, times=200)


def diagnosed(grid=2, block=True):
    gap = np.where(TRUTH, 1.0, -1.0)
    base = gap.copy()
    base[[1, 2]] *= -1  # wrong: a no-question at 1, a yes-question at 2
    tuned = gap.copy()
    tuned[[2, 3]] *= -1  # wrong: 2 still, and 3, a no-question
    maps = np.arange(12 * grid * grid, dtype=np.float16).reshape(12, grid, grid)
    shares = np.linspace(0, 1, 36).reshape(12, 3)
    return Diagnostics(
        set_name="adversarial",
        ids=np.arange(1, 13),
        kl=np.array([0.0, *np.geomspace(1e-6, 1, 11)]),
        base_gap=base,
        tuned_gap=tuned,
        hidden_change=np.linspace(0, 1, 60).reshape(12, 5),
        depth_names=["embedding", "layer 1", "layer 2", "layer 3", "norm"],
        attention_base=shares,
        attention_tuned=shares / 2,
        attention_block=shares[:, :1] if block else None,
        maps_base=maps,
        maps_tuned=maps[::-1],
        map_block=maps if block else None,
        grid=grid,
        meta={"base": "base", "tuned": "b0.1", "image_aspect_ratio": "pad"},
    )


def test_threshold_curve_by_hand():
    # Scores .9 .6 .6 .1 of labels yes yes no no: thresholds .9, .6, .1.
    x, y = threshold_curve(np.array([True, True, False, False]), np.array([0.9, 0.6, 0.6, 0.1]))
    assert x.tolist() == [0, 0.25, 0.75, 1]
    assert y.tolist() == [0.5, 0.75, 0.75, 0.5]


def test_outcomes_by_which_of_yes_and_no_is_likelier():
    held = {name: np.flatnonzero(chosen).tolist() for name, _, chosen in plots._Answered(diagnosed(), TRUTH).outcomes()}
    assert held == {"kept right": [0, *range(4, 12)], "fixed": [1], "broken": [3], "kept wrong": [2]}


def test_flips_and_their_counts(folder):
    base, tuned, _ = groups(folder)
    before, after = base.runs[0], tuned.runs[0]
    assert changed(before, after) == {"random": (3, 0, 12), "adversarial": (2, 1, 12)}
    found = flips(before, after, {"adversarial": diagnosed()})
    # Adversarial first; questions 2 and 6 of random are the same about the same pictures.
    where = [(f.set_name, f.question_id, f.fixed, f.label) for f in found]
    assert where == [
        ("adversarial", 2, True, "no"),
        ("adversarial", 6, True, "no"),
        ("random", 10, True, "no"),
        ("adversarial", 3, False, "yes"),
    ]
    assert (found[0].before[:3], found[0].after) == ("Yes", "No.")
    assert found[0].picture == folder / "coco/val2014" / PICTURES[0] and found[0].padded
    np.testing.assert_array_equal(found[1].map_base, [[20, 21], [22, 23]])
    np.testing.assert_array_equal(found[1].map_tuned, [[24, 25], [26, 27]])
    assert found[2].map_tuned is None  # no diagnostics of that set
    assert [f.question_id for f in flips(before, after, most=1)] == [2, 3]


def test_a_second_question_about_a_picture_waits(folder):
    wrong, right = made_run("wrong", {"random": "ny" * 6}, folder), made_run("right", {"random": "yn" * 6}, folder)
    assert [flip.question_id for flip in flips(wrong, right)] == [1, 3, 5, 7, 9, 11, 2, 4]
    assert changed(wrong, right) == {"random": (12, 0, 12)}


def test_pictures_that_are_not_there_are_told_once(folder, capsys):
    wrong, right = (
        made_run("wrong", {"random": "ny" * 6}, folder),
        made_run("right", {"random": "yn" * 6}, folder, seed=0),
    )
    held = compare([Group((wrong,), wrong.settings), Group((right,), right.settings)], None, times=20)
    shown = shown_flips(held, {})
    assert [flip.picture is None for flip in shown["right"]] == [False] * 5 + [True] + [False] * 2
    assert shown_flips(held, {}, quiet=True).keys() == {"right"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"note: 1 changed answers are shown without their picture: {PICTURES[5]} is not in coco"


def test_what_the_model_saw_of_a_picture():
    wide = Image.new("RGB", (40, 20), "white")
    wide.paste("red", (10, 0, 30, 20))
    padded, cropped = seen_square(wide, True), seen_square(wide, False)
    assert padded.size == (40, 40) and padded.getpixel((20, 9)) == (122, 116, 104)
    assert padded.getpixel((20, 10)) == (255, 0, 0) and padded.getpixel((0, 10)) == (255, 255, 255)
    assert cropped.size == (20, 20) and cropped.getcolors() == [(400, (255, 0, 0))]


def test_overlay_colours_where_the_map_is_strong():
    grey = Image.new("RGB", (20, 20), (128, 128, 128))
    drawn = np.asarray(overlay(grey, np.array([[1.0, 0.0], [0.0, -1.0]]), False, 64, signed=True)).astype(int)
    assert np.ptp(drawn[-1, 0]) <= 20  # nothing there: the grey of the picture
    assert drawn[0, 0, 0] > drawn[0, 0, 2] + 100  # orange
    assert drawn[-1, -1, 2] > drawn[-1, -1, 0] + 100  # blue
    plain = np.asarray(overlay(grey, np.array([[3.0, 1.0], [1.0, 1.0]]), False, 64)).astype(int)
    assert plain[0, 0, 0] > plain[0, 0, 2] + 100 and (plain[..., 0] >= plain[..., 2]).all()


def test_labels_are_settings_or_names(comparison, folder):
    assert comparison.columns == ["beta"]
    assert labels(comparison) == ["base", "beta 0.1", "beta 0.5"]
    many = [
        made_run(f"sweep-with-a-rather-long-name/run{n}-seed{s}", TUNED, folder, seed=s) for n in (1, 2) for s in (0, 1)
    ]
    apart = [Group(tuple(many[i : i + 2]), {**many[0].settings, "a": i, "b": i, "c": i}) for i in (0, 2)]
    assert labels(compare(apart, None, times=20)) == [
        "sweep-with-a-ra…r-long-name/run1",
        "sweep-with-a-ra…r-long-name/run2",
    ]


def test_every_figure_as_png_and_pdf(comparison, tmp_path):
    import matplotlib

    before = {name: matplotlib.rcParams[name] for name in plots.STYLE}
    runs = [run for group in comparison.groups for run in group.runs]
    drawn = write_plots(tmp_path / "plots", comparison, runs, {"b0.1-seed0": {"adversarial": diagnosed()}})
    assert [(plot.section, plot.png.stem) for plot in drawn] == [
        ("results", "accuracy"),
        ("results", "difference"),
        ("reluctance", "precision_recall"),
        ("reluctance", "yes_ratio"),
        *(("diagnostics", f"{name}-b0.1-seed0") for name in ("kl", "gap", "depth")),
        ("flips", "flips-b0.1-seed0"),
    ]
    for plot in drawn:
        with Image.open(plot.png) as picture:
            assert picture.size[0] in (525, 1050) and len(picture.convert("L").getcolors()) > 10
        pdf = plot.pdf.read_bytes()
        assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf
        assert b"/Type3" not in pdf and b"/FontFile2" in pdf  # TrueType, in the file
    assert {name: matplotlib.rcParams[name] for name in plots.STYLE} == before
    (tmp_path / "plots/own.png").touch()
    plots.remove_others(tmp_path / "plots", drawn[:4])
    left = {file.name for file in (tmp_path / "plots").iterdir()}
    assert left == {"own.png", *(file.name for plot in drawn[:4] for file in (plot.png, plot.pdf))}


def test_no_curves_without_scores(folder):
    held = compare(groups(folder, scores=False)[::2], None, times=20)
    assert plots._precision_recall(held) is None
    caption, figure = plots._yes_ratio(held)
    assert "Without scores of the baseline" in caption and len(figure.axes) == 2


def test_without_matplotlib_one_note_and_no_figures(comparison, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_plots(tmp_path / "plots", comparison, [], {}) == []
    assert capsys.readouterr().err.count("note: no figures: ") == 1 and not (tmp_path / "plots").exists()


class Reader(HTMLParser):
    """Tags with their attributes, cells by row, and whether every tag that opens is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.text, self.open = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


RESULTS = """| Model | Set | HA-DPO | Accuracy | Δ Accuracy |
|---|---|---|---|---|
| a \\| <b> | random | ✗ | 58.33 | - |
| a \\| <b> | mean | ✗ | **60.00** | - |
| c_d | random | ✓ | 83.33 ± 0.31 | +25.00 [-8.33, +41.67] |

- Δ is <the> difference.
"""


@pytest.fixture
def page(comparison, tmp_path):
    def write(**changes):
        known = {"b0.1-seed0": {"adversarial": diagnosed()}}
        given = {
            "plots": [],
            "results": RESULTS,
            "flips": shown_flips(comparison, known, quiet=True),
            "objects": {"b<0.5>": [ObjectRow("c<at", 12, None, Confusion(0, 3, 9, 0))]},
            **changes,
        }
        write_page(tmp_path / "report.html", comparison, given.pop("plots"), **given)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def test_page_has_the_cells_of_the_table(page):
    html = page()
    read = Reader(html)
    assert read.rows[:4] == [
        ["Model", "Set", "HA-DPO", "Accuracy", "Δ Accuracy"],
        ["a | <b>", "random", "✗", "58.33", "-"],
        ["a | <b>", "mean", "✗", "60.00", "-"],
        ["c_d", "random", "✓", "83.33 ± 0.31", "+25.00 [-8.33, +41.67]"],
    ]
    assert '<td class="number"><strong>60.00</strong></td>' in html
    assert [attrs.get("class") for tag, attrs in read.tags if tag == "tr"][:4] == [None, None, None, "first"]
    assert ["c<at", "12", "–", "75.00", "–", "25.00", "–", "3"] in read.rows
    assert "<li>Δ is &lt;the&gt; difference.</li>" in html


def test_page_is_one_file_that_escapes_what_it_shows(page, tmp_path):
    Image.new("RGB", (1050, 10)).save(tmp_path / "a.png")
    html = page(plots=[plots.Plot("results", "A <b>", tmp_path / "a.png", tmp_path / "a.pdf", "is & was")])
    read = Reader(html)
    assert read.tags[0] == ("html", {"lang": "en"})
    assert not {"script", "iframe", "object"} & {tag for tag, _ in read.tags}
    sources = [attrs[key] for _, attrs in read.tags for key in ("src", "href") if key in attrs]
    assert sources and all(source.startswith("data:") for source in sources) and "url(" not in html
    assert all(attrs["alt"] for tag, attrs in read.tags if tag == "img")
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    for text in (
        'Yes, <there> & "is" $1$.',
        "python pope_eval.py --model-path 'b<0.5>' <&>",
        "2 × L4",
        "A <b>",
        "is & was",
    ):
        assert text in read.text
    assert "adversarial: 2 fixed and 1 broken of 12" in read.text
    assert "$" not in re.sub(r"\$1\$", "", read.text)


def test_page_leaves_out_what_there_is_nothing_for(page):
    full, bare = page(reluctance=RESULTS, development=RESULTS), page(flips={}, objects={})
    heads = re.compile("<h2>(.*?)</h2>")
    assert heads.findall(bare) == ["Results", "How it was made"]
    assert heads.findall(full) == [
        "Development set",
        "Results",
        "Better, or only more reluctant?",
        "Answers that changed",
        "Objects",
        "How it was made",
    ]


def events(folder):
    """By sub-folder: the tab's data by tag, and scalars, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for place in [folder, *sorted(folder.iterdir())]:
        if place.is_dir():
            assert len(list(place.glob("events.*"))) == 1
            held = EventAccumulator(str(place))
            held.Reload()
            tags = [tag for tag in held.Tags()["tensors"] if not tag.startswith("_hparams_")]
            scalars = {tag: held.Tensors(tag)[0].tensor_proto.float_val[0] for tag in tags}
            found[place.name] = held.PluginTagToContent("hparams"), scalars
    return found


def test_hparams_are_what_tensorboard_reads(comparison, tmp_path):
    from tensorboard.plugins.hparams import metadata

    folder = tmp_path / "tensorboard"
    write_hparams(folder, comparison)
    write_hparams(folder, comparison)  # in the place of the first: no event twice
    found = events(folder)
    assert sorted(found) == ["b0.1-seed0", "b0.1-seed1", "b_0.5_", "base", "tensorboard"]
    experiment = metadata.parse_experiment_plugin_data(found["tensorboard"][0][metadata.EXPERIMENT_TAG])
    assert [info.name for info in experiment.hparam_infos] == ["beta", "seed"]
    assert (
        experiment.hparam_infos[0].domain_interval.min_value,
        experiment.hparam_infos[0].domain_interval.max_value,
    ) == (0.1, 0.5)
    names = [
        f"{one}/{metric}" for one in ("random", "adversarial", "mean") for metric in ("accuracy", "f1", "yes_ratio")
    ]
    assert [info.name.tag for info in experiment.metric_infos] == names
    session = metadata.parse_session_start_info_plugin_data(found["b0.1-seed1"][0][metadata.SESSION_START_INFO_TAG])
    assert {name: value.number_value for name, value in session.hparams.items()} == {"beta": 0.1, "seed": 1}
    scalars = found["b0.1-seed1"][1]
    # TUNED is wrong in random at 4 and 5, in adversarial at 3, 4 and 10.
    assert scalars["random/accuracy"] == pytest.approx(10 / 12)
    assert scalars["adversarial/accuracy"] == pytest.approx(9 / 12)
    assert scalars["mean/accuracy"] == pytest.approx(9.5 / 12)
    assert found["base"][1]["random/yes_ratio"] == pytest.approx(9 / 12)
    base = metadata.parse_session_start_info_plugin_data(found["base"][0][metadata.SESSION_START_INFO_TAG])
    assert not base.hparams


def test_hparams_never_takes_the_place_of_other_files(comparison, tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/events.out.tfevents.1.host").write_bytes(b"a training's")
    with pytest.raises(UserError, match=r"holds events.out.tfevents.1.host, which no report wrote"):
        write_hparams(tmp_path / "tensorboard", comparison)


def test_torch_is_not_imported():
    code = (
        "import sys; import llava.eval.plots, llava.eval.page, llava.eval.hparams\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
