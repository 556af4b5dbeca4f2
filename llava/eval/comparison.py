"""Groups of runs compared: values, deviations over seeds, differences to a baseline, and who is told apart from whom.

Every model is resampled with the same draws of pictures (paired bootstrap), all questions of a picture together, so a
difference is not blurred by which pictures happen to be hard, and the mean over sets is resampled jointly.

Numbers here are fractions; ``results_table`` writes percent. Free of torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava.errors import UserError
from llava.eval.evaluated import ASKED, DEV, POPE, Group, Run, SetAnswers, differing
from llava.eval.pope import SETS, Confusion
from llava.eval.pope_questions import same_picture
from llava.eval.statistics import (
    METRICS,
    Bootstrap,
    Interval,
    auroc,
    holm,
    image_counts,
    interval,
    mean_deviation,
    metrics,
    said_at_ratio,
)

MEAN = "mean"  # the row over a group's sets
AUROC = "auroc"
IN_COMPETITION = ("accuracy", "precision", "recall", "f1", AUROC)  # of a yes ratio, more is not better
TOLD_APART = 0.05

_OBJECT = re.compile(r"Is there an? (.+?) in the (?:image|imange)\?", re.IGNORECASE)
_DRAWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Cell:
    """One number of a row, a fraction.

    ``value`` is the mean over the group's seeds and ``deviation`` their sample deviation (None for one seed).
    ``difference`` is group - baseline with its 95% interval and uncorrected p (None for the baseline itself, and where
    there is nothing to compare with). ``p_holm`` is that p corrected over its metric's family. ``best``: the largest of
    its set, told apart from every other group.
    """

    value: float
    deviation: float | None = None
    difference: Interval | None = None
    p_holm: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A group in one set (``set_name`` "mean": over its sets), cells by metric (METRICS, and "auroc" with scores).

    ``kind`` "control": the group's baseline with its threshold moved to the group's yes ratio. The values are then the
    baseline's, and ``difference`` is group - control; no "auroc", which no threshold changes.
    """

    group: Group
    set_name: str
    cells: dict[str, Cell]
    kind: str = "run"


