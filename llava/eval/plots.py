"""A comparison of POPE runs as figures: every one as PNG and PDF, each only where its data is there.

matplotlib is imported where it is needed, draws without a display and leaves no global state behind.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava.errors import note
from llava.eval.statistics import Bootstrap, auroc, image_counts, interval, metrics, precision_recall
from llava.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llava.eval.comparison import Comparison, Row
    from llava.eval.diagnostics import Diagnostics
    from llava.eval.evaluated import Group, Run, SetAnswers

Colour = tuple[int, int, int]

# Okabe and Ito's colours, which the colour-blind can tell apart; black is the baseline's.
BASELINE = "#000000"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)))
MARKERS = ("o", "s", "^", "D", "v", "p")
OUTCOMES = {  # of a question, by whether the base and the tuned model are right
    "kept right": (True, True, "#0072B2"),
    "fixed": (False, True, "#009E73"),
    "broken": (True, False, "#D55E00"),
    "kept wrong": (False, False, "#777777"),
}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "text.parse_math": False,  # a name or an answer may hold a dollar sign
}
CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei")
DPI = 150
WIDE, NARROW = 7.0, 3.5  # inches: both columns of a paper, and one
CLOSELY = 6  # groups whose curves are drawn
LISTED = 30  # groups that a figure with a line each holds
RUNS_LOOKED_AT = 3  # runs whose diagnostics and flips are shown
RESAMPLES = 2000
ABOUT_MAPS = (
    "Maps: attention from the position that predicts the answer to the picture's tokens, mean over heads and layers; "
    "orange is more, blue less."
)
SMALLEST_KL = 1e-8  # nats; float32 knows no smaller one


@dataclass(frozen=True)
class Plot:
    """One figure on disk. ``section`` is where the page shows it: results, reluctance, diagnostics or flips."""

    section: str
    title: str
    png: Path
    pdf: Path
    caption: str


@dataclass(frozen=True)
class Flip:
    """A question that the tuned model answers the other way than the baseline; ``fixed`` or else broken.

    Maps are (g, g) shares of the attention on the picture's tokens; None where no diagnostics hold them. ``padded``
    says that they cover the square the picture was padded to, else its centre crop.
    """

    set_name: str
    question_id: int
    image: str  # file name
    picture: Path | None  # None where it does not lie on this disk
    question: str
    label: str  # yes | no
    before: str
    after: str
    fixed: bool
    map_base: np.ndarray | None = None
    map_tuned: np.ndarray | None = None
    map_block: np.ndarray | None = None
    padded: bool = False


NAMES = ("accuracy", "difference", "precision_recall", "yes_ratio", "kl", "gap", "depth", "flips")


def write_plots(
    folder: Path,
    comparison: Comparison,
    runs: Sequence[Run],
    diagnostics: Mapping[str, Mapping[str, Diagnostics]],
) -> list[Plot]:
    """Every figure that the data allows, as ``folder/NAME.png`` and ``NAME.pdf``, in the order of the page.

    ``diagnostics`` is by name of the run, then by set (``read_diagnostics`` of the run's answers). Where matplotlib is
    not installed: one note, and no figures.
    """
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError as error:
        note(f"no figures: {error}; pip install -r requirements.txt")
        return []
    chinese = [name for name in CHINESE if name in font_manager.get_font_names()]
    plots = []
    with matplotlib.rc_context({**STYLE, "font.family": ["DejaVu Sans", *chinese]}):
        for name, section, title, caption, figure in _figures(comparison, runs, diagnostics):
            files = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
            for file, metadata in zip(files, ({"Software": None}, {"CreationDate": None}), strict=True):
                drawn = io.BytesIO()
                figure.savefig(drawn, format=file.suffix[1:], dpi=DPI, metadata=metadata)
                with atomic_write(file, "wb") as out:
                    out.write(drawn.getvalue())
            plots.append(Plot(section, title, *files, caption))
    return plots


def remove_others(folder: Path, plots: Sequence[Plot]) -> None:
    """Remove figures of an earlier report that this one has not drawn; files of other names stay."""
    ours = {file.name for plot in plots for file in (plot.png, plot.pdf)}
    for file in folder.glob("*.p*"):
        if file.name not in ours and re.fullmatch(rf"({'|'.join(NAMES)})(-.*)?\.(png|pdf)", file.name):
            file.unlink()


def _figures(
    comparison: Comparison, runs: Sequence[Run], diagnostics: Mapping[str, Mapping[str, Diagnostics]]
) -> Iterator[tuple[str, str, str, str, Figure]]:
    """(file name, section, title, caption, figure), one drawn after the other: none is kept."""
    for name, section, title, draw in (
        ("accuracy", "results", "Accuracy", _accuracy),
        ("difference", "results", "Accuracy against the baseline", _difference),
        ("precision_recall", "reluctance", "Precision and recall", _precision_recall),
        ("yes_ratio", "reluctance", "Accuracy against yes ratio", _yes_ratio),
    ):
        if drawn := draw(comparison):
            yield (name, section, title, *drawn)
    for run in _looked_at(comparison, runs, diagnostics):
        by_set = _answered(run, diagnostics[run.name])
        for name, title, draw in (
            ("kl", "How far the answers' distributions moved", _kl),
            ("gap", "How far yes moved against no", _gap),
            ("depth", "Where the models differ, and what they look at", _depth),
        ):
            if by_set:
                yield (f"{name}-{file_name(run.name)}", "diagnostics", f"{title}: {run.name}", *draw(by_set))
    for name, shown in shown_flips(comparison, diagnostics, quiet=True).items():
        if drawn := _flips(shown):
            yield (f"flips-{file_name(name)}", "flips", f"Answers that changed: {name}", *drawn)


def file_name(name: str) -> str:
    """A run's name without what a file's name should not hold."""
    return re.sub(r"[^\w.=+-]", "_", name).lstrip(".") or "run"


# Groups and their names


def labels(comparison: Comparison) -> list[str]:
    """A short name for every group: the one or two settings in which they differ, else the name of its (first) run."""
    columns, bases = comparison.columns, {id(base) for base in comparison.baselines}
    names = []
    for group in comparison.groups:
        by_settings = 0 < len(columns) <= 2 and id(group) not in bases and group.runs[0].training is not None
        values = [group.settings.get(column) for column in columns]
        names.append(
            ", ".join(f"{column} {_said(value)}" for column, value in zip(columns, values, strict=True))
            if by_settings
            else _name_of(group)
        )
    if len({_shortened(name) for name in names}) < len(names):
        names = [_name_of(group) for group in comparison.groups]
    short = [_shortened(name) for name in names]
    return short if len(set(short)) == len(short) else [f"{number}: {name}" for number, name in enumerate(short, 1)]


def _said(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _name_of(group: Group) -> str:
    """Of several seeds, what their names have in common."""
    first, *others = (run.name for run in group.runs)
    common = first
    for other in others:
        while not other.startswith(common):
            common = common[:-1]
    return re.sub(r"[-_/.=]?(seed|s)?[-_/.=]?$", "", common) or first if others else first


def _shortened(name: str, most: int = 32) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def _sets(comparison: Comparison) -> list[str]:
    """The sets that any group has answered, in the table's order."""
    return list(dict.fromkeys(row.set_name for row in comparison.rows if row.set_name != "mean"))


def _with_mean(comparison: Comparison) -> list[str]:
    """The sets and, where there is such a row, "mean"."""
    return [*_sets(comparison), *(["mean"] if any(row.set_name == "mean" for row in comparison.rows) else [])]


def _answers(group: Group, name: str) -> list[SetAnswers]:
    """The group's answers to a set, one for each seed; [] where it was not asked."""
    return [run.sets[name] for run in group.runs if name in run.sets]


def _by_set(comparison: Comparison) -> dict[tuple[int, str], Row]:
    return {(id(row.group), row.set_name): row for row in comparison.rows if row.kind == "run"}


def by_accuracy(comparison: Comparison) -> list[Group]:
    """The groups that are no baseline, the best mean accuracy over their sets first."""
    bases = {id(base) for base in comparison.baselines}
    rows = _by_set(comparison)

    def mean(group: Group) -> float:
        return sum(rows[id(group), name].cells["accuracy"].value for name in group.runs[0].sets) / len(
            group.runs[0].sets
        )

    return sorted((group for group in comparison.groups if id(group) not in bases), key=mean, reverse=True)


def _bases(comparison: Comparison) -> list[Group]:
    return list({id(base): base for base in comparison.baselines if base is not None}.values())


def _in_order(comparison: Comparison, kept: Sequence[Group]) -> list[tuple[Group, str]]:
    wanted = {id(group) for group in kept}
    named = zip(comparison.groups, labels(comparison), strict=True)
    return [(group, label) for group, label in named if id(group) in wanted]


def _listed(comparison: Comparison) -> tuple[list[tuple[Group, str]], str]:
    """The groups that a figure has room for, and what a caption says of the others."""
    best = by_accuracy(comparison)
    kept = [*_bases(comparison), *best][:LISTED]
    left = len(comparison.groups) - len(kept)
    return _in_order(comparison, kept), f" Not shown: the {left} of lowest mean accuracy." if left else ""


def _panels(count: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(NARROW if count == 1 else WIDE, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **options)[0])


def _styles(comparison: Comparison, groups: Sequence[tuple[Group, str]]) -> list[dict[str, Any]]:
    """Colour, line and marker of every group; baselines are black."""
    bases, rank, base, styles = {id(base) for base in _bases(comparison)}, 0, 0, []
    for group, _ in groups:
        if id(group) in bases:
            styles.append({"color": BASELINE, "linestyle": LINES[base % len(LINES)], "marker": "XP*"[base % 3]})
            base += 1
        else:
            index = rank % len(PALETTE)
            styles.append({"color": PALETTE[index], "linestyle": LINES[index], "marker": MARKERS[index]})
            rank += 1
    return styles


# Results


def _accuracy(comparison: Comparison) -> tuple[str, Figure] | None:
    groups, left = _listed(comparison)
    sets, names = _sets(comparison), _with_mean(comparison)
    pictures = sorted({str(image) for g, _ in groups for r in g.runs for s in r.sets.values() for image in s.images})
    bootstrap = Bootstrap(pictures, RESAMPLES)
    figure, axes = _panels(len(names), 0.9 + 0.24 * len(groups), sharey=True)
    for row, ((group, _), style) in enumerate(zip(groups, _styles(comparison, groups), strict=True)):
        own = [name for name in sets if _answers(group, name)]
        draws = {name: np.mean([_accuracies(bootstrap, a) for a in _answers(group, name)], axis=0) for name in own}
        values = {name: np.array([a.confusion().accuracy for a in _answers(group, name)]) for name in own}
        if own == sets:
            draws["mean"] = np.mean([draws[name] for name in sets], axis=0)
            values["mean"] = np.mean([values[name] for name in sets], axis=0)
        colour = BASELINE if style["color"] == BASELINE else PALETTE[0]
        for axis, name in zip(axes, names, strict=True):
            if name not in values:
                continue
            value = float(values[name].mean())
            span = interval(value, draws[name])
            axis.plot([100 * span.low, 100 * span.high], [row, row], color=colour, linewidth=1.4)
            axis.plot(100 * value, row, marker="o", color=colour, markersize=4)
            if len(values[name]) > 1:
                axis.plot(100 * values[name], [row] * len(values[name]), "|", color=colour, markersize=6)
            if colour == BASELINE:
                axis.axvline(100 * value, color=BASELINE, linewidth=0.7, linestyle=":")
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name)
        axis.grid(axis="x")
    _name_rows(axes, [label for _, label in groups])
    figure.supxlabel("accuracy (%)", fontsize=8)
    seeds = " Strokes are single seeds." if any(len(group.runs) > 1 for group, _ in groups) else ""
    dotted = " The dotted line is the baseline (black)." if _bases(comparison) else ""
    return (
        f"Accuracy with 95% intervals ({RESAMPLES:,} resamples of the {len(pictures):,} pictures). Those of two models "
        f"may overlap although their difference is beyond doubt: both answer the same questions.{dotted}{seeds}{left}"
    ), figure


