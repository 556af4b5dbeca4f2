"""A comparison of POPE runs for TensorBoard's HPARAMS tab: what the runs differ in, against what they score."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import UserError, note
from llava.files import atomic_folder

if TYPE_CHECKING:
    from llava.eval.comparison import Comparison
    from llava.eval.evaluated import Run

METRICS = ("accuracy", "f1", "yes_ratio")
SUFFIX = ".hparams"  # of the event files' names, by which an earlier call's are known

Value = bool | float | str


def write_hparams(folder: Path, comparison: Comparison) -> None:
    """Event files: the experiment in ``folder`` and one sub-folder for every run; ``tensorboard --logdir FOLDER``.

    Hyperparameters are ``comparison.columns`` and ``seed`` (a run without one of them has none of that name); metrics
    are ``SET/accuracy``, ``SET/f1``, ``SET/yes_ratio`` and ``mean/...`` as fractions. What an earlier call wrote there
    is replaced, all at once. Where tensorboard is not installed: one note, and nothing is written.

    Raises:
        UserError: ``folder`` holds files that are not of this function.
    """
    others = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != SUFFIX]
    if others:
        raise UserError(f"{folder}: holds {others[0].name}, which no report wrote; choose another --out")
    try:
        from tensorboard.plugins.hparams import summary_v2 as summary
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    except ImportError as error:
        note(f"no {folder.name}/ for TensorBoard's HPARAMS tab: {error}; pip install -r requirements.txt")
        return
    runs = [run for group in comparison.groups for run in group.runs]
    settings = _settings(comparison)
    sets = {name for run in runs for name in run.sets}
    scores = [_scores(run, len(sets)) for run in runs]
    hparams = [summary.HParam(name, _domain(summary, name, settings)) for name in [*comparison.columns, "seed"]]
    tags = list(dict.fromkeys(tag for one in scores for tag in one))
    with atomic_folder(folder) as temporary:
        experiment = summary.hparams_config_pb(hparams, [summary.Metric(tag, display_name=tag) for tag in tags])
        _write(temporary, [experiment])
        for name, chosen, scored in zip(_folders(runs), settings, scores, strict=True):
            session = summary.hparams_pb(chosen, trial_id=name)
            _write(temporary / name, [session, *(scalar_pb(tag, value) for tag, value in scored.items())])


def _write(folder: Path, summaries: list[Any]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for summary in summaries:
        event = Event(step=0)
        event.summary.CopyFrom(summary)
        writer.add_event(event)
    writer.close()


def _folders(runs: list[Run]) -> list[str]:
    """A folder's name for every run: one level, and no two the same."""
    names: list[str] = []
    for run in runs:
        name = re.sub(r"[^\w.=+-]", "_", run.name).lstrip(".") or "run"
        while name in names:
            name += "_"
        names.append(name)
    return names


def _scores(run: Run, sets: int) -> dict[str, float]:
    """Metrics by tag; a mean only of a run that has answered all ``sets`` sets, as others would not compare."""
    counts = {name: answers.confusion() for name, answers in run.sets.items()}
    scores = {f"{name}/{metric}": getattr(c, metric) for name, c in counts.items() for metric in METRICS}
    if len(counts) == sets > 1:
        for metric in METRICS:
            scores[f"mean/{metric}"] = sum(getattr(c, metric) for c in counts.values()) / len(counts)
    return scores


def _settings(comparison: Comparison) -> list[dict[str, Value]]:
    """The hyperparameters of every run: one kind of value each, as the tab cannot sort mixed ones."""
    runs = [(group, run) for group in comparison.groups for run in group.runs]
    found: list[dict[str, Value]] = [{} for _ in runs]
    for name in [*comparison.columns, "seed"]:
        values = [run.seed if name == "seed" else group.settings.get(name) for group, run in runs]
        held = [value for value in values if value is not None]
        as_is = all(isinstance(value, bool) for value in held) or all(_is_number(value) for value in held)
        for chosen, value in zip(found, values, strict=True):
            if value is not None:
                chosen[name] = value if as_is or isinstance(value, str) else json.dumps(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _domain(summary: Any, name: str, settings: list[dict[str, Value]]) -> Any:
    """An interval for numbers, the values themselves for the rest: the tab offers them as filters."""
    values = [chosen[name] for chosen in settings if name in chosen]
    if not values:
        return None
    if _is_number(values[0]):
        return summary.RealInterval(float(min(values)), float(max(values)))
    return summary.Discrete(sorted(set(values)))