@dataclass(frozen=True)
class AtRatio:
    """Better, or only more reluctant to say yes? One group against its baseline in one set; needs scores of both.

    ``auroc`` has the difference to the baseline. ``accuracy`` is that of the group's scores with a threshold at which
    it says yes as often as the baseline, and its ``difference`` is to the baseline's own accuracy. ``control`` is the
    baseline's accuracy at the group's yes ratio, with ``difference`` group - control. ``verdict`` stands in one row a
    group (the mean, or its only set): "better" or "worse" where the interval of that difference leaves out zero and its
    p, corrected by Holm, is below 0.05, else "same"; None in the other rows.
    """

    group: Group
    set_name: str
    auroc: Cell
    accuracy: Cell
    control: Cell
    verdict: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What the tables show.

    ``groups`` are in the table's order, and ``baselines`` in the same: what each is compared with, None for nothing; a
    baseline's own entry is itself. ``names`` is each group's Model cell. ``rows`` are by group, then set, those of kind
    "run" first; ``columns`` are the settings in which the groups differ; ``notes`` are sentences for below the table.
    ``pictures`` were resampled ``times`` times with ``seed``. ``begun_from`` are the groups that others' training began
    from: how they were themselves trained is no setting of this comparison.
    """

    groups: list[Group]
    baselines: list[Group | None]
    names: list[str]
    rows: list[Row]
    columns: list[str]
    notes: list[str]
    at_ratio: list[AtRatio]
    pictures: int
    times: int
    seed: int
    begun_from: frozenset[Group] = frozenset()

    @property
    def baseline(self) -> Group | None:
        """The baseline, where all groups that have one have the same."""
        found = {group for group in self.baselines if group is not None}
        return next(iter(found)) if len(found) == 1 else None

    def baseline_of(self, group: Group) -> Group | None:
        """What a group of this comparison is compared with; itself for a baseline, None for nothing."""
        return self.baselines[self.groups.index(group)]

    def name_of(self, group: Group) -> str:
        """The Model cell of a group of this comparison."""
        return self.names[self.groups.index(group)]

    def setting_of(self, group: Group, column: str) -> Any:
        """What a group has in one of ``columns``; None where it has nothing there."""
        return _setting(group, column, self.begun_from)


@dataclass(frozen=True)
class ObjectRow:
    """The questions about one object, over all sets: how many there are, and the counts of both models.

    The counts of several seeds are means.
    """

    object: str
    questions: int
    base: Confusion | None
    tuned: Confusion


class _Figures(NamedTuple):
    """By metric: ``values`` (n,), one a seed; ``draws`` (times,), the mean over the seeds in every resample."""

    values: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]


def compare(groups: Sequence[Group], baseline: Group | None, times: int = 10_000, seed: int = 0) -> Comparison:
    """Groups against ``baseline``, or, where that is None, each against the untrained run of its own root model.

    A group's value is the mean over its seeds, and so is every one of its resamples. Differences are of the same
    resamples. Their p values are corrected by Holm for each metric over all groups and all rows of the table.

    Raises:
        UserError: groups were asked different questions, seeds of a group hold different sets, or nothing was answered.
    """
    _refuse_different_questions(groups)
    bases = [baseline] * len(groups) if baseline is not None else [baseline_for(group, groups) for group in groups]
    # A run that only it itself would be compared with has nothing to be compared with.
    used = [base for group, base in zip(groups, bases, strict=True) if base is not group]
    bases = [base if base in used else None for base in bases]
    order = _table_order(groups, bases)
    groups, bases = [groups[i] for i in order], [bases[i] for i in order]
    sets = _set_names(groups)
    pictures = sorted({str(name) for group in groups for s in group.runs[0].sets.values() for name in set(s.images)})
    if not pictures:
        raise UserError(f"{groups[0].runs[0].folder}: holds no answers to POPE's test questions; ask them first")
    bootstrap = Bootstrap(pictures, times, seed)
    figures = {(i, name): f for i, group in enumerate(groups) for name, f in _all_figures(group, sets, bootstrap)}
    places = [None if base is None else groups.index(base) for base in bases]
    against = [
        None if place is None or place == i or _protocol(groups[i]) != _protocol(groups[place]) else place
        for i, place in enumerate(places)
    ]
    rows = [
        Row(groups[i], name, {metric: _cell(f, metric, _held(figures, against[i], name)) for metric in f.values})
        for (i, name), f in figures.items()
    ]
    _correct([row.cells for row in rows])
    _mark_best(rows, groups, figures)
    controls, at_ratio = _at_ratios(groups, against, sets, figures, bootstrap)
    begun_from = frozenset(base for group in groups if (base := baseline_for(group, groups)) is not group)
    columns = _columns(groups, begun_from)
    comparison = Comparison(
        groups=groups,
        baselines=bases,
        names=_model_names(groups, [{c: _setting(g, c, begun_from) for c in columns} for g in groups]),
        rows=rows + controls,
        columns=columns,
        notes=[],
        at_ratio=at_ratio,
        pictures=len(pictures),
        times=times,
        seed=seed,
        begun_from=begun_from,
    )
    comparison.notes.extend(_notes(comparison, sets))
    return comparison


def find_baseline(groups: Sequence[Group], given: str | None) -> Group | None:
    """The group that ``given`` names by a run's name, folder, folder of answers, or hub id.

    Without a name: the untrained run whose root model is every other's, or else the run that all others went on from;
    None where no single group is that.

    Raises:
        UserError: no group has this name.
    """
    if given is None:
        found = [baseline_for(group, groups) for group in groups]
        return found[0] if all(base is found[0] for base in found) else None
    path = Path(given).expanduser().resolve()
    for group in groups:
        for run in group.runs:
            folders = {run.folder.resolve(), run.answers.resolve()}
            if run.answers.name in (POPE, DEV):
                folders.add(run.answers.resolve().parent)
            if given == run.name or path in folders or (run.training is None and given in (run.root, run.model)):
                return group
    names = ", ".join(run.name for group in groups for run in group.runs)
    raise UserError(f"--baseline {given}: none of the runs read is called that or lies there; they are: {names}")


def baseline_for(group: Group, groups: Sequence[Group]) -> Group:
    """The untrained run of a group's root model, else the run at the top of the chain of stages it went on from.

    Where neither is among ``groups``, the group itself.
    """
    root = group.runs[0].root
    untrained = [other for other in groups if other.runs[0].training is None and other.runs[0].root == root]
    if group in untrained:
        return group
    if untrained:
        return _asked_most_alike(group, untrained)
    seen = [group]
    while True:
        start = seen[-1].runs[0].start
        before = [g for g in groups if start in {str(run.folder.resolve()) for run in g.runs}]
        if not before or (nearest := _asked_most_alike(group, before)) in seen:
            return seen[-1]
        seen.append(nearest)


def _asked_most_alike(group: Group, others: Sequence[Group]) -> Group:
    """The one of several that was asked as ``group`` was: by the same protocol, then with the same other settings."""

    def differences(other: Group) -> tuple[bool, int]:
        changed = sum(other.settings.get(name) != group.settings.get(name) for name in ASKED)
        return _protocol(other) != _protocol(group), changed

    return min(others, key=differences)


def _protocol(group: Group) -> tuple[str | None, str | None]:
    """How the questions were asked: numbers of two protocols do not compare."""
    return group.settings.get("prompt"), group.settings.get("conv_mode")


def _table_order(groups: Sequence[Group], bases: Sequence[Group | None]) -> list[int]:
    """Baselines first, each with the groups that are compared with it."""
    places = [groups.index(base) if base is not None else i for i, base in enumerate(bases)]
    return sorted(range(len(groups)), key=lambda i: (places.index(places[i]), i != places[i], i))


def _set_names(groups: Sequence[Group]) -> list[str]:
    found = dict.fromkeys(name for group in groups for name in group.runs[0].sets)
    return sorted(found, key=lambda name: SETS.index(name) if name in SETS else len(SETS))


def _refuse_different_questions(groups: Sequence[Group]) -> None:
    first: dict[str, Run] = {}
    for group in groups:
        for run in group.runs:
            if missing := group.runs[0].sets.keys() ^ run.sets.keys():
                raise UserError(
                    f"{run.answers} and {group.runs[0].answers} are seeds of one configuration, but only one of them "
                    f"has answers of the set {sorted(missing)[0]}; ask the other too, or leave one out"
                )
            for name, answers in run.sets.items():
                other = first.setdefault(name, run)
                _refuse_other_questions(name, other, other.sets[name], run, answers)


def _refuse_other_questions(name: str, one: Run, a: SetAnswers, two: Run, b: SetAnswers) -> None:
    asked_a, asked_b = _asked(a), _asked(b)
    if asked_a == asked_b:
        return
    fewer, more = sorted((asked_a, asked_b), key=len)
    which = f"set {name}: {one.answers} and {two.answers}"
    if fewer.items() <= more.items():
        raise UserError(
            f"{which} were asked about different pictures: one lacks {len(more) - len(fewer)} of the {len(more)} "
            "questions; fetch the missing pictures and ask again, without --skip_missing_images"
        )
    raise UserError(
        f"{which} were asked different questions ({a.labels_file} and {b.labels_file}); "
        "compare runs with the same label files"
    )


def _asked(answers: SetAnswers) -> dict[int, tuple[str, str, bool]]:
    rows = zip(answers.images.tolist(), answers.questions, answers.truth.tolist(), strict=True)
    return dict(zip(answers.ids.tolist(), rows, strict=True))


def _all_figures(group: Group, sets: Sequence[str], bootstrap: Bootstrap) -> list[tuple[str, _Figures]]:
    """Every set that the group has answered, and the mean where it has answered all of several."""
    found = [(name, _set_figures(group, name, bootstrap)) for name in sets if name in group.runs[0].sets]
    if len(sets) > 1 and len(found) == len(sets):
        found.append((MEAN, _mean([figures for _, figures in found])))
    return found


def _set_figures(group: Group, name: str, bootstrap: Bootstrap) -> _Figures:
    answers = [run.sets[name] for run in group.runs]
    figures = _counted([image_counts(a.images, a.truth, a.said, bootstrap.pictures) for a in answers], bootstrap)
    if _scored(group, name):
        figures.values[AUROC] = np.array([auroc(a.truth, a.scores) for a in answers])
        figures.draws[AUROC] = _auroc_draws(answers, bootstrap)
    return figures


def _scored(group: Group, name: str) -> bool:
    """Whether all seeds have scores for a set that has questions of both kinds."""
    truth = group.runs[0].sets[name].truth
    return all(run.sets[name].scores is not None for run in group.runs) and truth.any() and not truth.all()


def _counted(counts: Sequence[np.ndarray], bootstrap: Bootstrap) -> _Figures:
    """From counts by picture (I, 4), one array a seed."""
    values = metrics(np.stack([count.sum(axis=0) for count in counts]))
    totals = bootstrap.draws(np.concatenate(counts, axis=1)).reshape(bootstrap.times, len(counts), 4)
    return _Figures(values, {metric: drawn.mean(axis=1) for metric, drawn in metrics(totals).items()})


def _auroc_draws(answers: Sequence[SetAnswers], bootstrap: Bootstrap) -> np.ndarray:
    """AUROC of every resample (times,), the mean over seeds.

    With w the times a picture is drawn, it is the sum over pictures of w_i w_j wins_ij over the pairs drawn, where
    wins_ij counts the yes-questions about i that score above no-questions about j: one product of matrices. Seeds were
    asked the same questions, so the mean over them is that of their wins.
    """
    wins = sum(_wins(a, bootstrap.pictures) for a in answers) / len(answers)
    labels = image_counts(answers[0].images, answers[0].truth, answers[0].truth, bootstrap.pictures)
    pairs = np.prod(bootstrap.draws(labels)[:, [0, 2]], axis=1)
    won = np.empty(bootstrap.times)
    for start in range(0, bootstrap.times, _DRAWS_AT_ONCE):
        weights = bootstrap.weights[start : start + _DRAWS_AT_ONCE]
        won[start : start + _DRAWS_AT_ONCE] = np.einsum("di,di->d", weights @ wins, weights, dtype=np.float64)
    # A resample without one of the two kinds of questions tells nothing.
    return np.divide(won, pairs, out=np.full(bootstrap.times, 0.5), where=pairs > 0)


def _wins(answers: SetAnswers, pictures: Sequence[str]) -> np.ndarray:
    """(I, I) float32: pairs of a yes-question about i and a no-question about j of which the first scores higher."""
    place = {name: i for i, name in enumerate(pictures)}
    rows = np.array([place[str(name)] for name in answers.images])
    order = np.argsort(rows, kind="stable")
    rows, truth, scores = rows[order], answers.truth[order], answers.scores[order]
    about_no, first_no = np.unique(rows[~truth], return_index=True)
    wins = np.zeros((len(pictures), len(pictures)), dtype=np.float32)
    for i in np.unique(rows[truth]):
        higher = scores[truth & (rows == i)][:, None] - scores[~truth]
        wins[i, about_no] = np.add.reduceat((np.sign(higher).sum(axis=0) + len(higher)) / 2, first_no)
    return wins


def _mean(figures: Sequence[_Figures]) -> _Figures:
    """Over sets: of every seed's values, and of every resample."""
    common = [metric for metric in figures[0].values if all(metric in f.values for f in figures)]
    return _Figures(
        {metric: np.mean([f.values[metric] for f in figures], axis=0) for metric in common},
        {metric: np.mean([f.draws[metric] for f in figures], axis=0) for metric in common},
    )


