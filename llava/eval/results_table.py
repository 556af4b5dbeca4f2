"""A comparison as Markdown, LaTeX, CSV and plain numbers: percent with two decimals, as in HA-DPO's README."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llava.eval.comparison import AUROC, TOLD_APART, AtRatio, Cell, Comparison, ObjectRow, Row
from llava.eval.evaluated import Group
from llava.eval.pope import Confusion, table_header
from llava.eval.statistics import METRICS, Interval

NOTHING = "-"

_MODEL, _SET, _HADPO, *_METRIC_NAMES = (cell.strip() for cell in table_header().split("\n")[0].strip("|").split("|"))
HEADS = {**dict(zip(METRICS, _METRIC_NAMES, strict=True)), AUROC: "AUROC"}

_VERDICTS = {
    "better": "better than the baseline at the same yes ratio",
    "same": "no better, as far as can be told, than the baseline with its threshold moved",
    "worse": "worse than the baseline at the same yes ratio",
}
_RATIO_NOTES = (
    "AUROC: the chance that a yes-question scores above a no-question (score: probability of yes), whatever the "
    "threshold.",
    "Accuracy at the baseline's yes ratio: of the scores, with the threshold at which the model says yes as often as "
    "the baseline.",
    "Baseline, threshold moved: accuracy of the baseline's scores with the threshold at which it says yes as often as "
    "the model. Δ control is the model's accuracy less that one; thresholds are those of the full sample, and its p is "
    "corrected as above, over this table's rows. A model is called better or worse where the interval leaves out 0 and "
    f"p is below {TOLD_APART}.",
)

_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "_%&#${}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "✓": r"\checkmark",
    "✗": r"$\times$",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
}


@dataclass(frozen=True)
class _Table:
    """Cells as ``(text, bold)``; groups begin at the rows ``firsts``; the first ``words`` columns hold text."""

    head: list[str]
    rows: list[list[tuple[str, bool]]]
    firsts: list[int]
    words: int


def percent(value: float, deviation: float | None = None) -> str:
    """'88.92', or '88.92 ± 0.31' with a deviation, of fractions."""
    return f"{100 * value:.2f}" if deviation is None else f"{100 * value:.2f} ± {100 * deviation:.2f}"


def points(difference: Interval | None) -> str:
    """'+1.86 [+0.93, +2.79]' of fractions; '-' of None."""
    if difference is None:
        return NOTHING
    return f"{_signed(difference.value)} [{_signed(difference.low)}, {_signed(difference.high)}]"


def _signed(value: float) -> str:
    return f"{round(100 * value, 2) + 0.0:+.2f}"  # + 0.0: no '-0.00'


def p_value(p: float | None) -> str:
    """'0.012', '<0.001', or '-' of None."""
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def setting(value: Any) -> str:
    """An argument's value as a cell shows it; '-' of None."""
    if value is None:
        return NOTHING
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def markdown(comparison: Comparison) -> str:
    """The results table and the notes below it."""
    return _markdown(_results(comparison), comparison.notes)


def ratio_markdown(comparison: Comparison) -> str:
    """Better, or only more reluctant: the table, a verdict for each group, notes; '' where nothing has scores."""
    if not comparison.at_ratio:
        return ""
    return _markdown(_at_ratio(comparison), [*verdicts(comparison), *_RATIO_NOTES])


def verdicts(comparison: Comparison) -> list[str]:
    """One line for each group that has one: what the interval says of it at the baseline's yes ratio."""
    return [
        f"{_described(comparison, row.group)}: {_VERDICTS[row.verdict]} "
        f"({points(row.control.difference)} points of accuracy, {row.set_name})."
        for row in comparison.at_ratio
        if row.verdict
    ]


def latex(comparison: Comparison) -> str:
    """The results table as a tabular for booktabs and amssymb, its notes as comments."""
    return _latex(_results(comparison), comparison.notes)


def csv_text(comparison: Comparison) -> str:
    """One row a group and set, one column a number: percent, but p values as they are.

    ``METRIC`` is the value, and ``METRIC_deviation``, ``_difference``, ``_low``, ``_high``, ``_p``, ``_p_holm`` are as
    in ``comparison.Cell``; ``control`` and ``at_baseline_ratio`` are ``AtRatio``'s control and accuracy. What there is
    not is empty.
    """
    shown = [row for row in comparison.rows if row.kind == "run"]
    at_ratio = {(row.group, row.set_name): row for row in comparison.at_ratio}
    metrics = [m for m in HEADS if any(m in row.cells for row in shown)]
    columns = [*metrics, *(("control", "at_baseline_ratio") if at_ratio else ())]
    parts = ("", "_deviation", "_difference", "_low", "_high", "_p", "_p_holm")
    rows: list[list[Any]] = [
        ["model", "run", "set", "hadpo", *comparison.columns, "seeds", "baseline"]
        + [column + part for column in columns for part in parts]
    ]
    for row in shown:
        base = comparison.baseline_of(row.group)
        settings = [comparison.setting_of(row.group, column) for column in comparison.columns]
        at = at_ratio.get((row.group, row.set_name))
        cells = {**row.cells, **({"control": at.control, "at_baseline_ratio": at.accuracy} if at else {})}
        rows.append(
            [
                comparison.name_of(row.group),
                row.group.runs[0].name,
                row.set_name,
                row.group.runs[0].hadpo,
                *("" if value is None else setting(value) for value in settings),
                len(row.group.runs),
                "" if base is None else base.runs[0].name,
                *(number for column in columns for number in _csv_numbers(cells.get(column))),
            ]
        )
    return _csv(rows)


