"""Rows of a POPE results table that no counts can give: Markdown, CSV or LaTeX, in percent or in fractions.

A row's figures all follow from two counts where as many labels are yes as no, from three where not: the shares t of
true yes, f of false yes and s of yes labels among the questions. Of these

    accuracy = t + (1 - s) - f,  precision = t / (t + f),  recall = t / s,  F1 = 2t / (t + f + s),  yes ratio = t + f

A printed figure has been rounded or cut off, which bounds each of these from both sides by something linear in t, f
and s. A row is possible if the bounds leave room; corners of that room are the extremes of any other figure.

numpy only, free of torch.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava.errors import UserError
from llava.eval.pope import SETS
from llava.eval.statistics import METRICS

NAMES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "yes ratio"}

_METRIC_OF = {
    **dict.fromkeys(("accuracy", "acc", "准确率", "正确率", "准确度"), "accuracy"),
    **dict.fromkeys(("precision", "prec", "pre", "精确率", "查准率", "精准率", "精确度"), "precision"),
    **dict.fromkeys(("recall", "rec", "召回率", "查全率"), "recall"),
    **dict.fromkeys(("f1", "f1measure"), "f1"),
    **dict.fromkeys(("yes", "yesratio", "yesrate", "yesproportion", "yespercentage", "yesanswers"), "yes_ratio"),
    **dict.fromkeys(("proportionofyes", "ratioofyes", "yes比例", "yes的比例", "yes率", "yes占比"), "yes_ratio"),
    **dict.fromkeys(("回答是的比例", "回答yes的比例", "回答为是的比例", "是的比例", "是比例"), "yes_ratio"),
}
_POPE_WORDS = (
    "pope",
    "coco",
    "mscoco",
    "random",
    "popular",
    "adversarial",
    "rand",
    "pop",
    "adv",
    "随机",
    "流行",
    "对抗",
)
_MEAN_WORDS = ("avg", "average", "mean", "overall", "平均")
_OTHER_WORDS = ("score", "scores", "percent", "in", "on", "分数", "得分", "值")
_BESIDE_A_METRIC = frozenset((*_POPE_WORDS, *_MEAN_WORDS, *_OTHER_WORDS))
_DEVIATION_WORDS = frozenset(("deviation", "dev", "std", "sd", "stdev", "标准差"))
_SET_HEADS_IN_ENGLISH = ("set", "sets", "pope", "split", "setting", "subset", "category", "sampling")
_SET_HEADS_WITH_POPE = ("popeset", "popesplit", "popesetting", "popesubset")
_SET_HEADS_IN_CHINESE = ("子集", "集合", "划分", "设置", "类别", "数据子集", "采样")
_SET_HEADS = frozenset((*_SET_HEADS_IN_ENGLISH, *_SET_HEADS_WITH_POPE, *_SET_HEADS_IN_CHINESE))
_MODEL_HEADS = frozenset(("model", "models", "method", "methods", "lvlm", "mllm", "backbone", "模型", "方法", "基座"))
_SEEDS_HEADS = frozenset(("seeds", "runs", "nseeds", "nruns", "numseeds", "种子数", "次数"))
_SET_WORDS = {
    "random": r"\brand(?:om)?\b|随机",
    "popular": r"\bpop(?:ular)?\b|流行|热门",
    "adversarial": r"\badv(?:ersarial)?\b|对抗",
}
_MEAN = re.compile(r"\b(?:mean|average|averaged|avg)\b|平均|均值", re.IGNORECASE)
_OVERALL = re.compile(r"\b(?:overall|all|total|pooled)\b|总体|全部|合计", re.IGNORECASE)
_CHANGE = re.compile(r"[Δδ∆]|\b(?:diff|difference|change|gain|improvement)s?\b|提升|差值|变化", re.IGNORECASE)

# How a figure follows from (t, f, s, 1): numerator and denominator.
_FORMULAS = {
    "accuracy": ((1, -1, -1, 1), (0, 0, 0, 1)),
    "precision": ((1, 0, 0, 0), (1, 1, 0, 0)),
    "recall": ((1, 0, 0, 0), (0, 0, 1, 0)),
    "f1": ((2, 0, 0, 0), (1, 1, 1, 0)),
    "yes_ratio": ((1, 1, 0, 0), (0, 0, 0, 1)),
}
# Of a contradiction that any of several columns explains, the one that is computed from the others is named.
_BLAMED = ("f1", "accuracy", "yes_ratio", "precision", "recall")
_CITED = ("precision", "recall", "yes_ratio", "accuracy", "f1")
# These alone are linear in t and f, so that means over seeds or sets keep to the same formulas.
_LINEAR = ("accuracy", "recall", "yes_ratio")

_SLACK = 1e-7  # of a fraction, on each bound: keeps figures printed with all their digits solvable
_TOLERANCE = 1e-9
_SMALLEST_DETERMINANT = 1e-10
# Greedy answers change by a few questions with the batch; one in 200 is more than that.
_RECALL_MAY_DIFFER = 0.005
# What a mean over the three sets does to precision and F1 at most, beside the same means of t and f. Both are convex in
# f, so that it only raises them.
_MEAN_RAISES = {"precision": 0.015, "f1": 0.005}
_MOST_SOLUTIONS = 200
_LARGEST_GRID = 1_000_000


class Labels(NamedTuple):
    """The share of yes labels, from ``low`` to ``high``, and how a message says so."""

    low: float
    high: float
    text: str


_HALF = Labels(0.5, 0.5, "half of the labels being yes")
# POPE's random set had 2910 questions until 2023, 1500 of them to be answered yes.
_OLD_RANDOM = Labels(1500 / 2910, 1500 / 2910, "1500 of 2910 labels being yes")
_MEAN_OF_SETS = Labels(0.5, (1500 / 2910 + 0.5 + 0.5) / 3, "half of the labels being yes")
_ANY = Labels(0.02, 0.98, "")

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Printed:
    """A figure as printed: its text, its value as a fraction of 1, and the last digit's worth in such fractions."""

    text: str
    value: float
    unit: float
    decimals: int
    percent: bool

    def bounds(self, spread: bool) -> Bounds:
        """Where the true value lies, whether this was rounded or cut off; wider for means over several runs."""
        more = self.unit if spread else 0.0
        return self.value - self.unit / 2 - more - _SLACK, self.value + self.unit + more + _SLACK

    def show(self, value: float) -> str:
        """Another value as this one is printed, rounded."""
        return f"{value * (100 if self.percent else 1):.{self.decimals}f}"