def _held(figures: dict[tuple[int, str], _Figures], place: int | None, name: str) -> _Figures | None:
    return None if place is None else figures.get((place, name))


def _cell(figures: _Figures, metric: str, base: _Figures | None, minus: bool = True) -> Cell:
    """One metric's cell, with the difference to ``base``; not ``minus``: the other way round, base - figures."""
    value, deviation = mean_deviation(figures.values[metric])
    if base is None or metric not in base.values:
        return Cell(value, deviation)
    sign = 1 if minus else -1
    difference = sign * (value - float(base.values[metric].mean()))
    return Cell(value, deviation, interval(difference, sign * _less(figures.draws[metric], base.draws[metric])))


def _less(draws: np.ndarray, others: np.ndarray) -> np.ndarray:
    # Means of three equal figures are not always that figure, and a resample without a difference must count as one.
    return np.round(draws - others, 12)


def _correct(cells: Sequence[dict[str, Cell]]) -> None:
    """Holm's correction, for each metric over all cells with a difference."""
    for metric in (*METRICS, AUROC):
        family = [held for held in cells if metric in held and held[metric].difference]
        for held, p in zip(family, holm([held[metric].difference.p for held in family]), strict=True):
            held[metric] = replace(held[metric], p_holm=p)


def _mark_best(rows: Sequence[Row], groups: Sequence[Group], figures: dict[tuple[int, str], _Figures]) -> None:
    """The largest value of a set and metric, where it is told apart from every other's of the same protocol."""
    protocol = _protocol(groups[0])
    for name in dict.fromkeys(row.set_name for row in rows):
        rivals = [row for row in rows if row.set_name == name and _protocol(row.group) == protocol]
        for metric in IN_COMPETITION:
            held = [row for row in rivals if metric in row.cells]
            if len(held) < 2:
                continue
            best = max(held, key=lambda row: row.cells[metric].value)
            mine, *others = (
                figures[groups.index(row.group), name].draws[metric]
                for row in [best, *(row for row in held if row is not best)]
            )
            if max(holm([interval(0.0, _less(mine, other)).p for other in others])) < TOLD_APART:
                best.cells[metric] = replace(best.cells[metric], best=True)


