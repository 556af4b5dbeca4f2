"""Comparisons of runs, against tables worked by hand: four pictures, two questions about each."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava.errors import UserError
from llava.eval import results_table
from llava.eval.comparison import (
    _auroc_draws,
    by_object,
    compare,
    find_baseline,
    objects_of,
    on_dev,
    rank_on_dev,
    select_on_dev,
    worst,
)
from llava.eval.evaluated import Group, Run, SetAnswers
from llava.eval.pope import Confusion
from llava.eval.statistics import Bootstrap, holm, weighted_auroc

PICTURES = ("p0.jpg", "p1.jpg", "p2.jpg", "p3.jpg")
OBJECTS = ("dog", "cat")  # asked about in every picture; the dog is there, the cat is not
BASE = {"random": "yyyyynyn", "popular": "yyyyyyyn"}
TUNED = {0: {"random": "ynynynyn", "popular": "yyynynyn"}, 1: {"random": "yyynynyn", "popular": "nnynynyn"}}


def answers(name, said, scores=None, pictures=PICTURES, labels="labels.json"):
    """Two questions about each picture, the first to be answered yes, the second no."""
    said = np.array([c == "y" for c in said])
    return SetAnswers(
        name=name,
        labels_file=Path(labels),
        sha256=f"{labels} {name}",
        ids=np.arange(1, len(said) + 1),
        images=np.repeat(pictures, 2),
        questions=[f"Is there a {thing} in the image?" for _ in pictures for thing in OBJECTS],
        truth=np.array([True, False] * len(pictures)),
        said=said,
        scores=None if scores is None else np.array(scores, dtype=float),
        texts=["Yes" if yes else "No" for yes in said],
        unparsed=0,
    )


def run(name, sets, *, seed=None, root="hub/llava-7b", dev=None, settings=None, start=None, **changes):
    """A trained run where it has a seed."""
    trained = seed is not None
    made = Run(
        name=name,
        folder=Path("/runs") / name,
        answers=Path("/runs") / name / "pope",
        sets=sets,
        dev=dev or {},
        model=root.split("/")[-1],
        root=root,
        start=(start or root) if trained else "",
        hadpo=trained,
        settings={"prompt": "hadpo", "conv_mode": "llava_v1", **(settings or {})},
        seed=seed,
        card={},
        training={"status": "finished"} if trained else None,
    )
    return replace(made, **changes)


def group(*runs):
    return Group(runs, runs[0].settings)


def one(name, said, scores=None, **rest):
    """A group of one run on one set."""
    return group(run(name, {"random": answers("random", said, scores)}, **rest))


@pytest.fixture(scope="module")
def base():
    return group(run("base", {name: answers(name, said) for name, said in BASE.items()}))


@pytest.fixture(scope="module")
def tuned():
    seeds = (
        run(f"s{seed}", {n: answers(n, said) for n, said in sets.items()}, seed=seed) for seed, sets in TUNED.items()
    )
    return group(*seeds)


@pytest.fixture(scope="module")
def compared(base, tuned):
    return compare([tuned, base], None)


def cell(comparison, group, set_name, metric="accuracy", kind="run"):
    (row,) = (r for r in comparison.rows if (r.group, r.set_name, r.kind) == (group, set_name, kind))
    return row.cells[metric]


def test_values_and_deviations_over_seeds(compared, base, tuned):
    # random: 8 of 8 and 7 of 8 right; popular: 7 of 8 and 7 of 8; the base has 6 of 8 and 5 of 8.
    expected = {"random": (15 / 16, 0.125 / 2**0.5), "popular": (7 / 8, 0.0), "mean": (29 / 32, 0.0625 / 2**0.5)}
    for name, (value, deviation) in expected.items():
        found = cell(compared, tuned, name)
        assert (found.value, found.deviation) == pytest.approx((value, deviation))
    assert [cell(compared, base, name).value for name in expected] == [6 / 8, 5 / 8, 11 / 16]
    assert cell(compared, base, "random").deviation is None
    # Seed 1 on popular says 3 yes, all rightly, of 4; seed 0 says 5, of which 4 rightly.
    assert cell(compared, tuned, "popular", "precision").value == pytest.approx((4 / 5 + 1) / 2)
    assert cell(compared, tuned, "popular", "recall").value == pytest.approx((1 + 3 / 4) / 2)
    assert cell(compared, tuned, "popular", "yes_ratio").value == pytest.approx((5 / 8 + 3 / 8) / 2)


def test_differences_resample_pictures_and_all_sets_with_them(compared, tuned):
    # Questions gained, mean over seeds: random 0.5, 1, 0, 0 in the four pictures; popular 0, 1, 1, 0. Of the 4**4
    # resamples of random 16 gain nothing, 5 gain 3.5 or more and 19 gain 3 or more, of 8 questions.
    random, popular, mean = (cell(compared, tuned, name).difference for name in ("random", "popular", "mean"))
    assert random.value == pytest.approx(3 / 16) and (random.low, random.high) == pytest.approx((0, 3 / 8))
    assert random.p == pytest.approx(2 / 16, abs=0.02)
    assert popular.value == pytest.approx(2 / 8) and popular.p == pytest.approx(2 / 16, abs=0.02)
    # Together 0.5, 2, 1, 0 of 16: one resample gains nothing, 5 gain up to 0.5, 15 up to 1; 5 gain 7 or more, 9 6.5.
    assert mean.value == pytest.approx(7 / 32) and (mean.low, mean.high) == pytest.approx((1 / 16, 6.5 / 16))
    assert mean.p == pytest.approx(2 / 256, abs=0.004)


def test_holm_family_is_a_metric_over_all_rows_with_a_difference(compared, base, tuned):
    found = {name: cell(compared, tuned, name) for name in ("random", "popular", "mean")}
    raw = {name: held.difference.p for name, held in found.items()}
    assert found["mean"].p_holm == pytest.approx(3 * raw["mean"])
    assert found["random"].p_holm == pytest.approx(2 * min(raw["random"], raw["popular"]), rel=0.1)
    assert cell(compared, base, "mean").p_holm is None and cell(compared, base, "mean").difference is None
    # The other metrics are families of their own.
    recall = [cell(compared, tuned, name, "recall") for name in found]
    assert [held.p_holm for held in recall] == holm([held.difference.p for held in recall])
    assert any("corrected for 3 comparisons" in line for line in compared.notes)


def test_the_baseline_comes_first_and_rows_go_by_set(compared, base, tuned):
    assert compared.groups == [base, tuned] and compared.baseline is base
    assert compared.baseline_of(tuned) is base and compared.baseline_of(base) is base
    assert [(row.group, row.set_name) for row in compared.rows] == [
        (held, name) for held in (base, tuned) for name in ("random", "popular", "mean")
    ]


def test_bold_is_only_what_is_told_apart_from_every_other(base, tuned):
    compared = compare([base, tuned], base)
    assert cell(compared, tuned, "mean").best  # p 2/256
    assert not cell(compared, tuned, "random").best  # p 2/16, though it is the highest
    assert not any(row.cells["yes_ratio"].best for row in compared.rows)
    assert not any(row.cells["accuracy"].best for row in compared.rows if row.group is base)
    twin = group(*(replace(r, name=f"twin {r.seed}") for r in tuned.runs))
    assert not any(held.best for row in compare([base, tuned, twin], base).rows for held in row.cells.values())
    # A third group corrects for one more: 2/256 doubles, and is still told apart.
    assert cell(compare([base, tuned, group(replace(base.runs[0], name="again"))], base), tuned, "mean").best


def test_one_group_alone_is_neither_bold_nor_compared(tuned):
    alone = compare([tuned], None, times=50)
    assert alone.baseline is None and alone.baselines == [None]
    assert not any(held.best or held.difference for row in alone.rows for held in row.cells.values())


def test_seeds_that_all_are_the_baseline_differ_from_it_in_no_resample():
    said = "ynyyyynn"  # rounding: (x + x + x) / 3 is not x for all that a resample gives
    base = one("base", said)
    seeds = (run(f"s{seed}", {"random": answers("random", said)}, seed=seed) for seed in range(3))
    compared = compare([base, tuned := group(*seeds)], base, times=500)
    assert {held.difference for held in next(r for r in compared.rows if r.group is tuned).cells.values()} == {
        (0, 0, 0, 1)
    }


# Baselines


def test_each_root_has_its_own_untrained_run():
    small, large = one("7b", "ynynynyy"), one("13b", "ynynynyn", root="hub/llava-13b")
    tuned = [one("a", "ynynynyn", seed=0), one("b", "ynynynyn", seed=0, root="hub/llava-13b")]
    assert find_baseline([small, tuned[0]], None) is small
    assert find_baseline([small, large, *tuned], None) is None
    compared = compare([*tuned, large, small], None, times=50)
    assert compared.groups == [small, tuned[0], large, tuned[1]]
    assert compared.baselines == [small, small, large, large] and compared.baseline is None


def test_without_an_untrained_run_it_is_the_one_that_training_began_from():
    first = one("sft", "ynynynyy", seed=0)
    second = one("dpo", "ynynynyn", seed=0, start="/runs/sft")
    third = one("more", "ynynynyn", seed=0, start="/runs/dpo")
    assert find_baseline([third, second, first], None) is first
    stranger = one("other", "ynynynyn", seed=0, start="/runs/elsewhere")
    assert find_baseline([third, second, first, stranger], None) is None


def test_an_untrained_run_of_the_same_protocol_is_nearer():
    other = one("llava-prompt", "ynynynyy", settings={"prompt": "llava", "conv_mode": "vicuna_v1"})
    same = one("hadpo-prompt", "ynynynyy")
    assert find_baseline([other, one("tuned", "ynynynyn", seed=0), same], None) is None  # two untrained runs
    assert compare([other, tuned := one("tuned", "ynynynyn", seed=0), same], None, 50).baseline_of(tuned) is same


def test_a_baseline_is_named_by_name_folder_or_hub_id():
    base, tuned = one("base", "ynynynyy"), one("tuned", "ynynynyn", seed=0)
    for given in ("base", "/runs/base", "/runs/base/pope", "hub/llava-7b", "llava-7b"):
        assert find_baseline([tuned, base], given) is base
    assert find_baseline([tuned, base], "/runs/tuned") is tuned
    with pytest.raises(UserError, match=r"--baseline nobody: none of the runs read is called that.*: tuned, base"):
        find_baseline([tuned, base], "nobody")


def test_another_protocol_has_no_difference_and_is_never_bold():
    base = one("base", "yyyyyyyy")
    other = one("other", "ynynynyn", seed=0, settings={"prompt": "llava", "conv_mode": "vicuna_v1"})
    compared = compare([base, other], base, times=200)
    assert cell(compared, other, "random").difference is None and not cell(compared, other, "random").best
    assert any("another protocol (--prompt llava, vicuna_v1)" in line for line in compared.notes)
    assert cell(compare([base, one("same", "ynynynyn", seed=0)], base, 200), base, "random").best is False


# Questions that are not the same


def test_other_questions_are_refused_with_both_folders():
    base = one("base", "ynynynyn")
    other = group(
        run("o", {"random": answers("random", "ynynynyn", pictures=("q0", "q1", "q2", "q3"), labels="o.json")})
    )
    with pytest.raises(UserError, match=r"random: /runs/base/pope and /runs/o/pope .*different questions .*o\.json"):
        compare([base, other], None)
    fewer = group(run("few", {"random": answers("random", "ynynyn", pictures=PICTURES[:3])}))
    with pytest.raises(UserError, match="one lacks 2 of the 8 questions; fetch the missing pictures"):
        compare([base, fewer], None)


def test_a_group_without_one_of_the_sets_has_no_mean(base):
    part = group(run("part", {"random": answers("random", "ynynynyn")}, seed=0))
    compared = compare([base, part], base, times=50)
    assert [row.set_name for row in compared.rows if row.group is part] == ["random"]
    assert any(
        "part/pope) has no answers of: popular; so it has no mean and no verdict." in line for line in compared.notes
    )
    seeds = group(*base.runs, run("part", {"random": answers("random", "ynynynyn")}))
    with pytest.raises(UserError, match=r"part/pope and /runs/base/pope are seeds .* set popular"):
        compare([seeds], None)
    with pytest.raises(UserError, match="/runs/empty: holds no answers to POPE's test questions"):
        compare([group(run("empty", {}, seed=0))], None)


# Better, or only more reluctant


BASE_SCORES = [0.9, 0.8, 0.7, 0.6, 0.55, 0.3, 0.2, 0.1]  # above 0.5: yyyyynnn, 5 of 8 right
GOOD_SCORES = [0.95, 0.1, 0.9, 0.1, 0.85, 0.1, 0.8, 0.1]


@pytest.fixture(scope="module")
def reluctant():
    base = one("base", "yyyyynnn", BASE_SCORES)
    good = one("good", "ynynynyn", GOOD_SCORES, seed=0)
    moved = one("moved", "yyyynnnn", np.array(BASE_SCORES) - 0.06, seed=1)
    bad = one("bad", "nnnnyyyy", BASE_SCORES[::-1], seed=2)
    return compare([base, good, moved, bad], base, times=2000)


def of(comparison, name):
    (row,) = (row for row in comparison.at_ratio if row.group.runs[0].name == name)
    return row


def test_auroc_and_its_difference(reluctant):
    # Base: .9 beats 4 of the no-questions, .7 beats 3, .55 beats 2, .2 beats 1: 10 of 16.
    assert cell(reluctant, reluctant.groups[0], "random", "auroc").value == 10 / 16
    assert of(reluctant, "good").auroc.value == 1 and of(reluctant, "good").auroc.difference.value == 6 / 16
    assert of(reluctant, "moved").auroc.difference[:3] == (0, 0, 0)
    # The reverse scores: the yes-questions have .1, .3, .6, .8 against .2, .55, .7, .9: 0 + 1 + 2 + 3.
    assert of(reluctant, "bad").auroc.value == 6 / 16


def test_the_baseline_with_its_threshold_moved(reluctant):
    good = of(reluctant, "good")
    # At 4 yes of 8 the base says yes to the first four: 2 right, 2 wrong, 2 of the others right. In every picture one
    # of its two answers is right, so every resample has a difference of a half.
    assert good.control.value == 4 / 8
    assert good.control.difference[:3] == (0.5, 0.5, 0.5) and good.verdict == "better"
    assert good.control.p_holm == pytest.approx(3 * 2 / 2001)
    # At the base's 5 of 8: the four yes-questions, and a quarter of each of the four that tie.
    assert good.accuracy.value == pytest.approx(7 / 8) and good.accuracy.difference.value == pytest.approx(2 / 8)
    (control,) = (row for row in reluctant.rows if row.kind == "control" and row.group is good.group)
    values = {metric: held.value for metric, held in control.cells.items()}
    assert values == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    assert not any(held.best for held in control.cells.values())


def test_verdicts(reluctant):
    assert [of(reluctant, name).verdict for name in ("good", "moved", "bad")] == ["better", "same", "same"]
    # Fewer yes and as good as its baseline at that ratio: nothing gained.
    assert of(reluctant, "moved").control.difference == (0, 0, 0, 1)
    better = one("base", "ynynynyn", GOOD_SCORES)
    assert of(compare([better, one("t", "yyyynnnn", BASE_SCORES, seed=0)], better, 200), "t").verdict == "worse"
    lines = results_table.verdicts(reluctant)
    assert lines[0].startswith("good (HA-DPO): better than the baseline at the same yes ratio (+50.00 [+50.00, +50.00]")


def test_a_verdict_is_of_the_mean_where_there_are_several_sets():
    def scored(name, said, scores, **rest):
        return group(run(name, {s: answers(s, said, scores) for s in ("random", "popular")}, **rest))

    compared = compare(
        [scored("base", "yyyyynnn", BASE_SCORES), scored("good", "ynynynyn", GOOD_SCORES, seed=0)], None, times=200
    )
    assert [(row.set_name, row.verdict) for row in compared.at_ratio] == [
        ("random", None),
        ("popular", None),
        ("mean", "better"),
    ]


def test_without_scores_there_is_no_such_table(compared):
    assert compared.at_ratio == [] and results_table.ratio_markdown(compared) == ""
    assert all(row.kind == "run" and "auroc" not in row.cells for row in compared.rows)


def test_answers_that_their_score_denies_are_told():
    base = one("base", "nyyyynnn", BASE_SCORES)
    assert any("1 of 8 answers are not what their score says" in line for line in compare([base], None, 50).notes)


def test_resampled_auroc_is_that_of_the_questions_of_the_pictures_drawn():
    generator = np.random.default_rng(0)
    held = answers("random", "ynynynyn", generator.integers(0, 4, 8) / 4)
    bootstrap = Bootstrap(PICTURES, 200, 1)
    expected = weighted_auroc(held.truth, held.scores, np.repeat(bootstrap.weights, 2, axis=1))
    assert _auroc_draws([held, held], bootstrap) == pytest.approx(expected)


# Tables


def test_markdown(compared):
    lines = results_table.markdown(compared).splitlines()
    metrics = "Accuracy | Precision | Recall | F1 Score | Yes Ratio (%)"
    assert lines[0] == f"| Model | Set | HA-DPO | Seeds | {metrics} | Δ Accuracy | p (Holm) |"
    assert lines[2] == "| llava-7b | random | ✗ | 1 | 75.00 | 66.67 | 100.00 | 80.00 | 75.00 | - | - |"
    cells = [text.strip() for text in lines[7].strip("|").split("|")]
    assert cells[:5] == ["llava-7b", "mean", "✓", "2", "**90.62 ± 4.42**"]
    assert cells[-2].startswith("+21.88 [+6.25, +40.62]") and 0.01 < float(cells[-1]) < 0.05
    assert "- Values are means over seeds (0, 1), ± their sample deviation (n - 1)." in lines
    assert any(line.startswith("- Baseline: llava-7b (/runs/base)") for line in lines)


def test_settings_that_differ_are_columns_and_names_tell_the_rest_apart():
    base = one("base", "ynynynyy", settings={"beta": 7})
    tuned = [one(f"b{i}", "ynynynyn", seed=i, settings={"beta": beta}) for i, beta in enumerate((0.1, 1e-6))]
    compared = compare([base, *tuned], base, times=50)
    assert compared.columns == ["beta"] and compared.names == ["llava-7b"] * 3
    rows = [line.split(" | ") for line in results_table.markdown(compared).splitlines()[2:5]]
    assert [row[3] for row in rows] == ["-", "0.1", "1e-06"]  # how the model before was trained is no setting of these
    alike = compare([base, tuned[0], one("c", "ynynynyn", seed=3, settings={"beta": 0.1})], base, times=50)
    assert alike.names == ["llava-7b", "b0", "c"]


def test_pipes_are_escaped_in_markdown():
    assert "| a\\|b |" in results_table.markdown(compare([one("x", "ynynynyn", root="hub/a|b")], None, 50))


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("lora_r 50% & #1 ${x}", r"lora\_r 50\% \& \#1 \$\{x\}"),
        ("✓ ✗ ± Δ", r"\checkmark $\times$ $\pm$ $\Delta$"),
        ("a\\b~c^d", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"),
        ("+1.86 [+0.93, -2.79]", "$+1.86$ [$+0.93$, $-2.79$]"),
        ("1e-06 <0.001 v1.5-7b", "1e-06 $<$0.001 v1.5-7b"),
        ("[1, 2]", "{}[1, 2]"),
    ],
)
def test_latex_escapes(text, escaped):
    assert results_table.latex_text(text) == escaped


def test_latex_table(compared):
    text = results_table.latex(compared)
    lines = text.splitlines()
    assert lines[0] == "% \\usepackage{booktabs}" and lines[-1] == "\\end{tabular}"
    (begin,) = (line for line in lines if line.startswith("\\begin{tabular}"))
    assert begin == "\\begin{tabular}{llllrrrrrrr}"
    body = lines[lines.index("\\midrule") : lines.index("\\bottomrule")]
    assert {line.count("&") for line in body if line != "\\midrule"} == {10} and body.count("\\midrule") == 2
    assert "\\textbf{90.62 $\\pm$ 4.42}" in text and "$+21.88$ [$+6.25$, $+40.62$]" in text
    assert all(line.startswith("%") for line in lines[: lines.index(begin)])


def test_csv_has_a_column_a_number(reluctant):
    rows = list(csv.DictReader(io.StringIO(results_table.csv_text(reluctant))))
    assert [row["run"] for row in rows] == ["base", "good", "moved", "bad"]
    good = next(row for row in rows if row["run"] == "good")
    assert float(good["accuracy"]) == 100 and float(good["accuracy_difference"]) == 37.5
    assert float(good["auroc"]) == 100 and float(good["auroc_p"]) < 0.2 and good["accuracy_deviation"] == ""
    assert (good["control"], good["control_low"], good["at_baseline_ratio"]) == ("50.0", "50.0", "87.5")
    assert (
        rows[0]["control"] == rows[0]["accuracy_difference"] == ""
        and rows[0]["baseline"] == "base"
        and rows[0]["hadpo"] == "False"
    )


@pytest.mark.parametrize(("value", "text"), [(-0.000004, "+0.00"), (0.0186, "+1.86"), (-0.5, "-50.00")])
def test_signed_points(value, text):
    assert results_table._signed(value) == text


@pytest.mark.parametrize(("p", "text"), [(None, "-"), (0.0002, "<0.001"), (0.0005, "0.001"), (1.0, "1.000")])
def test_p_values(p, text):
    assert results_table.p_value(p) == text


def test_as_dict_is_plain_numbers(reluctant):
    held = json.loads(json.dumps(results_table.as_dict(reluctant)))
    assert [g["name"] for g in held["groups"]] == ["llava-7b", "good", "moved", "bad"]
    assert [g["baseline"] for g in held["groups"]] == [0, 0, 0, 0]
    assert held["at_ratio"][0]["control"]["difference"]["value"] == 0.5 and held["resamples"] == 2000


def test_a_bootstrap_too_small_for_the_correction_says_so(base, tuned):
    assert any("raise --bootstrap" in line for line in compare([base, tuned], base, times=50).notes)
    assert not any("raise --bootstrap" in line for line in compare([base, tuned], base, times=2000).notes)


# Objects


def test_objects(base, tuned):
    dog, cat = worst(objects_of(tuned, base))[::-1]
    # Two sets of four questions and two seeds; the base says yes to 4 dogs of 4 twice, and to 2 and 3 cats.
    assert (dog.object, dog.questions, dog.base, dog.tuned) == (
        "dog",
        8,
        Confusion(8, 0, 0, 0),
        Confusion(7.5, 0, 0, 0.5),
    )
    assert (cat.object, cat.questions, cat.base, cat.tuned) == ("cat", 8, Confusion(0, 5, 3, 0), Confusion(0, 1, 7, 0))
    assert [row.base for row in by_object(None, tuned.runs[0])] == [None, None]
    rows = list(csv.DictReader(io.StringIO(results_table.objects_csv([("s0", objects_of(tuned, base))]))))
    assert [(r["object"], r["base_false_yes"], r["tuned_accuracy"], r["tuned_yes_ratio"]) for r in rows] == [
        ("cat", "5", "87.5", "12.5"),
        ("dog", "0", "93.75", "93.75"),
    ]


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Is there an Orange in the image?", ["orange"]),
        ("Is there a traffic light in the imange?", ["traffic light"]),
        ("How many dogs are there?", []),
    ],
)
def test_objects_of_questions(question, found):
    held = replace(answers("random", "yn", pictures=PICTURES[:1]), questions=[question] * 2)
    assert [row.object for row in by_object(None, run("x", {"random": held}))] == found


# Selection


DEV_PICTURES = ("d0.jpg", "d1.jpg", "d2.jpg", "d3.jpg")


def on(dev, name, seed=0, **rest):
    held = {"random": answers("random", dev, pictures=DEV_PICTURES, labels="dev.json")}
    return run(name, {"random": answers("random", "ynynynyn")}, seed=seed, dev=held, **rest)


def test_the_best_on_the_development_set_is_chosen():
    base = one("base", "ynynynyn")
    seven, six, mixed = (
        group(on("ynynynyy", "seven")),
        group(on("ynynyyyy", "six")),
        group(on("ynynynyn", "m0"), on("ynyyyyyy", "m1", 1)),
    )
    ranked = rank_on_dev([base, six, mixed, seven])
    assert [held for held, _ in ranked] == [seven, mixed, six]
    assert [value for _, value in ranked] == [7 / 8, 13 / 16, 6 / 8]
    assert select_on_dev([six, seven, group(on("ynynynyy", "tie"))]) is seven
    # By recall all are alike, and the first is taken; seed 1 of none misses a dog.
    assert select_on_dev([six, seven], "recall") is six
    assert on_dev(seven).runs[0].sets["random"].labels_file == Path("dev.json")


def test_selection_is_refused_where_it_would_be_unfair():
    good = group(on("ynynynyy", "good"))
    with pytest.raises(UserError, match="/runs/none has no answers of a development set"):
        select_on_dev([good, one("none", "ynynynyn", seed=0)])
    with pytest.raises(UserError, match="/runs/none has no answers of a development set"):
        select_on_dev([group(*good.runs, run("none", {}, seed=1))])
    with pytest.raises(UserError, match="none of the runs was trained here"):
        select_on_dev([one("base", "ynynynyn")])
    shared = {"random": answers("random", "ynynynyn", pictures=(*DEV_PICTURES[:2], "p0.jpg", "p1.jpg"))}
    with pytest.raises(UserError, match=r"2 pictures are asked about in .* \(p0\.jpg: "):
        select_on_dev([good, group(replace(on("", "x"), dev=shared))])
    other = {"random": answers("random", "ynynynyn", pictures=("e0", "e1", "e2", "e3"), labels="e.json")}
    with pytest.raises(UserError, match="different questions"):
        select_on_dev([good, group(replace(on("", "x"), dev=other))])
    with pytest.raises(UserError, match="--metric auroc: /runs/good has no scores"):
        select_on_dev([good], "auroc")