def objects_csv(objects: Iterable[tuple[str, Sequence[ObjectRow]]]) -> str:
    """Objects by the name of the run: counts of base and tuned model, accuracy and yes ratio in percent, false yes."""
    numbers = ("accuracy", "yes_ratio", "false_yes", "tp", "fp", "tn", "fn")
    rows: list[list[Any]] = [["run", "object", "questions", *(f"{w}_{n}" for w in ("base", "tuned") for n in numbers)]]
    for name, held in objects:
        for row in held:
            counts = (number for c in (row.base, row.tuned) for number in _object_numbers(c))
            rows.append([name, row.object, row.questions, *counts])
    return _csv(rows)


def _object_numbers(c: Confusion | None) -> list[Any]:
    return [""] * 7 if c is None else [_percent(c.accuracy), _percent(c.yes_ratio), c.fp, c.tp, c.fp, c.tn, c.fn]


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything in the tables as JSON has it: fractions, groups by their place in ``groups``."""
    place = {group: i for i, group in enumerate(comparison.groups)}
    return {
        "pictures": comparison.pictures,
        "resamples": comparison.times,
        "seed": comparison.seed,
        "columns": comparison.columns,
        "groups": [
            {
                "name": comparison.name_of(group),
                "baseline": None if base is None else place[base],
                **group_dict(group),
            }
            for group, base in zip(comparison.groups, comparison.baselines, strict=True)
        ],
        "rows": [
            {
                "group": place[row.group],
                "set": row.set_name,
                "kind": row.kind,
                "cells": {metric: _cell_dict(cell) for metric, cell in row.cells.items()},
            }
            for row in comparison.rows
        ],
        "at_ratio": [
            {
                "group": place[row.group],
                "set": row.set_name,
                "auroc": _cell_dict(row.auroc),
                "accuracy": _cell_dict(row.accuracy),
                "control": _cell_dict(row.control),
                "verdict": row.verdict,
            }
            for row in comparison.at_ratio
        ],
        "notes": comparison.notes,
        "verdicts": verdicts(comparison),
    }


def group_dict(group: Group) -> dict[str, Any]:
    """A group's model, settings and runs."""
    first = group.runs[0]
    return {
        "model": first.model,
        "root": first.root,
        "start": first.start,
        "hadpo": first.hadpo,
        "settings": group.settings,
        "runs": [
            {"name": run.name, "folder": str(run.folder), "answers": str(run.answers), "seed": run.seed}
            for run in group.runs
        ],
    }


def object_dict(row: ObjectRow) -> dict[str, Any]:
    """One object's questions and counts."""
    base = None if row.base is None else row.base.as_dict()
    return {"object": row.object, "questions": row.questions, "base": base, "tuned": row.tuned.as_dict()}


def _cell_dict(cell: Cell) -> dict[str, Any]:
    difference = None if cell.difference is None else cell.difference._asdict()
    return {
        "value": cell.value,
        "deviation": cell.deviation,
        "difference": difference,
        "p_holm": cell.p_holm,
        "best": cell.best,
    }


def _results(comparison: Comparison) -> _Table:
    shown = [row for row in comparison.rows if row.kind == "run"]
    metrics = [m for m in HEADS if all(m in row.cells for row in shown)]
    described, first_cells = _describing(comparison)
    return _Table(
        [_MODEL, _SET, *described, *(HEADS[m] for m in metrics), "Δ Accuracy", "p (Holm)"],
        [
            [
                *((text, False) for text in first_cells(row)),
                *(_value(row.cells[m]) for m in metrics),
                (points(row.cells["accuracy"].difference), False),
                (p_value(row.cells["accuracy"].p_holm), False),
            ]
            for row in shown
        ],
        _firsts(shown),
        2 + len(described),
    )