@dataclass(frozen=True)
class Entry:
    """One set of figures of a row; a row has several where a table puts its sets side by side."""

    line: int
    label: str  # with a colon behind it, or empty
    key: tuple[str, ...]
    set_name: str | None  # None where nothing names it; unless it is one of POPE's it may be a mean over them
    mean: bool
    spread: bool  # a mean over runs
    cells: dict[str, _Cell]


@dataclass(frozen=True)
class _Cell:
    text: str
    number: float
    decimals: int
    percent_sign: bool
    spread: bool
    signed: bool

    def printed(self, percent: bool) -> Printed:
        percent = percent or self.percent_sign
        scale = 100.0 if percent else 1.0
        return Printed(self.text, self.number / scale, 10.0**-self.decimals / scale, self.decimals, percent)


@dataclass
class _Table:
    rows: list[tuple[int, list[str]]]  # line number and cells, marks taken off
    about: str = ""  # what stands above it
    ragged: list[tuple[int, int]] = field(default_factory=list)  # rows of another length than the head: line, cells
    width: int = 0


def check(path: Path, questions: int = 3000) -> list[str]:
    """What cannot be in a results table: one line each, "FILE: line N: ROW: ...", in the order of lines.

    Looked at, in every table of the file that has a column of METRICS (named in English or Chinese):

    - figures of one row against each other. Half of the labels are taken to be yes, as in POPE; other shares are
      accepted where a row shows one itself (by precision, recall, yes ratio and accuracy) or several rows agree on one;
    - rows of means over seeds ("88.9 ± 0.3") or sets by accuracy, recall and yes ratio alone, since the others do not
      follow from means;
    - recall over POPE's three sets, which share their yes-questions;
    - rows called mean or average against the rows of the sets;
    - figures outside 0..100, and rows with more or fewer cells than the head.

    Args:
        path: a Markdown, CSV or LaTeX file; told by its suffix, else by what it holds.
        questions: of a set; only for quoting the counts a row seems to come from.

    Raises:
        UserError: the file cannot be read, or has no table with such a column.
    """
    path = Path(path).expanduser()
    findings: list[tuple[int, str]] = []
    heads = 0
    for table in _tables(path):
        head = _find_head(table)
        if head is None:
            continue
        heads += 1
        findings += [(line, f"has {cells} cells, its head has {table.width}") for line, cells in table.ragged]
        findings += _check_entries(list(_entries(table, head)), questions)
    if not heads:
        raise UserError(
            f"{path}: no table with a column called Accuracy, Precision, Recall, F1 or Yes Ratio; "
            "expected Markdown, CSV or LaTeX"
        )
    return [f"{path}: line {line}: {text}" for line, text in sorted(findings, key=lambda found: found[0])]


# ---- the arithmetic


def _check_entries(entries: list[Entry], questions: int) -> list[tuple[int, str]]:
    """Findings with percent or fractions as the sizes tell; a column of fractions among percents is allowed for."""
    values = [abs(cell.number) for entry in entries for cell in entry.cells.values() if not cell.percent_sign]
    percent = sum(value > 1 for value in values) >= sum(0 < value <= 1 for value in values)
    small = {
        name
        for name in METRICS
        if percent
        and all(abs(entry.cells[name].number) <= 1 for entry in entries if name in entry.cells)
        and any(entry.cells[name].number for entry in entries if name in entry.cells)
    }
    readings = [_findings(entries, percent, frozenset(), questions)]
    if small and readings[0]:
        readings.append(_findings(entries, percent, frozenset(small), questions))
    return min(readings, key=len)