def _accuracies(bootstrap: Bootstrap, answers: SetAnswers) -> np.ndarray:
    counts = image_counts(answers.images, answers.truth, answers.said, bootstrap.pictures)
    return metrics(bootstrap.draws(counts))["accuracy"]


def _name_rows(axes: list[Axes], names: list[str]) -> None:
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)


def _difference(comparison: Comparison) -> tuple[str, Figure] | None:
    rows = _by_set(comparison)
    groups, left = _listed(comparison)
    names = _with_mean(comparison)
    compared = {key: row.cells["accuracy"] for key, row in rows.items() if row.cells["accuracy"].difference is not None}
    groups = [pair for pair in groups if any((id(pair[0]), name) in compared for name in names)]
    if not groups:
        return None
    figure, axes = _panels(len(names), 0.9 + 0.24 * len(groups), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for place, (group, _) in enumerate(groups):
            cell = compared.get((id(group), name))
            if cell is None or cell.difference is None:
                continue
            told_apart = cell.p_holm is not None and cell.p_holm < 0.05
            axis.plot(
                [100 * cell.difference.low, 100 * cell.difference.high], [place] * 2, color=PALETTE[0], linewidth=1.4
            )
            face = PALETTE[0] if told_apart else "white"
            axis.plot(100 * cell.difference.value, place, "o", color=PALETTE[0], markerfacecolor=face, markersize=4.5)
        axis.axvline(0, color=BASELINE, linewidth=0.7)
        axis.set_title(name)
        axis.grid(axis="x")
    _name_rows(axes, [label for _, label in groups])
    figure.supxlabel("accuracy less the baseline's (percentage points)", fontsize=8)
    return (
        "Difference of accuracy to the baseline with its paired 95% interval, as in the table. Filled: Holm-corrected "
        f"p below 0.05; open: not told apart from the baseline.{left}"
    ), figure


# Better, or only more reluctant?


def _precision_recall(comparison: Comparison) -> tuple[str, Figure] | None:
    best = by_accuracy(comparison)
    groups = _in_order(comparison, [*_bases(comparison), *best[:CLOSELY]])
    groups = [(g, label) for g, label in groups if all(s.scores is not None for r in g.runs for s in r.sets.values())]
    if not groups:
        return None
    truths = {name: a.truth for group, _ in groups for name, a in group.runs[0].sets.items()}
    sets = [name for name in _sets(comparison) if name in truths and truths[name].any() and not truths[name].all()]
    if not sets:
        return None
    styles = _styles(comparison, groups)
    columns = min(3, len(sets))
    figure, axes = _panels(len(sets), 2.6 + 0.17 * len(groups) + 0.15 * -(-len(groups) // columns), sharex=True)
    for axis, name in zip(axes, sets, strict=True):
        lowest = 1.0
        for (group, _), style in zip(groups, styles, strict=True):
            line = {key: style[key] for key in ("color", "linestyle")}
            # A tuned model's curve may cover the baseline's, which then shows at its sides.
            width = 2.6 if style["color"] == BASELINE else 1.1
            areas = []
            for number, answers in enumerate(_answers(group, name)):
                assert answers.scores is not None
                precision, recall, _ = precision_recall(answers.truth, answers.scores)
                # The sum over steps of recall (scikit-learn's average_precision_score).
                areas.append((auroc(answers.truth, answers.scores), float(-np.diff(recall) @ precision[:-1])))
                axis.plot(recall, precision, **line, linewidth=width if number == 0 else 0.6, drawstyle="steps-post")
                counts = answers.confusion()
                axis.plot(counts.recall, counts.precision, marker=style["marker"], color=style["color"], **_RIMMED)
                lowest = min(lowest, counts.precision, *precision[recall >= 0.2])
            if not areas:
                continue
            roc, average = np.mean(areas, axis=0)
            axis.plot([], [], **style, markersize=4, label=f"{100 * roc:.1f} / {100 * average:.1f}")
        axis.set(title=name, xlim=(0, 1.02), ylim=(max(0.0, lowest - 0.03), 1.01), xlabel="recall")
        axis.grid()
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), handlelength=2.6, title="AUROC / AP (%)", title_fontsize=7
        )
    axes[0].set_ylabel("precision")
    # Names stand once: below the panels there is room for numbers alone.
    names = [axes[0].plot([], [], **style, markersize=4)[0] for style in styles]
    figure.legend(names, [label for _, label in groups], loc="outside lower center", ncols=columns, handlelength=2.6)
    seeds = " One curve a seed, areas are means." if any(len(group.runs) > 1 for group, _ in groups) else ""
    left = len(best) - CLOSELY
    return (
        "Precision and recall as the threshold on the probability of yes moves; marks are the answers as given. AUROC "
        f"is the area under the ROC curve, AP the average precision.{seeds}"
        + (f" Not shown: the {left} of lowest mean accuracy." if left > 0 else "")
    ), figure


_RIMMED = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.7, "linestyle": "none", "zorder": 5}


