"""``python -m llava.eval.report``: POPE runs side by side, as a table one can publish, and what belongs to it.

    python -m llava.eval.report checkpoints/sweeps/beta --out report     # table.md, .csv, .tex, report.html, plots
    python -m llava.eval.report --check paper.tex                        # rows of a POPE table that cannot be
    python -m llava.eval.report --rerun checkpoints/sweeps/beta/RUN      # the command that makes a run again

It needs no GPU and no torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.command_line import OneLineParser
from llava.errors import UserError, command_line, note

if TYPE_CHECKING:
    from llava.eval.comparison import Comparison, ObjectRow
    from llava.eval.evaluated import Group

DEFAULTS = {"out": "report", "metric": "accuracy", "bootstrap": 10_000, "seed": 0, "questions": 3000}
SELECTABLE = ("accuracy", "precision", "recall", "f1", "auroc")
FOUND = 1  # exit code of --check with findings

REPORT_FLAGS = ("out", "baseline", "labels", "select_on", "metric", "bootstrap", "seed", "no_plots")

RATIO_TITLE = "Better, or only more reluctant to say yes?"
DEV_TITLE = "Development set"


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m llava.eval.report",
        description="Compare POPE runs; check a table of others; tell how a run was made.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="trained models, folders of POPE answers, or folders above them")
    add("--out", help="where the report is written (default: report)")
    add("--baseline", metavar="FOLDER_OR_NAME", help="the run others are compared with (default: the untrained model)")
    add("--labels", metavar="DIR", help="the label files, where they no longer lie where the questions were asked")
    add("--select-on", choices=["dev"], help="choose the best run on its development set, and show only its test rows")
    add("--metric", choices=SELECTABLE, help="what --select-on goes by (default: accuracy)")
    add("--bootstrap", type=int, metavar="N", help="resamples of the pictures (default: 10000)")
    add("--seed", type=int, help="of the resamples (default: 0)")
    add("--no-plots", action="store_true", default=None, help="write no figures")
    add("--check", metavar="FILE", help="rows of a results table (Markdown, CSV, LaTeX) that no counts can give")
    add("--questions", type=int, metavar="N", help="questions a set in --check's table (default: 3000)")
    add("--rerun", metavar="DIR", help="print the command that makes this run again")
    return parser.parse()


@command_line
def main() -> None:
    args = parse_args()
    _refuse_mixed(args)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.check:
        _check(args)
    elif args.rerun:
        from llava.eval.rerun import rerun
        from llava.files import existing

        print(rerun(existing(args.rerun, "--rerun", directory=True)))
    else:
        _report(args)


def _refuse_mixed(args: argparse.Namespace) -> None:
    """Three modes: what has no meaning in one is refused."""
    modes = [f"--{name}" for name in ("check", "rerun") if getattr(args, name)]
    if args.folders:
        modes.append("FOLDER")
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} are different things to do; start one at a time")
    if not modes:
        raise UserError("which runs? Pass the folders of trained models or of POPE answers; --help lists the flags")
    flags = {"FOLDER": REPORT_FLAGS, "--check": ("questions",), "--rerun": ()}[modes[0]]
    for name in (*REPORT_FLAGS, "questions"):
        if name not in flags and getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no meaning with {modes[0]}; leave it out")
    if args.metric is not None and args.select_on is None:
        raise UserError("--metric says what to choose by: pass --select-on dev with it")
    for name, least in (("bootstrap", 1), ("seed", 0), ("questions", 2)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: expected {least} or more")


def _check(args: argparse.Namespace) -> None:
    from llava.eval.check_table import check
    from llava.files import existing

    findings = check(existing(args.check, "--check"), args.questions)
    print(*findings, sep="\n", end="\n" if findings else "")
    count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
    note(f"{args.check}: {count if findings else 'nothing that cannot be'}")
    if findings:
        sys.exit(FOUND)


@dataclass(frozen=True)
class _Selection:
    """What the development set has decided: the chosen group, its lines for the notes, and the table of all groups."""

    group: Group
    lines: list[str]
    table: Comparison
    content: dict[str, Any]


def _report(args: argparse.Namespace) -> None:
    from llava.eval.comparison import baseline_for, compare, find_baseline
    from llava.eval.evaluated import grouped, read_runs

    out = Path(args.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {args.out}: expected a folder, and this is a file")
    folders = [Path(folder).expanduser() for folder in args.folders]
    groups = grouped(read_runs(folders, None if args.labels is None else Path(args.labels).expanduser()))
    baseline = find_baseline(groups, args.baseline) if args.baseline else None
    selection = None
    if args.select_on:
        selection = _select(groups, baseline, args)
        chosen = selection.group
        base = baseline or baseline_for(chosen, groups)
        groups = [chosen] if base is None or base is chosen else [base, chosen]
        for run in (run for group in groups for run in group.runs):
            if not run.sets:
                raise UserError(f"{run.folder} has no answers to the test questions; ask it with pope_eval.py first")
    else:
        groups = _with_test_answers(groups)
        if baseline is not None and baseline not in groups:
            raise UserError(f"--baseline {args.baseline}: has no answers to the test questions; ask with pope_eval.py")
    comparison = compare(groups, baseline, args.bootstrap, args.seed)
    if selection:
        comparison.notes[:0] = selection.lines
    comparison.notes.extend(_failures(folders))
    try:
        _write(out, comparison, selection, plots=not args.no_plots)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.filename or out} cannot be written: {error.strerror}") from None


def _with_test_answers(groups: list[Group]) -> list[Group]:
    tested = [group for group in groups if any(run.sets for run in group.runs)]
    for group in groups:
        if group not in tested:
            note(f"{group.runs[0].folder} has no answers to the test questions; it is left out")
    if not tested:
        raise UserError(f"{groups[0].runs[0].folder}: no run has answers to the test questions; ask with pope_eval.py")
    return tested


def _select(groups: list[Group], baseline: Group | None, args: argparse.Namespace) -> _Selection:
    from llava.eval import results_table
    from llava.eval.comparison import baseline_for, compare, on_dev, rank_on_dev

    ranked = rank_on_dev([group for group in groups if group is not baseline], args.metric)
    chosen, value = ranked[0]
    on = {group: on_dev(group) for group in groups if all(run.dev for run in group.runs)}
    base = baseline or baseline_for(chosen, groups)
    table = compare(list(on.values()), on.get(base), args.bootstrap, args.seed)
    name = table.name_of(on[chosen])
    folders = ", ".join(str(run.folder) for run in chosen.runs)
    by = f"mean {args.metric} {results_table.percent(value)}"
    if len(ranked) > 1:
        after, next_value = ranked[1]
        by += f", {100 * (value - next_value):.2f} points over the next, {after.runs[0].folder}"
    settings = {column: table.setting_of(on[chosen], column) for column in table.columns}
    described = ", ".join(f"{column} {results_table.setting(held)}" for column, held in settings.items())
    lines = [f"Chosen on the development set among {len(ranked)}: {name} ({described or folders}): {by}."]
    content = {
        **results_table.group_dict(chosen),
        "metric": args.metric,
        "value": value,
        "next": ranked[1][1] if len(ranked) > 1 else None,
        "differing": settings,
        "folders": [str(run.folder) for run in chosen.runs],
    }
    return _Selection(chosen, lines, table, content)


def _failures(folders: Sequence[Path]) -> list[str]:
    """What a sweep says of its runs that failed; it gives the folders of the others, which lie beside the file."""
    places = dict.fromkeys(place.resolve() for folder in folders for place in (folder, folder.parent))
    found = [place / "failed.md" for place in places if (place / "failed.md").is_file()]
    lines = [line.strip() for file in found for line in file.read_text("utf-8", errors="replace").splitlines()]
    return [f"Failed: {line.removeprefix('- ')}" for line in lines if line.startswith("- ")]


def _write(out: Path, comparison: Comparison, selection: _Selection | None, plots: bool) -> None:
    from llava.eval import results_table as tables
    from llava.eval.diagnostics import read_diagnostics
    from llava.eval.hparams import write_hparams
    from llava.eval.page import write_page
    from llava.eval.plots import remove_others, shown_flips, write_plots
    from llava.files import write_json

    results, reluctance = tables.markdown(comparison), tables.ratio_markdown(comparison)
    development = tables.markdown(selection.table) if selection else ""
    text = "\n".join(
        [
            *([f"## {DEV_TITLE}\n\n{development}\n## Test sets\n"] if selection else []),
            results,
            *([f"## {RATIO_TITLE}\n\n{reluctance}"] if reluctance else []),
        ]
    )
    print(text, end="", flush=True)
    objects = _objects(comparison)
    worst = _worst(objects)
    runs = [run for group in comparison.groups for run in group.runs]
    diagnostics = {run.name: held for run in runs if (held := read_diagnostics(run.answers))}
    _write_text(out / "table.md", text)
    _write_text(out / "table.csv", tables.csv_text(comparison))
    _write_text(out / "table.tex", tables.latex(comparison))
    _write_text(out / "objects.csv", tables.objects_csv(objects.items()))
    write_json(out / "report.json", _content(comparison, selection, worst))
    drawn = write_plots(out / "plots", comparison, runs, diagnostics) if plots else []
    remove_others(out / "plots", drawn)
    write_page(
        out / "report.html",
        comparison,
        drawn,
        results=results,
        reluctance=reluctance,
        development=development,
        flips=shown_flips(comparison, diagnostics),
        objects=worst,
    )
    write_hparams(out / "tensorboard", comparison)
    note(f"the report is in {out} (report.html, table.md, table.csv, table.tex, objects.csv, report.json)")


def _write_text(file: Path, text: str) -> None:
    from llava.files import atomic_write

    with atomic_write(file) as opened:
        opened.write(text)


def _objects(comparison: Comparison) -> dict[str, list[ObjectRow]]:
    """Objects of every trained group that is not itself what others are compared with, by its first run's name."""
    from llava.eval.comparison import objects_of

    pairs = list(zip(comparison.groups, comparison.baselines, strict=True))
    bases = {base for group, base in pairs if base is not group}
    return {
        group.runs[0].name: objects_of(group, base)
        for group, base in pairs
        if group.runs[0].training is not None and group not in bases
    }


def _worst(objects: dict[str, list[ObjectRow]]) -> dict[str, list[ObjectRow]]:
    from llava.eval.comparison import worst

    return {name: worst(rows) for name, rows in objects.items()}


def _content(
    comparison: Comparison, selection: _Selection | None, objects: dict[str, list[ObjectRow]]
) -> dict[str, Any]:
    from llava.eval import results_table as tables
    from llava.run_card import git_state

    git = git_state()
    return {
        "command": shlex.join(sys.orig_argv),
        "working_directory": str(Path.cwd()),
        "commit": git["commit"] if git else None,
        **tables.as_dict(comparison),
        "objects": {name: [tables.object_dict(row) for row in rows] for name, rows in objects.items()},
        "development": tables.as_dict(selection.table) if selection else None,
        "selected": selection.content if selection else None,
    }


if __name__ == "__main__":
    main()