def _findings(entries: list[Entry], percent: bool, fractions: frozenset[str], questions: int) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    rows: list[tuple[Entry, dict[str, Printed]]] = []
    for entry in entries:
        printed = {name: cell.printed(percent and name not in fractions) for name, cell in entry.cells.items()}
        for name, value in list(printed.items()):
            if not 0 <= value.value <= 1:
                limit = "0..100" if value.percent else "0..1"
                found.append((entry.line, f"{entry.label}{NAMES[name]} {value.text} lies outside {limit}"))
                del printed[name]
        rows.append((entry, printed))
    broken = [(entry, printed) for entry, printed in rows if not _possible(entry, printed, None)]
    agreed = [_agreed_labels(entry, rows, broken) for entry, _ in broken]
    for (entry, printed), labels in zip(broken, agreed, strict=True):
        if labels is None or not _possible(entry, printed, labels):
            for name, text in list(_impossible(entry, printed, labels, questions)):
                found.append((entry.line, f"{entry.label}{NAMES[name]} {text}"))
                del printed[name]  # named once: what follows compares rows
    by_key: dict[tuple[str, ...], list[tuple[Entry, dict[str, Printed]]]] = {}
    for entry, printed in rows:
        by_key.setdefault(entry.key, []).append((entry, printed))
    for group in by_key.values():
        found += _unequal_recall(group)
        found += _wrong_means(group)
    return found


def _usable(entry: Entry, printed: dict[str, Printed]) -> dict[str, Bounds]:
    means = entry.mean or entry.spread
    return {name: value.bounds(entry.spread) for name, value in printed.items() if not means or name in _LINEAR}


def _assumed(entry: Entry, agreed: Labels | None) -> list[Labels]:
    """Shares of yes labels a row may have without being taken for wrong, the likeliest first."""
    assumed = [agreed] if agreed else []
    assumed.append(_HALF)
    if entry.mean or (entry.spread and entry.set_name not in SETS):
        assumed.append(_MEAN_OF_SETS)
    if not entry.mean and entry.set_name not in ("popular", "adversarial"):
        assumed.append(_OLD_RANDOM)
    return assumed


def _possible(entry: Entry, printed: dict[str, Printed], agreed: Labels | None) -> bool:
    bounds = _usable(entry, printed)
    if len(bounds) < 2 or any(len(_corners(bounds, labels)) for labels in _assumed(entry, agreed)):
        return True
    if _shows_labels(bounds) and len(_corners(bounds, _ANY)):
        return True
    if entry.set_name not in SETS and not entry.mean and not entry.spread:
        raised = {name: (low - _MEAN_RAISES.get(name, 0.0), high) for name, (low, high) in bounds.items()}
        return len(_corners(raised, _MEAN_OF_SETS)) > 0
    return False


def _shows_labels(bounds: dict[str, Bounds]) -> bool:
    """Whether the share of yes labels follows from a row, and is confirmed by it."""
    return bounds.keys() >= {"accuracy", "precision", "recall", "yes_ratio"}


def _agreed_labels(
    entry: Entry, rows: list[tuple[Entry, dict[str, Printed]]], broken: list[tuple[Entry, dict[str, Printed]]]
) -> Labels | None:
    """The share of yes labels on which most rows of a set agree, where at least two of these do not fit a half."""
    found: list[tuple[float, float, int]] = []
    for other, printed in rows:
        bounds = _usable(other, printed)
        if (other.set_name, other.mean) == (entry.set_name, entry.mean) and len(bounds) > 2:
            shares = _corners(bounds, _ANY)[:, 2]
            unfit = any(other is one for one, _ in broken)
            found.append((shares.min(initial=2.0), shares.max(initial=-1.0), other.line if unfit else 0))
    best: list[tuple[float, float, int]] = []
    for start, _, _ in found:
        agreeing = [(low, high, line) for low, high, line in found if low <= start <= high]
        best = max(best, agreeing, key=len)
    if len({line for _, _, line in best if line}) < 2 or 2 * len(best) <= len(found):
        return None
    low, high = max(low for low, _, _ in best), min(high for _, high, _ in best)
    return Labels(low, high, f"{50 * (low + high):.1f}% of the labels being yes")


