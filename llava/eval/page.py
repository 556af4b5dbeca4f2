"""A comparison of POPE runs as one HTML file with its tables and pictures in it; it needs no network and no script."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from llava.eval.plots import ABOUT_MAPS, changed, views
from llava.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

    from llava.eval.comparison import Comparison, ObjectRow
    from llava.eval.evaluated import Run
    from llava.eval.plots import Flip, Plot
    from llava.eval.pope import Confusion

TEMPLATE = Path(__file__).with_name("page_template.html")
SIDE = 320  # pixels of a picture's longer side
WIDE = 700  # pixels of a figure that a phone shows by parts
LONG = 28  # characters
NOTHING = "–"


def write_page(
    file: Path,
    comparison: Comparison,
    plots: Sequence[Plot],
    *,
    results: str,
    reluctance: str = "",
    development: str = "",
    flips: Mapping[str, Sequence[Flip]] | None = None,
    objects: Mapping[str, Sequence[ObjectRow]] | None = None,
) -> None:
    """``report.html``, whole or not at all.

    ``results``, ``reluctance`` and ``development`` are the very Markdown that table.md holds (tables, and lines of text
    between them; ``**bold**``), so that the page cannot differ from it; an empty one has no section. ``flips``
    (``plots.shown_flips``) and ``objects`` (the worst rows of ``comparison.by_object``) are by name of the run.
    """
    runs = {run.name: run for group in comparison.groups for run in group.runs}

    def figures(section: str) -> str:
        return "".join(_figure(plot) for plot in plots if plot.section == section)

    sections = [
        _section("Development set", _markdown(development)) if development else "",
        _section("Results", _markdown(results) + _plots(figures("results"))),
        _section("Better, or only more reluctant?", _markdown(reluctance) + _plots(figures("reluctance"))),
        _section("Inside the models", _plots(figures("diagnostics"))),
        # Without the figures of section flips, which are for print: the same answers stand here as text.
        _section("Answers that changed", _changed(comparison, runs, flips or {})),
        _section("Objects", _objects(objects or {})),
        _section("How it was made", _made(comparison)),
    ]
    count = len(comparison.groups)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=f"POPE: {count} model{'s' if count > 1 else ''} compared" if count != 1 else "POPE: one model",
        lead=_lead(comparison),
        sections="\n".join(section for section in sections if section),
    )
    with atomic_write(file) as out:
        out.write(page)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>" if body else ""


def _lead(comparison: Comparison) -> str:
    runs = [run for group in comparison.groups for run in group.runs]
    sets = {name: answers for run in runs for name, answers in run.sets.items()}
    pictures = {str(image) for answers in sets.values() for image in answers.images}
    asked = "; ".join(f"{len(answers.ids):,} {name}" for name, answers in sets.items())
    base = comparison.baseline
    against = f" Differences are to {escape(base.runs[0].name)}." if base is not None else ""
    return (
        f"“Is there a … in the image?” asked about {len(pictures):,} pictures ({escape(asked)} questions). "
        f"Yes is the positive class.{against}"
    )


# Markdown


def _markdown(text: str) -> str:
    """Tables, lists and lines of a Markdown text as HTML."""
    blocks = []
    for kind, group in groupby(text.splitlines(), _kind):
        lines = list(group)
        if kind == "table":
            blocks.append(_table([_cells(line) for line in lines]))
        elif kind == "item":
            items = "".join(f"<li>{_inline(line.strip()[2:])}</li>\n" for line in lines)
            blocks.append(f'<ul class="notes">\n{items}</ul>\n')
        elif kind == "head":
            blocks.extend(f"<h3>{_inline(line.lstrip('# '))}</h3>\n" for line in lines)
        elif kind == "text":
            blocks.append(f"<p>{_inline(' '.join(lines))}</p>\n")
    return "".join(blocks)


def _kind(line: str) -> str:
    start = line.strip()
    kinds = {"|": "table", "-": "item", "*": "item" if start.startswith("* ") else "text", "#": "head"}
    return kinds.get(start[:1], "text") if start else ""


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def _inline(text: str) -> str:
    """Escaped text with ``**bold**`` and `code`."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _table(lines: list[list[str]]) -> str:
    """A table of cells, the second line being Markdown's rule. What describes a row is left, numbers are right.

    Where there are sets, a group of rows begins where anything else that describes them changes.
    """
    head, rows = lines[0], lines[2:]
    words = [not all(_is_number(row[n]) for row in rows if n < len(row)) for n in range(len(head))]
    sets = [name.lower() == "set" for name in head]

    def described(row: list[str]) -> list[str]:
        return [cell for cell, word, of_set in zip(row, words, sets, strict=False) if word and not of_set]

    def cells(tag: str, row: list[str]) -> str:
        return "".join(
            f"<{tag}{_class_of(text, word)}>{_inline(text)}</{tag}>" for word, text in zip(words, row, strict=False)
        )

    body = []
    for place, row in enumerate(rows):
        begins = any(sets) and place > 0 and described(row) != described(rows[place - 1])
        body.append(f"{_FIRST if begins else '<tr>'}{cells('td', row)}</tr>\n")
    top = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f'<div class="box">\n<table>\n{top}\n<tbody>\n{"".join(body)}</tbody>\n</table>\n</div>\n'