def _at_ratio(comparison: Comparison) -> _Table:
    """Rows of the baselines too: their AUROC and accuracy are what the others are compared with."""
    described, first_cells = _describing(comparison)
    held = {(row.group, row.set_name): row for row in comparison.at_ratio}
    bases = {comparison.baseline_of(row.group) for row in comparison.at_ratio}
    shown = [
        row
        for row in comparison.rows
        if row.kind == "run" and AUROC in row.cells and (row.group in bases or (row.group, row.set_name) in held)
    ]
    return _Table(
        [
            *(_MODEL, _SET, *described, "AUROC", "Δ AUROC", HEADS["yes_ratio"], HEADS["accuracy"]),
            *("Accuracy at the baseline's yes ratio", "Baseline, threshold moved", "Δ control", "p (Holm)"),
        ],
        [
            [
                *((text, False) for text in first_cells(row)),
                *_ratio_cells(row, held.get((row.group, row.set_name))),
            ]
            for row in shown
        ],
        _firsts(shown),
        2 + len(described),
    )


def _ratio_cells(row: Row, at: AtRatio | None) -> list[tuple[str, bool]]:
    own = [_value(row.cells["yes_ratio"]), _value(row.cells["accuracy"])]
    if at is None:
        return [_value(row.cells[AUROC]), (NOTHING, False), *own, *[(NOTHING, False)] * 4]
    return [
        _value(row.cells[AUROC]),
        (points(at.auroc.difference), False),
        *own,
        _value(at.accuracy),
        _value(at.control),
        (points(at.control.difference), False),
        (p_value(at.control.p_holm), False),
    ]


def _describing(comparison: Comparison) -> tuple[list[str], Any]:
    """The columns that describe a group, and a function that gives a row's cells: model, set, and those."""
    several = any(len(group.runs) > 1 for group in comparison.groups)

    def cells(row: Row) -> list[str]:
        group = row.group
        settings = [setting(comparison.setting_of(group, column)) for column in comparison.columns]
        seeds = [str(len(group.runs))] if several else []
        mark = "✓" if group.runs[0].hadpo else "✗"
        return [comparison.name_of(group), row.set_name, mark, *settings, *seeds]

    return [_HADPO, *comparison.columns, *(["Seeds"] if several else [])], cells


def _described(comparison: Comparison, group: Group) -> str:
    """A group in a sentence: 'llava-v1.5-7b (HA-DPO, beta 0.1)'."""
    settings = [(column, comparison.setting_of(group, column)) for column in comparison.columns]
    said = [*(["HA-DPO"] if group.runs[0].hadpo else []), *(f"{c} {setting(v)}" for c, v in settings if v is not None)]
    name = comparison.name_of(group)
    return f"{name} ({', '.join(said)})" if said else name


def _firsts(rows: Sequence[Row]) -> list[int]:
    return [i for i, row in enumerate(rows) if not i or rows[i - 1].group is not row.group]


def _value(cell: Cell) -> tuple[str, bool]:
    return percent(cell.value, cell.deviation), cell.best


def _markdown(table: _Table, notes: Sequence[str]) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [line(map(_piped, table.head)), "|" + "---|" * len(table.head)]
    lines += [line(f"**{text}**" if bold else _piped(text) for text, bold in row) for row in table.rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _piped(text: str) -> str:
    return text.replace("|", "\\|")


def _latex(table: _Table, notes: Sequence[str]) -> str:
    head = " & ".join(map(latex_text, table.head))
    lines = [
        *("% \\usepackage{booktabs}", "% \\usepackage{amssymb}"),
        *(f"% {note}" for note in notes),
        f"\\begin{{tabular}}{{{'l' * table.words}{'r' * (len(table.head) - table.words)}}}",
        *("\\toprule", f"{head} \\\\"),
    ]
    for i, row in enumerate(table.rows):
        cells = (f"\\textbf{{{latex_text(text)}}}" if bold else latex_text(text) for text, bold in row)
        lines += [*(["\\midrule"] if i in table.firsts else []), f"{' & '.join(cells)} \\\\"]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def latex_text(text: str) -> str:
    """Text with LaTeX's own characters escaped; signed numbers in math, where a minus is one."""
    escaped = "".join(_LATEX.get(c, c) for c in text)
    signed = re.sub(r"(?<![\w.+-])[+-]\d[\d.]*", lambda found: f"${found.group()}$", escaped)
    # An optional argument would begin at a '[' right behind the '\\' of the row above.
    return f"{{}}{signed}" if signed.startswith("[") else signed


def _csv_numbers(cell: Cell | None) -> list[Any]:
    if cell is None:
        return [""] * 7
    d = cell.difference
    deviation = "" if cell.deviation is None else _percent(cell.deviation)
    compared = [""] * 4 if d is None else [_percent(d.value), _percent(d.low), _percent(d.high), d.p]
    return [_percent(cell.value), deviation, *compared, "" if cell.p_holm is None else cell.p_holm]


def _percent(value: float) -> float:
    return round(100 * value, 6)


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