def _at_ratios(
    groups: Sequence[Group],
    against: Sequence[int | None],
    sets: Sequence[str],
    figures: dict[tuple[int, str], _Figures],
    bootstrap: Bootstrap,
) -> tuple[list[Row], list[AtRatio]]:
    """Control rows and ``AtRatio`` rows of the groups that have scores, as their baselines have."""
    controls, found = [], []
    for i, place in enumerate(against):
        if place is None:
            continue
        group, base = groups[i], groups[place]
        names = [n for n in sets if (i, n) in figures and (place, n) in figures]
        names = [n for n in names if _scored(group, n) and _scored(base, n)]
        moved = [(n, *_moved(group, base, n, bootstrap)) for n in names]
        if len(sets) > 1 and len(moved) == len(sets):
            moved.append((MEAN, _mean([m[1] for m in moved]), _mean([m[2] for m in moved])))
        for name, control, at_base in moved:
            mine, theirs = figures[i, name], figures[place, name]
            cells = {metric: _cell(control, metric, mine, minus=False) for metric in METRICS}
            controls.append(Row(group, name, cells, "control"))
            accuracy = _cell(at_base, "accuracy", theirs)
            # The row's own dictionary holds what _correct is still to fill in, so control is taken from it below.
            found.append(AtRatio(group, name, _cell(mine, AUROC, theirs), accuracy, cells["accuracy"]))
    _correct([row.cells for row in controls])
    held = [{"accuracy": row.accuracy, AUROC: row.auroc} for row in found]
    _correct(held)
    return controls, [
        replace(
            row,
            auroc=cells[AUROC],
            accuracy=cells["accuracy"],
            control=control.cells["accuracy"],
            verdict=_verdict(control.cells["accuracy"]) if row.set_name == MEAN or len(sets) == 1 else None,
        )
        for row, cells, control in zip(found, held, controls, strict=True)
    ]


