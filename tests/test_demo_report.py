"""The demo's page: the table's numbers, the sentence below it, curves, pictures, and nothing from outside."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from demo.report import Curve, Shown, ticks, write_report
from llava.eval.pope import Confusion, table_header, table_row

ROOT = Path(__file__).resolve().parent.parent
BEFORE = {"random": Confusion(90, 20, 80, 10), "popular": Confusion(90, 30, 70, 10)}
AFTER = {"random": Confusion(85, 5, 95, 15), "popular": Confusion(85, 10, 90, 15)}
WORSE, BETTER = Confusion(90, 45, 55, 10), Confusion(88, 15, 85, 12)
LOSS = Curve("DPO: loss", "loss", [5, 10, 15, 20], [0.69, 0.5, 0.55, 0.31])


def rows(before=WORSE, after=BETTER):
    sets = [("✗", {**BEFORE, "adversarial": before}), ("✓", {**AFTER, "adversarial": after})]
    return [("demo-llava", name, mark, counts) for mark, by_set in sets for name, counts in by_set.items()]


@pytest.fixture
def page(tmp_path):
    """``page(**changes)``: the text of a page with these inputs."""
    pictures = []
    for number in range(12):
        pictures.append(tmp_path / f"COCO_val2014_{number:012}.jpg")
        pictures[-1].write_bytes(b"\xff\xd8\xff" + bytes([number]) * 50)
    yes_no = [("no", "Yes, there is a dog.", "No, there is no dog."), ("yes", "Yes, there is a dog.", "No.")]
    shown = [Shown(file, "Is there a dog in the image?", *yes_no[n % 2]) for n, file in enumerate(pictures)]

    def write(**changes):
        times, facts = {"connector training": 41.2, "DPO": 90.0}, [("seed", "0")]
        inputs = {"rows": rows(), "curves": [LOSS], "shown": shown, "times": times, "facts": facts, **changes}
        write_report(tmp_path / "out" / "report.html", **inputs)
        return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    write.shown = shown
    return write


def text(html):
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def table_cells(html):
    table = html[html.index("<table>") : html.index("</table>")]
    return [[text(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in re.findall(r"<tr.*?</tr>", table)]


def points(html):
    """Those of every curve."""
    lines = re.findall(r'<polyline[^>]* points="([^"]*)"', html)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def test_the_table_holds_what_the_markdown_table_holds(page):
    markdown = [table_header().splitlines()[0], *(table_row(*row) for row in rows())]
    assert table_cells(page()) == [line.strip("| ").split(" | ") for line in markdown]


def test_a_pipe_in_a_name_stays_in_its_cell(page):
    piped = [("a|b", *row[1:]) for row in rows()]
    assert {(row[0], len(row)) for row in table_cells(page(rows=piped))[1:]} == {("a|b", 8)}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            *(WORSE, BETTER),
            "accuracy rose by 14.00 percentage points (from 72.50% to 86.50%) "
            "and the yes ratio fell by 16.00 percentage points (from 67.50% to 51.50%); yes is the right answer to 50%",
        ),
        (
            *(BETTER, WORSE),
            "accuracy fell by 14.00 percentage points (from 86.50% to 72.50%) "
            "and the yes ratio rose by 16.00 percentage points (from 51.50% to 67.50%); yes is the right answer to 50%",
        ),
        (
            *(Confusion(10, 2, 18, 0), Confusion(10, 2, 18, 0)),
            "accuracy stayed at 93.33% and the yes ratio stayed at 40.00%; yes is the right answer to 33.33%",
        ),
        # 1/3 to 2/3: the table says 33.33 and 66.67, and so does the difference.
        (
            *(Confusion(0, 1, 1, 1), Confusion(1, 1, 1, 0)),
            "accuracy rose by 33.34 percentage points (from 33.33% to 66.67%) "
            "and the yes ratio rose by 33.34 percentage points (from 33.33% to 66.67%)",
        ),
    ],
)
def test_the_sentence_says_which_way_it_went(page, before, after, sentence):
    assert f"On the adversarial questions, {sentence}" in text(page(rows=rows(before, after)))


def test_pictures_are_inside_and_nothing_is_outside(page):
    html = page()
    inlined = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', html)
    assert [base64.b64decode(data) for data in inlined] == [one.picture.read_bytes() for one in page.shown]
    assert html.count("src=") == 12
    assert re.findall(r'href="([^"]*)"', html) == ["data:,"]
    assert not re.search(r"https?://|<script|@import|url\(|\son\w+=", html)


def test_every_answer_is_marked(page):
    first, second = re.findall(r"<article.*?</article>", page(), re.DOTALL)[:2]
    before, after = "Before DPO ✗ wrong Yes, there is a dog.", "After DPO ✓ right No, there is no dog."
    assert text(first) == f"Is there a dog in the image? Label no {before} {after}"
    assert text(second).endswith("Label yes Before DPO ✓ right Yes, there is a dog. After DPO ✗ wrong No.")
    assert 'alt="Test picture COCO_val2014_000000000000.jpg"' in first
    assert "12 that the model answers the other way after DPO, 0 that it does not" in text(page())


def test_a_curve_runs_through_its_values_to_its_end(page):
    (line,) = points(page())
    assert len(line) == len(LOSS.values)
    assert all(a[0] < b[0] for a, b in pairwise(line))
    # y from 0.3 to 0.7 (the round numbers around 0.31 and 0.69), x from 0 to the last step
    assert line[0] == (250, pytest.approx(1000 * 0.01 / 0.4, abs=0.01))
    assert line[-1] == (1000, pytest.approx(1000 * 0.39 / 0.4, abs=0.01))
    assert re.search(r'class="dot" d="M1000\.00 975\.00h0"', page())
    assert re.search(r'<div class="last"><span style="top:97\.50%">0\.31</span>', page())


def test_ticks_are_labelled_with_round_numbers(page):
    html = page(curves=[Curve("Margin", "rewards/margins", [1, 40], [-0.4, 1.3])])
    y, x = (re.search(f'<div class="{axis}">(.*?)</div>', html)[1] for axis in "yx")
    assert (text(y), text(x)) == ("−0.5 0.0 0.5 1.0 1.5", "0 10 20 30 40")
    assert html.count('class="zero"') == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.69), (-3, 5000), (-2e-7, -1e-7), (7, 7), (0, 0), (-4, -4)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-12 <= high + 1e-12 < marks[-1] + 1e-9
    assert 2 <= len(marks) <= 7
    steps = [b - a for a, b in pairwise(marks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_curves_without_values_say_so(page):
    some_nan = Curve("Holes", "loss", [1, 2, 3], [1.0, float("nan"), 2.0])
    html = page(curves=[Curve("None", "loss", [], []), Curve("One", "loss", [5], [0.69]), some_nan])
    assert "None No values logged." in text(html)
    assert "One No curve: one value logged, 0.69 at step 5." in text(html)
    assert [len(line) for line in points(html)] == [2]
    assert "1 without a finite value left out" in html
    assert points(page(curves=[Curve("Flat", "loss", [1, 2], [0.5, 0.5])])) == [[(500, 500), (1000, 500)]]


def test_what_comes_from_data_is_text(page):
    evil = '<script>"$total" & more</script>'
    html = page(
        rows=[(evil, *row[1:]) for row in rows()],
        curves=[Curve(evil, evil, *LOSS[2:]), Curve(evil, evil, [], [])],
        shown=[one._replace(question=evil, before=evil, after=evil) for one in page.shown],
        times={evil: 1.0},
        facts=[(evil, evil)],
    )
    assert "<script" not in html
    assert html.count(escape(evil)) == 6 + (2 + 1 + 1) + 12 * 3 + 1 + 2


def test_times_are_summed(page):
    assert "connector training 41.2 s DPO 90.0 s Total 2 min 11 s" in text(page())
    assert "Total 1 min 0 s" in text(page(times={"a": 59.7}))


class Nesting(HTMLParser):
    """Refuses a tag that is not closed where it should be."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_tags_are_closed(page):
    nesting = Nesting()
    nesting.feed(page())
    assert nesting.open == []


def test_no_torch():
    code = "import sys, demo.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