def _yes_ratio(comparison: Comparison) -> tuple[str, Figure] | None:
    groups, left = _listed(comparison)
    close = {id(group) for group in by_accuracy(comparison)[:CLOSELY]} | {id(base) for base in _bases(comparison)}
    shown = [pair for pair in groups if id(pair[0]) in close]
    styles = _styles(comparison, shown)
    sets = _sets(comparison)
    figure, axes = _panels(len(sets), 2.6 + 0.15 * ((len(shown) + 3) // 3))
    curves, named = False, set[str]()
    for axis, name in zip(axes, sets, strict=True):
        asked = [group for group, _ in groups if _answers(group, name)]
        if not asked:  # only by groups that are not among those shown
            continue
        for group in asked:
            if id(group) not in close:
                axis.plot(*_point(group, name), "o", color="#bbbbbb", markersize=3)
        for (group, label), style in zip(shown, styles, strict=True):
            if not _answers(group, name):
                continue
            axis.plot(*_point(group, name), label=None if label in named else label, **{**style, **_RIMMED})
            named.add(label)
        for base in _bases(comparison):
            for answers in _answers(base, name)[:1]:
                if answers.scores is not None:
                    x, y = threshold_curve(answers.truth, answers.scores)
                    label = "baseline, threshold moved" if not curves else None
                    axis.plot(100 * x, 100 * y, color=BASELINE, linewidth=1, label=label, zorder=1)
                    curves = True
        points = np.array([_point(group, name) for group in asked])
        truth = _answers(asked[0], name)[0].truth
        axis.axvline(100 * truth.mean(), color="#888888", linewidth=0.7, linestyle=":")
        _around(axis, points)
        axis.set(title=name, xlabel="yes ratio (%)")
        axis.grid()
    axes[0].set_ylabel("accuracy (%)")
    columns = 1 if len(sets) == 1 else 3
    figure.legend(loc="outside lower center", ncols=columns, handlelength=1.6)
    curve = (
        " The line is what the baseline reaches when only its threshold moves: a point above it is better at the same "
        "yes ratio, a point on it is only more (or less) reluctant."
        if curves
        else " Without scores of the baseline (pope_eval.py --scores) there is no curve to hold the points against."
    )
    grey = " Grey: the other groups." if len(shown) < len(groups) else ""
    return f"Answers as given.{curve} Dotted: the share of questions whose answer is yes.{grey}{left}", figure


def _point(group: Group, name: str) -> tuple[float, float]:
    """Yes ratio and accuracy in percent, means over seeds."""
    counts = [answers.confusion() for answers in _answers(group, name)]
    return 100 * float(np.mean([c.yes_ratio for c in counts])), 100 * float(np.mean([c.accuracy for c in counts]))


def threshold_curve(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Yes ratio and accuracy, (T + 1,) each, of "yes where the score is at least t", from no yes at all to only yes.

    Between two thresholds the line is what ties shared at random reach on average (``said_at_ratio``).
    """
    values, group = np.unique(-np.asarray(scores, dtype=np.float64), return_inverse=True)
    group = group.ravel()
    yes = np.append(0, np.cumsum(np.bincount(group, minlength=len(values))))
    tp = np.append(0, np.cumsum(np.bincount(group, weights=truth, minlength=len(values))))
    right = tp + (~np.asarray(truth, dtype=bool)).sum() - (yes - tp)
    return yes / len(scores), right / len(scores)


def _around(axis: Axes, points: np.ndarray) -> None:
    """Limits around the points, at least some percent wide: the curve is cut where there is nothing to compare."""
    (low_x, low_y), (high_x, high_y) = points.min(0), points.max(0)
    pad_x, pad_y = max(4.0, 0.25 * (high_x - low_x)), max(1.0, 0.3 * (high_y - low_y))
    axis.set_xlim(max(-1.0, low_x - pad_x), min(101.0, high_x + pad_x))
    axis.set_ylim(max(-1.0, low_y - pad_y), min(100.5, high_y + pad_y))


# Diagnostics


@dataclass(frozen=True)
class _Answered:
    """Diagnostics of one set with the labels of its questions, (Q,) bool."""

    diagnostics: Diagnostics
    truth: np.ndarray

    def outcomes(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """(name, colour, questions as (Q,) bool), by which of yes and no is the likelier first token."""
        before = (self.diagnostics.base_gap > 0) == self.truth
        after = (self.diagnostics.tuned_gap > 0) == self.truth
        for name, (base_right, tuned_right, colour) in OUTCOMES.items():
            yield name, colour, (before == base_right) & (after == tuned_right)


def _looked_at(
    comparison: Comparison, runs: Sequence[Run], diagnostics: Mapping[str, Mapping[str, Diagnostics]]
) -> list[Run]:
    """Runs with diagnostics, those of the best groups first; at most ``RUNS_LOOKED_AT``."""
    order = {run.name: place for place, group in enumerate(by_accuracy(comparison)) for run in group.runs}
    found = [run for run in runs if diagnostics.get(run.name)]
    return sorted(found, key=lambda run: order.get(run.name, len(order)))[:RUNS_LOOKED_AT]


def _answered(run: Run, by_set: Mapping[str, Diagnostics]) -> list[_Answered]:
    """Diagnostics of the sets that the run has answered."""
    found = []
    for name, one in by_set.items():
        if name in run.sets:
            truth = dict(zip(run.sets[name].ids.tolist(), run.sets[name].truth.tolist(), strict=True))
            if truth.keys() >= set(one.ids.tolist()) and len(one.ids):
                found.append(_Answered(one, np.array([truth[number] for number in one.ids.tolist()], dtype=bool)))
            else:
                note(f"{run.name}: diagnostics of '{name}' are of other questions than its answers; not drawn")
    return found


def _kl(answered: list[_Answered]) -> tuple[str, Figure]:
    figure, axes = _panels(len(answered), 2.4, sharey=True)
    random = np.random.default_rng(0)
    for axis, one in zip(axes, answered, strict=True):
        names = []
        for place, (name, colour, chosen) in enumerate(one.outcomes()):
            values = np.maximum(one.diagnostics.kl[chosen], SMALLEST_KL)
            names.append("\n".join([*name.split(), f"({len(values):,})"]))
            if not len(values):
                continue
            dots = values if len(values) <= 400 else random.choice(values, 400, replace=False)
            across = place + random.uniform(-0.28, 0.28, len(dots))
            axis.plot(across, dots, ".", color=colour, markersize=2, alpha=0.35, rasterized=True)
            axis.boxplot(
                values, positions=[place], widths=0.6, showfliers=False, whis=(5, 95),
                medianprops={"color": "black", "linewidth": 1.2}, boxprops={"linewidth": 0.8},
            )  # fmt: skip
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(one.diagnostics.set_name)
        axis.grid(axis="y")
    axes[0].set_ylabel("KL(base ‖ tuned) (nats)")
    return (
        "Divergence of the next-token distributions where the answer begins, by outcome (number of questions below). "
        "Right or wrong goes by which of yes and no is the likelier first token. Boxes: quartiles and median; "
        f"whiskers: 5% and 95%; at most 400 dots each. {_compared(answered)}"
    ), figure


def _compared(answered: list[_Answered]) -> str:
    """Which two models the diagnostics are of."""
    meta = answered[0].diagnostics.meta
    return f"Base: {meta['base']}; tuned: {meta['tuned']}." if {"base", "tuned"} <= meta.keys() else ""


def _gap(answered: list[_Answered]) -> tuple[str, Figure]:
    from matplotlib.figure import Figure

    count = len(answered)
    figure = Figure(figsize=(NARROW if count == 1 else WIDE, 5.0), layout="constrained")
    grid = figure.subplots(2, count, squeeze=False, height_ratios=(3, 2))
    for upper, lower, one in zip(grid[0], grid[1], answered, strict=True):
        base, tuned = one.diagnostics.base_gap, one.diagnostics.tuned_gap
        for name, colour, chosen in one.outcomes():
            size = 2.5 if name.startswith("kept") else 3.5
            upper.plot(
                base[chosen], tuned[chosen], ".", color=colour, markersize=size, alpha=0.5, rasterized=True,
                zorder=2 if name.startswith("kept") else 3,
            )  # fmt: skip
            if upper is grid[0][0]:
                upper.plot([], [], "o", color=colour, markersize=4, label=name)
        ends = np.array([min(base.min(), tuned.min()), max(base.max(), tuned.max())])
        upper.plot(ends, ends, color="#888888", linewidth=0.7, linestyle=":")
        upper.axhline(0, color=BASELINE, linewidth=0.6)
        upper.axvline(0, color=BASELINE, linewidth=0.6)
        upper.set(title=one.diagnostics.set_name, xlabel="base: logit(yes) − logit(no)")
        change = tuned - base
        span = np.quantile(change, [0.005, 0.995])
        edges = np.linspace(min(span[0], -1e-3), max(span[1], 1e-3), 31)
        for truth, colour, label in ((True, PALETTE[0], "yes-questions"), (False, PALETTE[1], "no-questions")):
            values = change[one.truth == truth]
            if len(values):
                lower.hist(np.clip(values, edges[0], edges[-1]), edges, color=colour, alpha=0.55, label=label)
                lower.axvline(np.median(values), color=colour, linewidth=1.2, linestyle="--")
        lower.axvline(0, color=BASELINE, linewidth=0.6)
        lower.set(xlabel="change of the gap")
    grid[0][0].set_ylabel("tuned: logit(yes) − logit(no)")
    grid[1][0].set_ylabel("questions")
    handles = [*grid[0][0].get_legend_handles_labels()[0], *grid[1][0].get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1.2)
    return (
        "Above: the gap between the logits of yes and no at the first token of the answer; right of and above the "
        "lines is yes, on the dotted line nothing changed. Below: the change of that gap; dashed: medians. A tuned "
        "model that is only more reluctant moves both kinds of questions alike. The 1% at the ends is in the outermost "
        "bars. "
        f"{_compared(answered)}"
    ), figure


def _depth(answered: list[_Answered]) -> tuple[str, Figure]:
    def all_of(key: str) -> np.ndarray:
        return np.concatenate([getattr(one.diagnostics, key) for one in answered])

    first = answered[0].diagnostics
    figure, (left, right) = _panels(2, 2.6)
    change = all_of("hidden_change")
    _quartiles(left, np.arange(change.shape[1]), change, PALETTE[0], None)
    _name_depths(left, first.depth_names)
    left.set(ylabel="‖tuned − base‖ / ‖base‖", title="change of the hidden state by depth", ylim=(0, None))
    layers = np.arange(1, first.attention_base.shape[1] + 1)
    _quartiles(right, layers, 100 * all_of("attention_base"), BASELINE, "base")
    _quartiles(right, layers, 100 * all_of("attention_tuned"), PALETTE[1], "tuned")
    places, names = [int(n) for n in _some(len(layers))], [str(n) for n in _some(len(layers))]
    if first.attention_block is not None:
        block = 100 * all_of("attention_block")
        own = len(layers) + 0.5 + np.arange(1, block.shape[1] + 1)
        low, middle, high = np.quantile(block, [0.25, 0.5, 0.75], axis=0)
        right.errorbar(
            own, middle, [middle - low, high - middle], color=PALETTE[2], fmt="D", markersize=4, label="post block"
        )
        right.axvline(len(layers) + 0.75, color="#bbbbbb", linewidth=0.6)
        places, names = [*places, *own], [*names, *(f"b{n}" for n in range(1, block.shape[1] + 1))]
    right.set_xticks(places, names)
    right.set(xlabel="layer", ylabel="share (%)", title="attention that goes to the picture", ylim=(0, None))
    right.legend()
    for axis in (left, right):
        axis.grid(axis="y")
    sets = ", ".join(one.diagnostics.set_name for one in answered)
    return (
        "Left: relative change of the hidden state at the position that predicts the answer. Right: share of the "
        "attention that goes to the picture's tokens from there, mean over heads. Lines: medians over the questions; "
        f"bands: quartiles ({sets}). {_compared(answered)}"
    ), figure


def _quartiles(axis: Axes, places: np.ndarray, values: np.ndarray, colour: str, label: str | None) -> None:
    """Median and quartiles of (Q, D) values over the questions."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(places, middle, color=colour, marker="o", markersize=2.5, label=label)


def _some(count: int) -> list[int]:
    """Layers from 1 to ``count`` that a short axis has room to name."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, count) if count / step <= 9)
    return [number for number in range(1, count + 1) if number % step == 0 or number == 1 or step == 1]


def _name_depths(axis: Axes, names: Sequence[str]) -> None:
    numbers = {name: int(name.split()[-1]) for name in names if re.fullmatch(r"layer \d+", name)}
    shown = set(_some(len(numbers))) if numbers else set()
    kept = [(place, name) for place, name in enumerate(names) if name not in numbers or numbers[name] in shown]
    axis.set_xticks([place for place, _ in kept], [str(numbers.get(name, name)) for _, name in kept])
    for tick in axis.get_xticklabels():
        if not tick.get_text().isdecimal():
            tick.set_rotation(90)
    axis.set_xlabel("layer")


# Answers that changed


def changed(baseline: Run, run: Run) -> dict[str, tuple[int, int, int]]:
    """By set: how many questions ``run`` has fixed and broken, of how many that both answered."""
    counts = {}
    for name, pairs in _pairs(baseline, run).items():
        before, after, truth = (
            np.array(values, dtype=bool)
            for values in zip(
                *((baseline.sets[name].said[b], run.sets[name].said[a], run.sets[name].truth[a]) for b, a in pairs),
                strict=True,
            )
        )
        turned = before != after
        counts[name] = (int((turned & (after == truth)).sum()), int((turned & (after != truth)).sum()), len(pairs))
    return counts


def _pairs(baseline: Run, run: Run) -> dict[str, list[tuple[int, int]]]:
    """By set that both answered: the places of each shared question in either, in the order of the label file."""
    shared = {}
    for name in run.sets:
        if name in baseline.sets:
            before = {number: place for place, number in enumerate(baseline.sets[name].ids.tolist())}
            ids = run.sets[name].ids.tolist()
            if pairs := [(before[number], place) for place, number in enumerate(ids) if number in before]:
                shared[name] = pairs
    return shared


def flips(baseline: Run, run: Run, diagnostics: Mapping[str, Diagnostics] | None = None, most: int = 8) -> list[Flip]:
    """At most ``most`` questions that ``run`` has fixed and as many that it has broken, adversarial ones first.

    In the order of the label files; a question of several sets counts once, and a second question about a picture waits
    until no other picture is left. Pictures are looked for where the run's POPE card says (``coco_path``), maps in
    ``diagnostics`` (by set).
    """
    kept: dict[bool, list[Flip]] = {True: [], False: []}
    waiting: dict[bool, list[Flip]] = {True: [], False: []}
    seen: set[tuple[str, str]] = set()
    pictures = _picture_folder(run)
    shared = _pairs(baseline, run)
    for name in sorted(shared, key=lambda name: (name != "adversarial", list(shared).index(name))):
        old, new = baseline.sets[name], run.sets[name]
        for before, after in shared[name]:
            image, question = str(new.images[after]), new.questions[after]
            if old.said[before] == new.said[after] or (image, question) in seen:
                continue
            seen.add((image, question))
            fixed = bool(new.said[after] == new.truth[after])
            picture = pictures / image if pictures is not None else None
            flip = Flip(
                set_name=name,
                question_id=int(new.ids[after]),
                image=image,
                picture=picture if picture is not None and picture.is_file() else None,
                question=question,
                label="yes" if new.truth[after] else "no",
                before=old.texts[before],
                after=new.texts[after],
                fixed=fixed,
                **_maps((diagnostics or {}).get(name), int(new.ids[after])),
            )
            again = any(flip.image == other.image for other in kept[fixed])
            (waiting if again else kept)[fixed].append(flip)
    return [flip for fixed in (True, False) for flip in [*kept[fixed], *waiting[fixed]][:most]]


def _maps(diagnostics: Diagnostics | None, number: int) -> dict[str, Any]:
    if diagnostics is None or not (places := np.flatnonzero(diagnostics.ids == number)).size:
        return {}
    held = {"map_base": diagnostics.maps_base, "map_tuned": diagnostics.maps_tuned, "map_block": diagnostics.map_block}
    maps = {key: np.asarray(values[places[0]], dtype=np.float32) for key, values in held.items() if values is not None}
    return {**maps, "padded": diagnostics.meta.get("image_aspect_ratio") == "pad"}


def _picture_folder(run: Run) -> Path | None:
    """Where the run's POPE card says the pictures lie; None where that is not on this disk."""
    given = run.card.get("arguments", {}).get("coco_path")
    if not given:
        return None
    folder = Path(run.card.get("working_directory", ".")) / Path(given).expanduser()
    inside = folder / "val2014"
    return next((place for place in (inside, folder) if place.is_dir()), None)


def shown_flips(
    comparison: Comparison, diagnostics: Mapping[str, Mapping[str, Diagnostics]], quiet: bool = False
) -> dict[str, list[Flip]]:
    """``flips`` by name of the run, of the runs that are looked at closely: the best one and those with diagnostics.

    Of a group with several seeds the first with diagnostics, else the first. Unless ``quiet``, a note where pictures
    are not on this disk.
    """
    ordered = by_accuracy(comparison)
    groups = [g for n, g in enumerate(ordered) if n == 0 or any(diagnostics.get(run.name) for run in g.runs)]
    found = {}
    for group in groups[:RUNS_LOOKED_AT]:
        base = comparison.baseline_of(group)
        if base is None:
            continue
        run = next((run for run in group.runs if diagnostics.get(run.name)), group.runs[0])
        found[run.name] = flips(base.runs[0], run, diagnostics.get(run.name))
        missing = [flip for flip in found[run.name] if flip.picture is None]
        if missing and not quiet:
            place = run.card.get("arguments", {}).get("coco_path")
            note(
                f"{len(missing)} changed answers are shown without their picture: {missing[0].image} is not in {place}"
            )
    return found


def picture_of(flip: Flip) -> Image.Image | None:
    """The picture in RGB, as it lies on disk; None where it is not there or cannot be opened."""
    try:
        return Image.open(flip.picture).convert("RGB") if flip.picture is not None else None
    except OSError:
        note(f"{flip.picture}: cannot be opened as a picture; its answers are shown without it")
        return None


def views(flip: Flip, side: int = 224) -> dict[str, Image.Image]:
    """What is shown of a flip, by name: its picture, and ``side`` pixels squared of maps over what the model saw."""
    picture = picture_of(flip)
    if picture is None:
        return {}
    shown = {"picture": picture}
    if flip.map_tuned is not None:
        shown["attention, tuned"] = overlay(picture, flip.map_tuned, flip.padded, side)
        if flip.map_base is not None and not np.array_equal(flip.map_base, flip.map_tuned):
            shown["tuned − base"] = overlay(picture, flip.map_tuned - flip.map_base, flip.padded, side, signed=True)
    if flip.map_block is not None:
        shown["post block"] = overlay(picture, flip.map_block, flip.padded, side)
    return shown


MORE: Colour = (213, 60, 0)
LESS: Colour = (0, 90, 200)


def overlay(picture: Image.Image, weights: np.ndarray, padded: bool, side: int, signed: bool = False) -> Image.Image:
    """A (g, g) map over the square that the model saw, ``side`` pixels wide.

    The stronger, the more the colour covers the picture; the largest value covers it most. ``signed``: orange where the
    map is positive, blue where it is negative.
    """
    square = seen_square(picture, padded).resize((side, side), Image.Resampling.BICUBIC)
    values = np.asarray(weights, dtype=np.float32)
    values = values if signed else values - values.min()
    largest = float(np.abs(values).max()) or 1.0
    fine = np.asarray(Image.fromarray(values / largest).resize((side, side), Image.Resampling.BICUBIC))
    fine = fine.clip(-1 if signed else 0, 1)  # bicubic overshoots
    cover = 0.85 * np.abs(fine)[..., None]
    colour = np.where(fine[..., None] >= 0, np.array(MORE, dtype=np.float32), np.array(LESS, dtype=np.float32))
    # Greyed, so that the colour is the map's and not the picture's.
    grey = np.asarray(Image.blend(square, square.convert("L").convert("RGB"), 0.7), dtype=np.float32)
    return Image.fromarray(np.rint((1 - cover) * grey + cover * colour).astype(np.uint8))


def seen_square(picture: Image.Image, padded: bool) -> Image.Image:
    """What the model saw of a picture: all of it, padded to a square of its longer side, else its centre crop."""
    width, height = picture.size
    side = max(width, height) if padded else min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.new("RGB", (side, side), (122, 116, 104))  # CLIP's mean colour, which the model's padding has
    square.paste(picture, (-left, -top))
    return square


def _flips(shown: list[Flip]) -> tuple[str, Figure] | None:
    """Every flip a cell: its pictures side by side, and below them the question and both answers."""
    from matplotlib.figure import Figure

    cells = [(flip, pictures) for flip in shown if (pictures := views(flip))]
    if not cells:
        return None
    across = max(len(pictures) for _, pictures in cells)
    columns = {1: 4, 2: 3, 3: 2}.get(across, 2)
    gap, line = 0.14, 0.115  # inches
    wide = (WIDE - gap * (columns + 1)) / columns
    image = (wide - 0.04 * (across - 1)) / across
    texts = [_texts(flip, int(wide / 0.05)) for flip, _ in cells]
    rows: list[tuple[str | None, list[int]]] = []
    for title, fixed in (("Fixed", True), ("Broken", False)):
        own = [number for number, (flip, _) in enumerate(cells) if flip.fixed == fixed]
        for start in range(0, len(own), columns):
            rows.append((title if start == 0 else None, own[start : start + columns]))
    named = 0.12 if across > 1 else 0.0
    heights = [
        (0.28 if title else 0) + named + image + line * max(len(texts[n]) for n in own) + 0.2 for title, own in rows
    ]
    total = sum(heights) + 0.05
    figure = Figure(figsize=(WIDE, total))
    top = total
    for (title, own), height in zip(rows, heights, strict=True):
        start = top - (0.28 if title else 0)
        if title:
            figure.text(gap / WIDE, (top - 0.2) / total, title, fontsize=9, fontweight="bold")
        for column, number in enumerate(own):
            left = gap + column * (wide + gap)
            for place, (name, picture) in enumerate(cells[number][1].items()):
                x, y = left + place * (image + 0.04), start - named - image
                axis = figure.add_axes((x / WIDE, y / total, image / WIDE, image / total))
                axis.imshow(picture)
                axis.set_axis_off()
                axis.set_anchor("N")
                if across > 1:
                    figure.text((x + image / 2) / WIDE, (start - 0.09) / total, name, fontsize=5.5, ha="center")
            for place, (text, colour, weight) in enumerate(texts[number]):
                y = start - named - image - line * (place + 1)
                figure.text(left / WIDE, y / total, text, fontsize=6.5, color=colour, fontweight=weight)
        top -= height
    maps = f" {ABOUT_MAPS}" if across > 1 else ""
    return f"Questions that the tuned model answers the other way than the baseline.{maps}", figure


def _texts(flip: Flip, width: int) -> list[tuple[str, str, str]]:
    """Lines below a picture as (text, colour, weight)."""
    right, wrong = OUTCOMES["fixed"][2], OUTCOMES["broken"][2]
    first, second = ((wrong, "✗"), (right, "✓")) if flip.fixed else ((right, "✓"), (wrong, "✗"))
    parts = [
        (flip.question, "black", "bold"),
        (f"label: {flip.label} ({flip.set_name})", "#555555", "normal"),
        (f"before {first[1]} {flip.before}", first[0], "normal"),
        (f"after {second[1]} {flip.after}", second[0], "normal"),
    ]
    return [
        (line, colour, weight)
        for text, colour, weight in parts
        for line in textwrap.wrap(
            " ".join(text.split()), round(width * (0.88 if weight == "bold" else 1)), max_lines=2, placeholder=" …"
        )
    ]