def _moved(group: Group, base: Group, name: str, bootstrap: Bootstrap) -> tuple[_Figures, _Figures]:
    """The baseline at the group's yes ratio, and the group at the baseline's; thresholds are those of the full sample.

    One value a seed of the group, the mean over the baseline's.
    """

    def at(answers: SetAnswers, ratio: float) -> np.ndarray:
        said = said_at_ratio(answers.scores, ratio)
        return image_counts(answers.images, answers.truth, said, bootstrap.pictures)

    pairs = [(run.sets[name], other.sets[name]) for run in group.runs for other in base.runs]
    control = _counted([at(theirs, float(mine.said.mean())) for mine, theirs in pairs], bootstrap)
    moved = _counted([at(mine, float(theirs.said.mean())) for mine, theirs in pairs], bootstrap)
    return _over(control, len(base.runs)), _over(moved, len(base.runs))


def _over(figures: _Figures, count: int) -> _Figures:
    """The mean of every ``count`` values."""
    return figures._replace(values={m: v.reshape(-1, count).mean(axis=1) for m, v in figures.values.items()})


def _verdict(control: Cell) -> str:
    if control.p_holm < TOLD_APART and control.difference.low > 0:
        return "better"
    return "worse" if control.p_holm < TOLD_APART and control.difference.high < 0 else "same"