def _corners(bounds: dict[str, Bounds], labels: Labels) -> np.ndarray:
    """Corners (n, 3) of the room that figures leave to (t, f, s), a convex polytope; n is 0 where there is none."""
    sides = [
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (-1, 0, 1, 0),
        (0, -1, -1, 1),
        (0, 0, 1, -labels.low + _TOLERANCE),
        (0, 0, -1, labels.high + _TOLERANCE),
    ]
    for name, (low, high) in bounds.items():
        above, below = (np.array(part, dtype=np.float64) for part in _FORMULAS[name])
        sides += [above - low * below, high * below - above]
    planes = np.array(sides, dtype=np.float64)
    planes /= np.linalg.norm(planes[:, :3], axis=1, keepdims=True)
    chosen = planes[_triples(len(planes))]
    first, second, third = chosen[:, 0, :3], chosen[:, 1, :3], chosen[:, 2, :3]
    crossed = np.cross(second, third)
    determinant = (first * crossed).sum(axis=1)
    met = np.abs(determinant) > _SMALLEST_DETERMINANT
    solved = -(
        chosen[:, 0, 3, None] * crossed
        + chosen[:, 1, 3, None] * np.cross(third, first)
        + chosen[:, 2, 3, None] * np.cross(first, second)
    )
    points = solved[met] / determinant[met, None]
    inside = (points @ planes[:, :3].T + planes[:, 3] >= -_TOLERANCE).all(axis=1)
    return points[inside]


@lru_cache
def _triples(number: int) -> np.ndarray:
    return np.array(list(combinations(range(number), 3)))


def _range(name: str, corners: np.ndarray) -> Bounds:
    """The least and the largest value of a figure over a polytope: a ratio of linear forms has them at corners."""
    above, below = (np.array(part, dtype=np.float64) for part in _FORMULAS[name])
    points = np.column_stack([corners, np.ones(len(corners))])
    divisor = points @ below
    if (divisor < _TOLERANCE).any():
        return 0.0, 1.0
    values = np.clip((points @ above) / divisor, 0.0, 1.0)
    return float(values.min()), float(values.max())


def _impossible(
    entry: Entry, printed: dict[str, Printed], agreed: Labels | None, questions: int
) -> Iterator[tuple[str, str]]:
    """The figures of a row that cannot be, and what they must be."""
    bounds = _usable(entry, printed)
    wrong, labels = _culprits(bounds, _assumed(entry, agreed))
    rest = {name: bounds[name] for name in _CITED if name in bounds and name not in wrong}
    corners = _corners(rest, labels)
    for name in wrong:
        cited, allowed = _reason(name, bounds[name], rest, labels)
        shown = f"{printed[name].show(allowed[0])} to {printed[name].show(allowed[1])}"
        grounds = " and ".join(f"{NAMES[other]} {printed[other].text}" for other in cited)
        anyway = _range(name, _corners({other: rest[other] for other in cited}, _ANY))
        given = "" if _outside(bounds[name], anyway) else f" ({labels.text})"
        exact = labels == _HALF and not entry.mean and not entry.spread
        must = (exact and _counted(name, printed[name], rest, corners, questions)) or shown
        yield name, f"{printed[name].text} must be {must}: {grounds} allow {shown}{given}"


def _culprits(bounds: dict[str, Bounds], assumed: Sequence[Labels]) -> tuple[tuple[str, ...], Labels]:
    """The fewest figures without which a row is possible, and with which share of yes labels."""
    names = [name for name in _BLAMED if name in bounds]
    for size in range(1, len(names)):
        for labels in assumed:
            for wrong in combinations(names, size):
                if len(_corners({name: bounds[name] for name in names if name not in wrong}, labels)):
                    return wrong, labels
        if size == 1 and _shows_labels(bounds):
            for name in ("accuracy", "f1"):
                if name in bounds:
                    corners = _corners({other: bounds[other] for other in names if other != name}, _ANY)
                    if len(corners):
                        low, high = corners[:, 2].min(), corners[:, 2].max()
                        text = f"{50 * (low + high):.1f}% of the labels being yes, by precision, recall and yes ratio"
                        return (name,), Labels(low, high, text)
    raise AssertionError("any one figure within 0..1 is possible")


def _reason(name: str, found: Bounds, rest: dict[str, Bounds], labels: Labels) -> tuple[tuple[str, ...], Bounds]:
    """The fewest other figures that contradict one, and what they allow."""
    for size in range(min(2, len(rest)), len(rest) + 1):
        for cited in combinations(rest, size):
            allowed = _range(name, _corners({other: rest[other] for other in cited}, labels))
            if _outside(found, allowed):
                return cited, allowed
    return tuple(rest), _range(name, _corners(rest, labels))


def _outside(found: Bounds, allowed: Bounds) -> bool:
    return found[1] < allowed[0] or found[0] > allowed[1]