_FIRST = '<tr class="first">'


def _class_of(text: str, word: bool) -> str:
    """Numbers stay on one line, and so do words but for long ones: paths."""
    if not word:
        return ' class="number"'
    return ' class="long"' if len(text) > LONG else ""


def _is_number(text: str) -> bool:
    """Whether a cell holds a figure, with its interval or deviation, or the dash of one that is not there."""
    return re.fullmatch(r"[-–−]|[-+−<≥≤]?\s?\d[\d.,e+\-−±%\s\[\]]*", text.strip("*")) is not None


# Figures


def _plots(figures: str) -> str:
    return f'<div class="plots">\n{figures}</div>\n' if figures else ""


def _figure(plot: Plot) -> str:
    picture = plot.png.read_bytes()
    width = int.from_bytes(picture[16:20], "big")  # of a PNG's header
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return f"""<figure class="card">
<figcaption><strong>{escape(plot.title)}</strong></figcaption>
<div class="scroll"><img{' class="wide"' if width > WIDE else ""} alt="{escape(plot.title)}" src="{source}"></div>
<figcaption class="below">{escape(plot.caption)} For print: {escape(plot.pdf.name)}.</figcaption>
</figure>
"""


# Answers that changed


def _changed(comparison: Comparison, runs: Mapping[str, Run], flips: Mapping[str, Sequence[Flip]]) -> str:
    parts = []
    for name, shown in flips.items():
        group = next(group for group in comparison.groups if runs[name] in group.runs)
        base = comparison.baseline_of(group)
        if base is None:
            continue
        before = base.runs[0]
        counts = changed(before, runs[name])
        told = "; ".join(
            f"{set_name}: {fixed:,} fixed and {broken:,} broken of {questions:,}"
            for set_name, (fixed, broken, questions) in counts.items()
        )
        parts.append(f"<h3>{escape(name)} against {escape(before.name)}</h3>\n<p>{escape(told)}.</p>\n")
        for title, fixed in (("Fixed", True), ("Broken", False)):
            own = [flip for flip in shown if flip.fixed == fixed]
            if own:
                maps = any(flip.map_tuned is not None or flip.map_block is not None for flip in own)
                cards = "".join(map(_card, own))
                parts.append(f'<h3>{title}</h3>\n<div class="flips{" maps" if maps else ""}">\n{cards}</div>\n')
    if not parts:
        return ""
    maps = any(flip.map_tuned is not None for shown in flips.values() for flip in shown)
    note = (
        "The first of them in the order of the label files, adversarial questions before others and one to a picture. "
        "Answers are read as POPE reads them: no, if the first sentence says no or not; otherwise yes."
    )
    return f"<p>{note}{f' {escape(ABOUT_MAPS)}' if maps else ''}</p>\n{''.join(parts)}"