def _columns(groups: Sequence[Group], begun_from: frozenset[Group]) -> list[str]:
    """Training's settings that differ among groups that others did not begin from, and POPE's that differ at all."""
    last = differing([group for group in groups if group not in begun_from])
    return [
        *(column for column in last if column not in ASKED),
        *(column for column in differing(groups) if column in ASKED),
    ]


def _setting(group: Group, column: str, begun_from: frozenset[Group]) -> Any:
    return None if group in begun_from and column not in ASKED else group.settings.get(column)


def _model_names(groups: Sequence[Group], settings: Sequence[dict[str, Any]]) -> list[str]:
    """The short name of the model that training began from (a run's own, where it did not begin from another one here).

    Where that and the other columns do not tell two groups apart, it is the run's name.
    """
    runs = [group.runs[0] for group in groups]
    begun_from = {base for group in groups if (base := baseline_for(group, groups)) is not group}
    bases = [baseline_for(group, groups) for group in groups]
    names = [
        base.runs[0].folder.name if base in begun_from and base.runs[0].training else base.runs[0].model
        for base in bases
    ]
    told_by = [json.dumps([n, run.hadpo, held]) for n, run, held in zip(names, runs, settings, strict=True)]
    return [n if told_by.count(key) == 1 else run.name for n, run, key in zip(names, runs, told_by, strict=True)]


def _notes(comparison: Comparison, sets: Sequence[str]) -> list[str]:
    notes = []
    name_of, runs = comparison.name_of, [row for row in comparison.rows if row.kind == "run"]
    bases = dict.fromkeys(base for group, base in _pairs(comparison) if base is not None and base is not group)
    if bases:
        described = "; ".join(f"{name_of(base)} ({base.runs[0].folder})" for base in bases)
        notes.append(f"Baseline{'s' if len(bases) > 1 else ''}: {described}.")
    elif len(comparison.groups) > 1:
        notes.append("No baseline among these runs, so no differences: name one with --baseline FOLDER.")
    if any(len(group.runs) > 1 for group in comparison.groups):
        seeds = [f"{name_of(g)}: {', '.join(str(run.seed) for run in g.runs)}" for g in comparison.groups]
        alike = {tuple(run.seed for run in g.runs) for g in comparison.groups if len(g.runs) > 1}
        listed = ", ".join(map(str, next(iter(alike)))) if len(alike) == 1 else "; ".join(seeds)
        notes.append(f"Values are means over seeds ({listed}), ± their sample deviation (n - 1).")
    if corrected := [row for row in runs if row.cells["accuracy"].difference]:
        notes.append(
            f"Δ is the difference to the baseline in points, [..] its 95% percentile interval: {comparison.pictures} "
            f"pictures resampled {comparison.times:,} times (seed {comparison.seed}), all questions of a picture "
            "together, the same draws for every row. It holds the chance of pictures, not that of seeds."
        )
        notes.append(
            f"p (Holm): two-sided, of no difference, corrected for {len(corrected)} comparisons: every group but the "
            f"baseline in every set{' and the mean' if len(sets) > 1 else ''}, for each metric by itself."
        )
        smallest = 2 / (comparison.times + 1)
        if smallest * len(corrected) >= TOLD_APART:
            notes.append(
                f"With {comparison.times:,} resamples no p is below {smallest:.2g}, which is {TOLD_APART} or more once "
                f"corrected for {len(corrected)} comparisons: raise --bootstrap."
            )
    if len(comparison.groups) > 1:
        notes.append(
            "Bold: the highest of its column and set, where its difference to every other group there has p < "
            f"{TOLD_APART}, corrected by Holm for their number. A highest value in plain type is not told apart."
        )
    return [*notes, *_gaps(comparison, sets), *_remarks(comparison)]