def _counted(name: str, printed: Printed, rest: dict[str, Bounds], corners: np.ndarray, questions: int) -> str:
    """What counts of a balanced set give for a figure, where the row's other figures leave few; else nothing."""
    if questions % 2 or questions < 2:
        return ""
    first = np.floor(corners[:, :2].min(axis=0) * questions).astype(int)
    last = np.ceil(corners[:, :2].max(axis=0) * questions).astype(int)
    if (last - first + 1).prod() > _LARGEST_GRID:
        return ""
    tp, fp = (axis.ravel() for axis in np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(first, last, strict=True))))
    points = np.stack([tp, fp, np.full(len(tp), questions // 2), np.full(len(tp), questions)], axis=1)
    fits = (tp >= 0) & (fp >= 0) & (tp <= questions // 2) & (fp <= questions // 2)
    for other, (low, high) in rest.items():
        above, below = (points @ np.array(part) for part in _FORMULAS[other])
        fits &= (above >= low * below) & (above <= high * below)
    solutions = points[fits]
    if not 0 < len(solutions) <= _MOST_SOLUTIONS:
        return ""
    scale = (100 if printed.percent else 1) * 10**printed.decimals
    shown: set[int] = set()
    for point in solutions.tolist():
        above, below = (sum(a * b for a, b in zip(part, point, strict=True)) for part in _FORMULAS[name])
        exact = Fraction(above, below) * scale if below else Fraction(0)
        shown |= {exact.__floor__(), (exact + Fraction(1, 2)).__floor__()}
    if len(shown) > 2:
        return ""
    values = " or ".join(f"{value / 10**printed.decimals:.{printed.decimals}f}" for value in sorted(shown))
    if len(solutions) == 1:
        return f"{values} (tp {solutions[0][0]}, fp {solutions[0][1]} of {questions})"
    return values


def _unequal_recall(group: list[tuple[Entry, dict[str, Printed]]]) -> Iterator[tuple[int, str]]:
    sets = {entry.set_name: (entry, printed["recall"]) for entry, printed in group if _has_recall(entry, printed)}
    if len(sets) < 2 or len(sets) < sum(_has_recall(entry, printed) for entry, printed in group):
        return
    bounds = [value.bounds(entry.spread) for entry, value in sets.values()]
    if max(low for low, _ in bounds) - min(high for _, high in bounds) <= _RECALL_MAY_DIFFER:
        return
    shown = ", ".join(f"{sets[name][1].text} ({name})" for name in SETS if name in sets)
    last = max((entry for entry, _ in sets.values()), key=lambda entry: entry.line)
    yield (
        last.line,
        f"{_label(last.key)}recall is {shown}, but POPE's sets share their yes-questions: "
        "it must be the same in all (sampled answers may differ by a few)",
    )


def _has_recall(entry: Entry, printed: dict[str, Printed]) -> bool:
    return entry.set_name in SETS and not entry.mean and "recall" in printed


def _wrong_means(group: list[tuple[Entry, dict[str, Printed]]]) -> Iterator[tuple[int, str]]:
    above: list[tuple[Entry, dict[str, Printed]]] = []
    for entry, printed in group:
        if not entry.mean:
            above.append((entry, printed))
            continue
        names = [one.set_name for one, _ in above]
        if len(names) >= 2 and None not in names and len(set(names)) == len(names):
            yield from _wrong_mean(entry, printed, above)
        above = []


def _wrong_mean(
    entry: Entry, printed: dict[str, Printed], above: list[tuple[Entry, dict[str, Printed]]]
) -> Iterator[tuple[int, str]]:
    own = {name: value.bounds(entry.spread) for name, value in printed.items()}
    for name in METRICS:
        if name not in printed or any(name not in values for _, values in above):
            continue
        parts = [values[name].bounds(one.spread) for one, values in above]
        allowed = (sum(low for low, _ in parts) / len(parts), sum(high for _, high in parts) / len(parts))
        if not _outside(own[name], allowed) or (name not in _LINEAR and _is_pooled(name, own)):
            continue
        exact = sum(values[name].value for _, values in above) / len(above)
        sets = ", ".join(str(one.set_name) for one, _ in above)
        yield (
            entry.line,
            f"{entry.label}{NAMES[name]} {printed[name].text} must be {printed[name].show(exact)}: the mean of {sets}",
        )


def _is_pooled(name: str, own: dict[str, Bounds]) -> bool:
    """Whether a precision or F1 follows from its row's means, as some compute it."""
    grounds = [[other for other in _LINEAR if other in own]]
    if name == "f1":
        grounds.append([other for other in ("precision", "recall") if other in own])
    return any(
        len(others) > 1 and len(_corners({other: own[other] for other in (*others, name)}, _MEAN_OF_SETS))
        for others in grounds
    )


# ---- rows and columns


class _Head(NamedTuple):
    row: int
    groups: list[dict[str, int]]  # columns of the metrics; several where sets stand side by side
    deviations: set[int]
    set_column: int | None
    model_column: int | None
    seeds_column: int | None
    first: int  # the first metric's column
    texts: list[str]  # of every column, with what stands above it


def _find_head(table: _Table) -> _Head | None:
    for index, (_, cells) in enumerate(table.rows):
        columns = [(column, name) for column, cell in enumerate(cells) if (name := _metric(cell))]
        # A later row with one such name is a table turned on its side.
        if len(columns) >= (1 if index == 0 else 2):
            return _head(table, index, columns)
    return None


def _head(table: _Table, index: int, columns: list[tuple[int, str]]) -> _Head:
    cells = table.rows[index][1]
    texts = list(cells)
    first = columns[0][0]
    for _, above in table.rows[:index]:
        carried = ""
        for column, cell in enumerate(above[: len(texts)]):
            carried = cell if cell or column < first else carried
            if column >= first:
                texts[column] = f"{carried} {texts[column]}"
            elif not texts[column]:
                texts[column] = cell
    groups: list[dict[str, int]] = [{}]
    before = _sets_in(texts[first])
    for column, name in columns:
        sets = _sets_in(texts[column])
        if name in groups[-1] or sets != before:
            groups.append({})
        groups[-1][name], before = column, sets
    words = [_words(text) for text in texts[:first]]
    return _Head(
        index,
        groups,
        {column for column, text in enumerate(texts) if _is_deviation(text)},
        _first(words, _SET_HEADS),
        _first(words, _MODEL_HEADS),
        _first([_words(text) for text in texts], _SEEDS_HEADS),
        first,
        texts,
    )


def _first(heads: list[list[str]], names: frozenset[str]) -> int | None:
    return next((column for column, words in enumerate(heads) if "".join(words) in names), None)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[一-鿿]+", text.lower())


def _metric(text: str) -> str | None:
    if _CHANGE.search(text):
        return None
    words = _words(re.split(r"[±\[]", text)[0])
    return _METRIC_OF.get("".join(words)) or _METRIC_OF.get("".join(w for w in words if w not in _BESIDE_A_METRIC))


def _is_deviation(text: str) -> bool:
    words = _words(text)
    others = [word for word in words if word not in _DEVIATION_WORDS]
    return len(others) < len(words) and _metric(" ".join(others)) is not None


def _sets_in(text: str) -> list[str]:
    return [name for name, pattern in _SET_WORDS.items() if re.search(pattern, text.replace("_", " "), re.IGNORECASE)]


def _entries(table: _Table, head: _Head) -> Iterator[Entry]:
    section = ""
    filled: dict[int, str] = {}
    carried = [column for column in (head.set_column, head.model_column) if column is not None]
    measured = {column for group in head.groups for column in group.values()}
    for line, given in table.rows[head.row + 1 :]:
        if not any(given[column] for column in measured):
            section = " ".join(cell for cell in given if cell) or section
            filled.clear()
            continue
        cells = list(given)
        for column in carried:
            filled[column] = cells[column] = cells[column] or filled.get(column, "")
        described = cells[: head.first]
        if _CHANGE.search(" ".join(described)):
            continue
        parsed = {column: cell for column in measured if (cell := _cell(cells[column]))}
        if any(cell.signed for cell in parsed.values()) or (parsed and all(c.number < 0 for c in parsed.values())):
            continue  # differences, not figures
        seeds = _cell(cells[head.seeds_column]) if head.seeds_column is not None else None
        spread = any(cell.spread for cell in parsed.values())
        spread |= any(_cell(cells[column]) is not None for column in head.deviations)
        spread |= seeds is not None and seeds.number > 1
        key = tuple(cell for column, cell in enumerate(described) if column != head.set_column and cell)
        for group in head.groups:
            figures = {name: parsed[column] for name, column in group.items() if column in parsed}
            if not figures:
                continue
            above = " ".join(head.texts[column] for column in group.values())
            set_name, mean = _set_of_row(described, head.set_column, (above, section, table.about))
            label = [cell for cell in (section, *described) if cell]
            if len(head.groups) > 1 and set_name:
                label.append(set_name)
            yield Entry(line, _label(label), (section, *key) if section else key, set_name, mean, spread, figures)


def _label(cells: Sequence[str]) -> str:
    text = ", ".join(cells)
    return f"{text if len(text) <= 100 else text[:99] + '…'}: " if cells else ""


def _set_of_row(described: list[str], set_column: int | None, around: Sequence[str]) -> tuple[str | None, bool]:
    """A row's set, None where nothing names one, and whether it is a mean over sets."""
    if set_column is not None and described[set_column]:
        text = described[set_column]
        if _MEAN.search(text):
            return "mean", True
        sets = _sets_in(text)
        if len(sets) == 1:
            return sets[0], False
        return (None, False) if sets or _OVERALL.search(text) else (text, False)
    nearest = (" ".join(described), *around)
    if _MEAN.search(nearest[0]) or _MEAN.search(nearest[1]):
        return "mean", True
    for text in nearest:
        sets = _sets_in(text)
        if sets:
            return (sets[0], False) if len(sets) == 1 else (None, False)
    return None, False


_NUMBER = re.compile(r"[~≈*†‡ ]*([+\-−–]?) *(\d+(?:[.,]\d+)?|\.\d+)(?:[eE]([+-]?\d+))? *(%?)(.*)$", re.DOTALL)


def _cell(text: str) -> _Cell | None:
    """A figure; None for an empty cell, words, or several figures in one cell."""
    match = _NUMBER.match(text)
    if not match:
        return None
    sign, digits, power, percent_sign, after = match.groups()
    if re.match(r"\s*/|[:,.]|\w\w|\d", after):
        return None
    digits = digits.replace(",", ".")
    exponent = int(power or 0)
    if abs(exponent) > 9:
        return None  # no share
    decimals = len(digits.partition(".")[2]) - exponent
    number = float(digits) * 10.0**exponent * (-1 if sign in ("-", "−", "–") else 1)
    spread = bool(re.search(r"±|\+/-|\+-|^\s*\(\s*\d[^↑↓]*$", after))
    shown = f"{sign}{digits}" + (f"e{power}" if power else "")
    return _Cell(shown, number, max(0, decimals), bool(percent_sign), spread, sign == "+")


# ---- files


def _tables(path: Path) -> list[_Table]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    suffix = path.suffix.lower()
    if suffix in (".md", ".markdown"):
        return _markdown(text)
    if suffix in (".csv", ".tsv"):
        return _csv(path, text)
    if suffix == ".tex":
        return _latex(text)
    if any("|" in line and _RULE.fullmatch(line) for line in text.split("\n")):
        return _markdown(text)
    return _latex(text) if re.search(r"&.*\\\\", text) else _csv(path, text)


def _plain(text: str) -> str:
    """A cell without Markdown's and HTML's marks."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", " ", text))
    if "\\" in text or "$" in text:
        text = _without_commands(text)
    text = re.sub(r"\*\*|__|~~|`", "", text).strip()
    return re.sub(r"^[*_]+|[*_]+$", "", text).strip()


_RULE = re.compile(r"[>\s]*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*")


def _markdown(text: str) -> list[_Table]:
    lines = [re.sub(r"^\s*(?:>\s*)+", "", line).strip() for line in text.split("\n")]
    tables: list[_Table] = []
    index = 0
    while index + 1 < len(lines):
        if "|" not in lines[index] or "|" not in lines[index + 1] or not _RULE.fullmatch(lines[index + 1]):
            index += 1
            continue
        about = next((line for line in reversed(lines[:index]) if line), "")
        about = about if re.match(r"#|\*\*|Table\b|表", about) else ""  # a paragraph may name a set in passing
        table = _Table([], about, width=len(_pipes(lines[index])))
        start = index
        while index < len(lines) and "|" in lines[index]:
            cells = _pipes(lines[index])
            if len(cells) != table.width:
                table.ragged.append((index + 1, len(cells)))
            elif index != start + 1:
                table.rows.append((index + 1, [_plain(cell) for cell in cells]))
            index += 1
        tables.append(table)
    return tables


def _pipes(line: str) -> list[str]:
    line = line.removeprefix("|")
    if line.endswith("|") and not line.endswith("\\|"):
        line = line[:-1]
    return [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)]


def _csv(path: Path, text: str) -> list[_Table]:
    top = text.partition("\n")[0]
    delimiter = max(",;\t", key=top.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    tables: list[_Table] = []
    table = _Table([])
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                table = _Table([])
                continue
            if not table.width:
                table.width = len(cells)
                tables.append(table)
            if len(cells) != table.width:
                table.ragged.append((reader.line_num, len(cells)))
            else:
                table.rows.append((reader.line_num, [_plain(cell) for cell in cells]))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not CSV: {error}; mend that line") from None
    return tables


# Commands whose argument is no text.
_NO_TEXT = r"\\(?:cellcolor|rowcolor|color|textcolor|fontsize|vspace|hspace|cite[pt]?|footnote|label|ref|rule)\*?"
_SYMBOLS = {
    r"\pm": "±",
    r"\%": "%",
    r"\&": "&",
    r"\_": "_",
    r"\#": "#",
    r"\$": "",
    r"\Delta": "Δ",
    r"\uparrow": "↑",
    r"\downarrow": "↓",
    r"\checkmark": "✓",
    r"\cmark": "✓",
    r"\xmark": "✗",
    r"\times": "×",
    r"\approx": "≈",
}
_RULES = re.compile(
    r"\\(?:toprule|midrule|bottomrule|hline|cmidrule|cline|addlinespace|specialrule|morecmidrules|noalign|arrayrulecolor)"
    r"(?![a-zA-Z])(?:\s*[\[({][^\])}]*[\])}])*"
)


def _without_commands(text: str) -> str:
    """A cell without LaTeX's marks."""
    text = re.sub(_NO_TEXT + r"(?![a-zA-Z])(?:\[[^\]]*\])?(?:\{[^{}]*\})?", " ", text)
    for command, symbol in _SYMBOLS.items():
        ending = r"(?![a-zA-Z])" if command[-1].isalpha() else ""
        text = re.sub(re.escape(command) + ending, symbol, text)
    text = re.sub(r"\{,\}", ".", text)
    text = re.sub(r"\\\\|\\[,;:!> ]|~(?!~)", " ", text)
    text = re.sub(r"\\[a-zA-Z]+\*?", " ", text)
    text = re.sub(r"[_^]\s*\{", " {", text)
    return re.sub(r"\s+", " ", re.sub(r"[{}$]", "", text)).strip()


def _latex(text: str) -> list[_Table]:
    # Comments go, line breaks stay: findings name lines.
    text = re.sub(r"(?<!\\)%[^\n]*", "", text)
    inside = r"\\begin\{(tabular[x*y]?|tabu|longtable|array)\}(.*?)\\end\{\1\}"
    parts = [(match.group(1), *match.span(2)) for match in re.finditer(inside, text, re.DOTALL)]
    tables = []
    previous = 0
    for environment, start, end in parts or [("", 0, len(text))]:
        body = text[start:end]
        captions = re.findall(r"\\caption(?:\[[^\]]*\])?\{([^{}]*)", text[previous:start])
        start += _arguments(body, 2 if environment in ("tabular*", "tabularx", "tabulary") else 1) if environment else 0
        rows = _latex_rows(text[start:end], text.count("\n", 0, start) + 1)
        tables.append(_latex_table(rows, captions[-1] if captions else ""))
        previous = end
    return tables


def _arguments(body: str, number: int) -> int:
    """Where an environment's body begins behind its arguments, the last of which sets the columns."""
    index, depth = 0, 0
    while index < len(body) and (number or depth):
        depth += {"{": 1, "}": -1}.get(body[index], 0)
        number -= body[index] == "}" and depth == 0
        index += 1
    return index


def _latex_table(rows: Iterator[tuple[int, list[str]]], about: str) -> _Table:
    table = _Table([], about)
    multirows: dict[int, tuple[int, str]] = {}  # by column: rows left, text
    for line, raw in rows:
        cells: list[str] = []
        for raw_cell in raw:
            span, text = _span(raw_cell, "multicolumn")
            height, text = _span(text, "multirow")
            cell = _without_commands(text)
            column = len(cells)
            left, carried = multirows.get(column, (0, ""))
            if left:
                multirows[column] = (left - 1, carried)
                cell = cell or carried
            if height > 1:
                multirows[column] = (height - 1, cell)
            if height < -1:
                for _, earlier in table.rows[height + 1 :]:
                    if column < len(earlier):
                        earlier[column] = earlier[column] or cell
            cells += [cell] + [""] * (span - 1)
        table.width = table.width or len(cells)
        if len(cells) == table.width:
            table.rows.append((line, cells))
        elif len(raw) > 1:
            table.ragged.append((line, len(cells)))
        else:
            table.rows.append((line, (cells + [""] * table.width)[: table.width]))  # a heading between rows
    return table


def _span(cell: str, command: str) -> tuple[int, str]:
    """How many rows or columns a cell takes, and what is in it."""
    option, braced = r"\s*(?:\[[^\]]*\])?\s*", r"\{(?:[^{}]|\{[^{}]*\})*\}"
    match = re.search(rf"\\{command}{option}\{{\s*(-?\d+)\s*\}}{option}{braced}{option}\{{", cell)
    if not match:
        return 1, cell
    depth, end = 1, match.end()
    while end < len(cell) and depth:
        depth += {"{": 1, "}": -1}.get(cell[end], 0)
        end += 1
    return int(match.group(1)), cell[: match.start()] + cell[match.end() : end - 1] + cell[end:]


def _latex_rows(body: str, line: int) -> Iterator[tuple[int, list[str]]]:
    """Rows as their line number and cells, cut at ``\\\\`` and ``&`` outside braces."""
    body, cells, depth, index, begun = body + r"\\", [""], 0, 0, line
    while index < len(body):
        char = body[index]
        pair = body[index : index + 2]
        if depth == 0 and pair == r"\\":
            skipped = re.compile(r"\*?[ \t]*(?:\[[^\]\n]*\])?").match(body, index + 2)
            texts = [_RULES.sub(" ", cell).strip() for cell in cells]
            if any(texts):
                yield begun, texts
            cells, index, begun = [""], skipped.end() if skipped else index + 2, 0
            continue
        step = 2 if char == "\\" else 1
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0 and char == "&":
            cells.append("")
        else:
            cells[-1] += body[index : index + step]
        if not begun and not char.isspace():
            begun = line
        line += body.count("\n", index, index + step)
        index += step
