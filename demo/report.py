"""The demo's page: one HTML file with its table, curves and pictures in it; it needs no network and no script."""

from __future__ import annotations

import base64
import math
import re
from decimal import Decimal
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from llava.eval.pope import Confusion, parse_answer, set_of, table_header, table_row
from llava.files import atomic_write

BEFORE, AFTER = "\u2717", "\u2713"  # in the HA-DPO column
TEMPLATE = Path(__file__).with_name("report_template.html")
SIDE = 1000  # of a curve's drawing, which the page stretches to the width it has

Row = tuple[str, str, str, Confusion]


class Shown(NamedTuple):
    """A test picture with a question, its label and what the model said before and after DPO."""

    picture: Path
    question: str
    label: str
    before: str
    after: str


class Curve(NamedTuple):
    """One logged value over optimizer steps."""

    title: str
    name: str
    steps: list[float]
    values: list[float]


def write_report(
    target: Path,
    *,
    rows: list[Row],
    curves: list[Curve],
    shown: list[Shown],
    times: dict[str, float],
    facts: list[tuple[str, str]],
) -> None:
    """The page, whole or not at all.

    ``rows`` are (model, set, HA-DPO mark, counts) with one adversarial row of either mark; ``times`` are seconds.
    """
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        results=_results(rows),
        sentence=_sentence(rows),
        curves="\n".join(map(_curve, curves)),
        note=_note(shown),
        pictures="\n".join(map(_card, shown)),
        times=_times(times),
        facts="\n".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in facts),
    )
    with atomic_write(target) as file:
        file.write(page)


def _cells(line: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _results(rows: list[Row]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in _cells(table_header().splitlines()[0]))
    lines = [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in _cells(table_row(*row)))
        lines.append(f"""<tr{' class="after"' if row[2] == AFTER else ""}>{cells}</tr>""")
    return "\n".join([*lines, "</tbody>"])


def _sentence(rows: list[Row]) -> str:
    """What became of the adversarial set; differences of the table's own rounded numbers."""
    before, after = (
        next(row for row in rows if set_of(row[1]) == "adversarial" and row[2] == mark) for mark in (BEFORE, AFTER)
    )
    (accuracy, yes), (new_accuracy, new_yes) = (
        (Decimal(cells[3]), Decimal(cells[7])) for cells in (_cells(table_row(*row)) for row in (before, after))
    )
    c = before[3]
    right = 100 * (c.tp + c.fn) / max(1, c.tp + c.fn + c.fp + c.tn)
    return (
        f"On the adversarial questions, accuracy {_change(accuracy, new_accuracy)} and the yes ratio "
        f"{_change(yes, new_yes)}; yes is the right answer to {right:.4g}% of them."
    )


def _change(before: Decimal, after: Decimal) -> str:
    if before == after:
        return f"stayed at {before}%"
    verb = "rose" if after > before else "fell"
    return f"{verb} by <strong>{abs(after - before)} percentage points</strong> (from {before}% to {after}%)"


def _curve(curve: Curve) -> str:
    title = escape(curve.title)
    logged = list(zip(curve.steps, curve.values, strict=True))
    points = [(step, value) for step, value in logged if math.isfinite(step) and math.isfinite(value)]
    missing = f", {len(logged) - len(points)} without a finite value left out" if len(points) < len(logged) else ""
    if not points:
        body = f"<p>No values logged{missing}.</p>"
    elif len(points) == 1:
        body = f"<p>No curve: one value logged, {points[0][1]:.4g} at step {points[0][0]:g}{missing}.</p>"
    else:
        body = _chart(curve.name, points, missing)
    return f'<figure class="card"><figcaption>{title}</figcaption>\n{body}</figure>'


def _chart(name: str, points: list[tuple[float, float]], missing: str) -> str:
    steps, values = zip(*points, strict=True)
    levels = ticks(min(values), max(values))
    low, high, end = levels[0], levels[-1], max(*steps, 1)
    across = [step for step in ticks(0, end, 5) if step <= end and step == round(step)]

    def x(step: float) -> float:
        return SIDE * step / end

    def y(value: float) -> float:
        return SIDE * (high - value) / (high - low)

    line = " ".join(f"{x(step):.2f},{y(value):.2f}" for step, value in points)
    grid = "".join(
        f'<path class="{"zero" if level == 0 else "grid"}" d="M0 {y(level):.2f}H{SIDE}"/>' for level in levels
    )
    left = "".join(f'<span style="top:{y(v) / SIDE:.2%}">{_number(v, levels[1] - low)}</span>' for v in levels)
    below = "".join(f'<span style="left:{x(v) / SIDE:.2%}">{v:,.0f}</span>' for v in across)
    (step, value) = points[-1]
    said = f"{name}: {points[0][1]:.4g} at step {points[0][0]:g}, {value:.4g} at step {step:g}"
    return f"""<div class="chart" role="img" aria-label="{escape(said)}">
<span class="unit">{escape(name)}</span>
<div class="y">{left}</div>
<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">{grid}
<polyline class="line" points="{line}"/><path class="dot" d="M{x(step):.2f} {y(value):.2f}h0"/></svg>
<div class="last"><span style="top:{y(value) / SIDE:.2%}">{_number(value)}</span></div>
<div class="x">{below}</div>
<span class="axis">optimizer step{missing}</span>
</div>"""


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from at or below ``low`` to at or above ``high``."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [n * step for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _number(value: float, step: float | None = None) -> str:
    """A tick's label, with the decimals that tell it from the next ``step``; without one, three digits."""
    if step:
        text = f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "\u2212")


def _note(shown: list[Shown]) -> str:
    turned = sum(parse_answer(one.before) != parse_answer(one.after) for one in shown)
    return (
        f"Drawn by lot from the adversarial questions: {turned} that the model answers the other way after DPO, "
        f"{len(shown) - turned} that it does not. The table above counts all questions. Answers are read as "
        "POPE reads them: no, if the first sentence says no or not; otherwise yes."
    )


def _card(one: Shown) -> str:
    picture = base64.b64encode(one.picture.read_bytes()).decode()
    answers = "\n".join(
        f"<dt>{when} DPO {_verdict(answer, one.label)}</dt><dd>{escape(answer)}</dd>"
        for when, answer in (("Before", one.before), ("After", one.after))
    )
    return f"""<article class="card">
<img alt="Test picture {escape(one.picture.name)}" src="data:image/jpeg;base64,{picture}">
<div><h3>{escape(one.question)}</h3>
<dl><dt class="label">Label</dt> <dd class="label">{escape(one.label)}</dd>
{answers}</dl></div></article>"""


def _verdict(answer: str, label: str) -> str:
    mark, word = ("\u2713", "right") if parse_answer(answer) == label else ("\u2717", "wrong")
    return f'<span class="verdict {word}">{mark} {word}</span>'


def _times(times: dict[str, float]) -> str:
    lines = [f'<tr><th scope="row">{escape(step)}</th><td>{value:.1f} s</td></tr>' for step, value in times.items()]
    minutes, seconds = divmod(round(sum(times.values())), 60)
    total = f'<tr><th scope="row">Total</th><td>{minutes} min {seconds} s</td></tr>'
    return "\n".join(["<tbody>", *lines, f"</tbody><tfoot>{total}</tfoot>"])