def _pairs(comparison: Comparison) -> list[tuple[Group, Group | None]]:
    return list(zip(comparison.groups, comparison.baselines, strict=True))


def _gaps(comparison: Comparison, sets: Sequence[str]) -> list[str]:
    """What was not compared, and why."""
    notes = []
    for group, base in _pairs(comparison):
        name = comparison.name_of(group)
        if missing := [s for s in sets if s not in group.runs[0].sets]:
            notes.append(
                f"{name} ({group.runs[0].answers}) has no answers of: {', '.join(missing)}; so it has no mean and "
                "no verdict."
            )
        if base is not None and _protocol(base) != _protocol(group):
            (prompt, template), (base_prompt, base_template) = _protocol(group), _protocol(base)
            notes.append(
                f"{name} was asked by another protocol (--prompt {prompt}, {template}) than its baseline (--prompt "
                f"{base_prompt}, {base_template}): their numbers do not compare, so there is no difference."
            )
    if len({_protocol(group) for group in comparison.groups}) > 1:
        notes.append("Groups of another protocol than the first row's are never bold.")
    return notes


def _remarks(comparison: Comparison) -> list[str]:
    """Answers that are odd: neither yes nor no, or not what their own score says."""
    notes = []
    for group in comparison.groups:
        sets = [answers for run in group.runs for answers in run.sets.values()]
        questions = sum(len(answers.ids) for answers in sets)
        if unparsed := sum(answers.unparsed for answers in sets):
            notes.append(
                f"{comparison.name_of(group)}: {unparsed} of {questions} answers say neither yes nor no, and count as "
                "yes (as POPE counts them)."
            )
        other = sum(_disagreeing(answers) for answers in sets)
        if other:
            notes.append(
                f"{comparison.name_of(group)}: {other} of {questions} answers are not what their score says (yes above "
                "0.5); the tables count the answers, thresholds are moved on the scores."
            )
    return notes


def _disagreeing(answers: SetAnswers) -> int:
    if answers.scores is None:
        return 0
    return int(np.count_nonzero(np.where(answers.said, answers.scores < 0.5, answers.scores > 0.5)))


def on_dev(group: Group) -> Group:
    """The group with the answers to the development set in the place of those to the test sets."""
    return replace(group, runs=tuple(replace(run, sets=run.dev) for run in group.runs))


def rank_on_dev(groups: Sequence[Group], metric: str = "accuracy") -> list[tuple[Group, float]]:
    """Trained groups with their mean of ``metric`` over development sets and seeds (a fraction), the best one first.

    What others' training began from is not to be chosen.

    ``metric`` is one of ``IN_COMPETITION``. Groups that tie stay in the order given.

    Raises:
        UserError: no trained group; one of them, or one of its seeds, has no answers of a development set; the groups
            were asked different questions; development and test questions share pictures; "auroc" without scores.
    """
    begun_from = {base for group in groups if (base := baseline_for(group, groups)) is not group}
    trained = [group for group in groups if group.runs[0].training is not None and group not in begun_from]
    if not trained:
        raise UserError("--select-on dev: none of the runs was trained here, so there is nothing to choose from")
    for group in trained:
        for run in group.runs:
            if not run.dev:
                raise UserError(
                    f"--select-on dev: {run.folder} has no answers of a development set; ask it: "
                    f"pope_eval.py --set all --output_dir {run.folder / 'dev'} --pope_path DEV ..."
                )
    _refuse_shared_pictures(groups)
    asked = [on_dev(group) for group in trained]
    _refuse_different_questions(asked)
    sets = _set_names(asked)
    for group in asked:
        if missing := [name for name in sets if name not in group.runs[0].sets]:
            raise UserError(
                f"--select-on dev: {group.runs[0].folder} has no answers of the development set {missing[0]}, "
                "which others have; ask it too"
            )
    values = [np.mean([_of_set(run, name, metric) for run in group.runs for name in sets]) for group in asked]
    order = sorted(range(len(trained)), key=lambda i: -values[i])
    return [(trained[i], float(values[i])) for i in order]