def _card(flip: Flip) -> str:
    shown = views(flip)
    named = len(shown) > 1
    pictures = "".join(
        f'<div>{escape(name) if named else ""}<img alt="{escape(name)}" src="{_jpeg(picture)}"></div>'
        for name, picture in shown.items()
    )
    marks = (("✗ wrong", "wrong"), ("✓ right", "right"))
    first, second = marks if flip.fixed else marks[::-1]
    return f"""<article class="card">
<div class="views">{pictures}</div>
<div class="said"><h4>{escape(flip.question)}</h4>
<dl><dt>Label: {escape(flip.label)} · {escape(flip.set_name)} · {escape(flip.image)}</dt>
<dt>Before <span class="{first[1]}">{first[0]}</span></dt><dd>{escape(flip.before)}</dd>
<dt>After <span class="{second[1]}">{second[0]}</span></dt><dd>{escape(flip.after)}</dd></dl></div></article>
"""


def _jpeg(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


# Objects


def _objects(objects: Mapping[str, Sequence[ObjectRow]]) -> str:
    head = [
        *("Object", "Questions", "Accuracy before", "Accuracy", "Yes ratio before", "Yes ratio"),
        *("False yes before", "False yes"),
    ]
    parts = []
    for name, rows in objects.items():
        if rows:
            cells = [[row.object, f"{row.questions:,}", *_object_cells(row.base, row.tuned)] for row in rows]
            parts.append(f"<h3>{escape(name)}: objects it does worst on</h3>\n{_table([head, [], *cells])}")
    return "".join(parts)


def _object_cells(base: Confusion | None, tuned: Confusion) -> Iterable[str]:
    for metric in ("accuracy", "yes_ratio"):
        for counts in (base, tuned):
            yield NOTHING if counts is None else f"{100 * getattr(counts, metric):.2f}"
    for counts in (base, tuned):
        yield NOTHING if counts is None else f"{counts.fp:,.4g}"


# How it was made


def _made(comparison: Comparison) -> str:
    """What all runs have in common, and by run the commands and what they read."""
    runs = [run for group in comparison.groups for run in group.runs]
    cards = [card for run in runs for card in (run.training, run.card) if card]
    facts = [
        ("Label files (SHA-256)", sorted({f"{s.labels_file.name} {s.sha256}" for r in runs for s in r.sets.values()})),
        ("Code", sorted({text for card in cards if (text := _code(card))})),
        ("Versions", sorted({text for card in cards if (text := _versions(card))})),
        ("Machine", sorted({text for card in cards if (text := _machine(card))})),
    ]
    return f'<dl class="card facts">\n{_facts(facts)}</dl>\n' + "".join(map(_details, runs))


def _facts(facts: Iterable[tuple[str, Sequence[str]]]) -> str:
    return "".join(
        f"<dt>{escape(label)}</dt>" + "".join(f"<dd>{escape(value)}</dd>" for value in values) + "\n"
        for label, values in facts
        if values
    )


def _code(card: Mapping[str, Any]) -> str:
    git = card.get("git") or {}
    return f"commit {git['commit']}{' and uncommitted changes' if git.get('diff') else ''}" if "commit" in git else ""


def _versions(card: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in (card.get("versions") or {}).items())


def _machine(card: Mapping[str, Any]) -> str:
    hardware = card.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    cards = ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    return f"{hardware.get('platform')}, {hardware.get('cpus')} CPUs, {cards}" if hardware else ""


def _details(run: Run) -> str:
    facts = [
        ("Folder", [str(run.folder)]),
        ("Seed", [] if run.seed is None else [str(run.seed)]),
        ("Trained", _started(run.training)),
        ("Asked", _started(run.card)),
        ("Training data (SHA-256)", _data(run.training)),
    ]
    commands = [card["command"] for card in (run.training, run.card) if card and card.get("command")]
    shown = "".join(f"<p><code>{escape(command)}</code></p>\n" for command in commands)
    return (
        f'<details class="card"><summary>{escape(run.name)}</summary>\n<dl>\n{_facts(facts)}</dl>\n{shown}</details>\n'
    )


def _started(card: Mapping[str, Any] | None) -> list[str]:
    """When, how long, and in which processes."""
    if not card:
        return []
    seconds = card.get("wall_time_s")
    world = (card.get("hardware") or {}).get("world_size")
    parts = [card.get("started"), f"{seconds:,.0f} s" if seconds is not None else None]
    parts.append(f"{world} processes" if world and world > 1 else None)
    return [", ".join(part for part in parts if part)]


def _data(card: Mapping[str, Any] | None) -> list[str]:
    return [f"{path} {file.get('sha256')}" for path, file in ((card or {}).get("data") or {}).items()]