def select_on_dev(groups: Sequence[Group], metric: str = "accuracy") -> Group:
    """The trained group that is best on the development sets: the first of ``rank_on_dev``, which see."""
    return rank_on_dev(groups, metric)[0][0]


def _of_set(run: Run, name: str, metric: str) -> float:
    answers = run.sets[name]
    if metric != AUROC:
        return getattr(answers.confusion(), metric)
    if answers.scores is None:
        raise UserError(f"--metric auroc: {run.folder} has no scores of the development set {name}; ask with --scores")
    if answers.truth.all() or not answers.truth.any():
        raise UserError(f"--metric auroc: {answers.labels_file} has labels of one kind only; choose another --metric")
    return auroc(answers.truth, answers.scores)


def _refuse_shared_pictures(groups: Sequence[Group]) -> None:
    runs = [run for group in groups for run in group.runs]
    pictures: dict[str, dict[str, Path]] = {"sets": {}, "dev": {}}
    for kind, held in pictures.items():
        for run in runs:
            for answers in getattr(run, kind).values():
                held.update(dict.fromkeys(map(same_picture, answers.images.tolist()), answers.labels_file))
    if shared := sorted(pictures["sets"].keys() & pictures["dev"].keys()):
        dev, test = pictures["dev"][shared[0]], pictures["sets"][shared[0]]
        raise UserError(
            f"--select-on dev: {len(shared)} pictures are asked about in the development set and in the test set "
            f"({shared[0]}: {dev} and {test}); choose on other pictures (python -m llava.eval.pope_questions)"
        )


def by_object(baseline: Run | None, run: Run) -> list[ObjectRow]:
    """Counts by the object a question names ("Is there a X in the image?"; others are passed over), by name.

    All sets of ``run`` together. POPE's yes-questions are the same in its three sets, so they count three times.
    """
    return _object_rows([baseline] if baseline is not None else [], [run])


def objects_of(group: Group, baseline: Group | None) -> list[ObjectRow]:
    """``by_object`` of a group, means over its seeds (and over the baseline's)."""
    return _object_rows(baseline.runs if baseline is not None else (), group.runs)


def worst(rows: Iterable[ObjectRow], most: int = 10) -> list[ObjectRow]:
    """The objects with the most wrong answers of the tuned model."""
    return sorted(rows, key=lambda row: (-(row.tuned.fp + row.tuned.fn), row.object))[:most]


def _object_rows(bases: Sequence[Run], runs: Sequence[Run]) -> list[ObjectRow]:
    tuned, base = _by_object(runs), _by_object(bases)
    return [ObjectRow(name, round(c.tp + c.fp + c.tn + c.fn), base.get(name), c) for name, c in sorted(tuned.items())]


def _by_object(runs: Sequence[Run]) -> dict[str, Confusion]:
    counts: dict[str, list[int]] = {}
    for run in runs:
        for answers in run.sets.values():
            for question, truth, said in zip(answers.questions, answers.truth, answers.said, strict=True):
                if found := _OBJECT.fullmatch(question.strip()):
                    # tp, fp, tn, fn
                    place = (0 if truth else 1) if said else (3 if truth else 2)
                    counts.setdefault(found.group(1).lower(), [0, 0, 0, 0])[place] += 1

    def mean(count: int) -> float:
        return count if len(runs) == 1 else count / len(runs)

    return {name: Confusion(*map(mean, held)) for name, held in counts.items()}
