"""What the figures of a comparison rest on: counts per picture, resampled pictures, intervals, and curves over scores.

Several questions ask about one picture and their answers go together, so pictures are resampled and not questions: the
bootstrap of clusters (Davison and Hinkley 1997, section 3.8; Field and Welsh 2007). All models are resampled by the
same draws, which pairs their differences. numpy only, free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
COUNTS = ("tp", "fp", "tn", "fn")

_DRAWN_AT_ONCE = 1 << 20  # numbers; bounds what a Bootstrap needs beside its weights
_EXACT_IN_FLOAT32 = 1 << 24  # whole numbers below this, and sums that stay below it, are exact


class Interval(NamedTuple):
    """A figure, the two ends of its interval, and the two-sided p of "it is zero"."""

    value: float
    low: float
    high: float
    p: float


def image_counts(
    answers_images: np.ndarray, truth: np.ndarray, said: np.ndarray, pictures: Sequence[str]
) -> np.ndarray:
    """Answers counted by picture, 'yes' being the positive class.

    Args:
        answers_images: (Q,) the picture each question asks about.
        truth: (Q,) bool, the label is yes.
        said: (Q,) bool, the answer is yes; or float, the share of it that is (``said_at_ratio``).
        pictures: the I pictures to count by; those nobody asked about get zeros.

    Returns:
        (I, 4): tp, fp, tn, fn in the order of ``pictures``; int64, or float64 where ``said`` is float.

    Raises:
        ValueError: a picture is named twice in ``pictures``, or one of ``answers_images`` is not in it.
    """
    names, places = _sorted_names(pictures)
    images = np.asarray(answers_images, dtype=np.str_)
    found = np.searchsorted(names, images)
    known = found < len(names)
    known[known] = names[found[known]] == images[known]
    if not known.all():
        raise ValueError(f"the picture {images[~known][0]} is not among the pictures to count by")
    row = places[found]
    shares = _shares(truth, said)
    counts = np.stack([np.bincount(row, weights=share, minlength=len(names)) for share in shares], axis=1)
    return counts if np.asarray(said).dtype.kind == "f" else np.rint(counts).astype(np.int64)


def _sorted_names(pictures: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Names in order, and where each of them stands in ``pictures``."""
    given = np.asarray(pictures, dtype=np.str_)
    names, places = np.unique(given, return_index=True)
    if len(names) < len(given):
        raise ValueError(f"{len(given) - len(names)} pictures are named twice")
    return names, places


def _shares(truth: np.ndarray, said: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    yes = np.asarray(truth, dtype=bool).astype(np.float64)
    share = np.asarray(said, dtype=np.float64)
    return yes * share, (1 - yes) * share, (1 - yes) * (1 - share), yes * (1 - share)


def expected_confusion(truth: np.ndarray, said_fraction: np.ndarray) -> np.ndarray:
    """(4,) tp, fp, tn, fn of answers that are yes to the given share each, (Q,) in 0..1: expected counts, float64."""
    return np.array([share.sum() for share in _shares(truth, said_fraction)])


def metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of ``METRICS`` as a fraction, (...,), from counts (..., 4) of tp, fp, tn, fn.

    The formulas of POPE's ``evaluate.py`` (Li et al., EMNLP 2023), 0.0 where they divide by zero.
    """
    tp, fp, tn, fn = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    total = tp + fp + tn + fn
    return {
        "accuracy": _ratio(tp + tn, total),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(tp + fp, total),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole != 0)


class Bootstrap:
    """Resamples of pictures, the same for every model and every set: their differences are paired.

    Each resample draws as many pictures as there are, with replacement (Efron and Tibshirani 1993, chapter 6). What is
    drawn depends on the names and the seed alone, not on the order in which the names are given.

    Attributes:
        pictures: the I names, in the order given.
        times: the number of resamples.
        weights: (times, I) float32, how often a resample holds a picture; columns in the order of ``pictures``.

    Raises:
        ValueError: no pictures, a picture named twice, or ``times`` below 1.
    """

    def __init__(self, pictures: Sequence[str], times: int = 10_000, seed: int = 0) -> None:
        _, places = _sorted_names(pictures)
        if not len(places) or times < 1:
            raise ValueError("a bootstrap needs at least one picture and one resample")
        self.pictures = tuple(pictures)
        self.times = times
        number = len(places)
        generator = np.random.default_rng(seed)
        self.weights = np.empty((times, number), dtype=np.float32)
        rows_at_once = max(1, _DRAWN_AT_ONCE // number)
        for start in range(0, times, rows_at_once):
            rows = min(rows_at_once, times - start)
            drawn = generator.integers(number, size=(rows, number))
            drawn += np.arange(rows)[:, None] * number
            counted = np.bincount(drawn.ravel(), minlength=rows * number).reshape(rows, number)
            self.weights[start : start + rows, places] = counted

    def draws(self, counts: np.ndarray) -> np.ndarray:
        """Totals of every resample, (times, K) float64, of counts (I, K) whose rows are in the order of ``pictures``.

        K is 4 for one model on one set; the columns of several may be put side by side.
        """
        counts = np.asarray(counts)
        if counts.shape[0] != len(self.pictures):
            raise ValueError(f"counts of {counts.shape[0]} pictures, but {len(self.pictures)} are resampled")
        largest = np.abs(counts).max(initial=0) * counts.shape[0]
        if counts.dtype.kind in "biu" and largest < _EXACT_IN_FLOAT32:
            return (self.weights @ counts.astype(np.float32)).astype(np.float64)
        totals = np.empty((self.times, *counts.shape[1:]))
        rows_at_once = max(1, _DRAWN_AT_ONCE // counts.shape[0])
        for start in range(0, self.times, rows_at_once):
            rows = self.weights[start : start + rows_at_once].astype(np.float64)
            totals[start : start + rows_at_once] = rows @ counts
        return totals


def interval(value: float, draws: np.ndarray, level: float = 0.95) -> Interval:
    """Percentile interval of a figure from its resamples (times,), and the two-sided p of "it is zero".

    The ends are numpy's linear quantiles (Efron and Tibshirani 1993, section 13.3). p is the achieved significance
    level with one added to each count, 2 min((1 + #{d <= 0}), (1 + #{d >= 0})) / (times + 1), at most 1: never 0, and 1
    where all resamples are 0.

    With 10,000 resamples p < 0.05 implies that the 95% interval leaves out 0. The reverse fails where exactly 250
    resamples lie on the far side of 0 (p 0.0502), and the end, which lies between the 250th and the 251st, beside it.
    """
    draws = np.asarray(draws, dtype=np.float64)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    fewer = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    return Interval(float(value), float(low), float(high), min(1.0, 2 * (1 + fewer) / (len(draws) + 1)))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number, in the order given (Holm 1979, step down): monotone and at most 1."""
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def mean_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample deviation (divided by n - 1) of values; the deviation of one value is None."""
    numbers = np.asarray(values, dtype=np.float64)
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None


def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a question to be answered yes scores above one to be answered no, ties counted as half.

    The area under the ROC curve, which is Mann and Whitney's U over the number of pairs (Hanley and McNeil 1982).
    ``truth`` is (Q,) bool, ``scores`` (Q,). nan where one of the two kinds of questions is missing.
    """
    return float(weighted_auroc(truth, scores, np.ones((1, len(np.asarray(scores)))))[0])


def weighted_auroc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``auroc`` with question q counted ``weights[..., q]`` times: (...,) from weights (..., Q).

    For a bootstrap, a question's weight is its picture's. nan where one of the two kinds of questions has no weight.
    """
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    if not len(scores):
        return np.full(np.shape(weights)[:-1], np.nan)
    order = np.argsort(scores, kind="stable")
    ordered = np.asarray(weights, dtype=np.float64)[..., order]
    firsts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    yes = np.add.reduceat(ordered * truth[order], firsts, axis=-1)
    no = np.add.reduceat(ordered * ~truth[order], firsts, axis=-1)
    wins = (yes * (np.cumsum(no, axis=-1) - no / 2)).sum(axis=-1)
    pairs = yes.sum(axis=-1) * no.sum(axis=-1)
    return np.divide(wins, pairs, out=np.full(np.shape(pairs), np.nan), where=pairs > 0)


def precision_recall(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and recall of "yes where the score is at least t", as scikit-learn's ``precision_recall_curve``.

    ``truth`` is (Q,) bool, ``scores`` (Q,). The thresholds, (T,), are the distinct scores, ascending. Precision and
    recall, (T + 1,), belong to them, and end with the point 1, 0 that has no threshold. Where no label is yes, the
    recall is 1 at every threshold.
    """
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    thresholds, group = np.unique(scores, return_inverse=True)
    group = group.ravel()  # numpy 2.0 gives the input's shape
    tp = np.cumsum(np.bincount(group, weights=truth, minlength=len(thresholds))[::-1])[::-1]
    said = np.cumsum(np.bincount(group, minlength=len(thresholds))[::-1])[::-1]
    recall = tp / truth.sum() if truth.any() else np.ones(len(thresholds))
    return np.append(tp / said, 1.0), np.append(recall, 0.0), thresholds


def said_at_ratio(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Answers with the threshold where a share ``ratio`` of them is yes: (Q,) float64, 1 yes and 0 no.

    The highest scores are yes. Questions that tie at the threshold each get the same share of what is left, so that
    the sum is ``ratio * Q`` exactly.

    Raises:
        ValueError: ``ratio`` is not within 0..1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"a share of answers lies within 0..1, not {ratio}")
    scores = np.asarray(scores, dtype=np.float64)
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    before = np.cumsum(sizes) - sizes
    # ratio * Q is off a whole number by rounding where the ratio was itself counted.
    wanted = ratio * len(scores)
    wanted = float(np.rint(wanted)) if abs(wanted - np.rint(wanted)) < 1e-6 else wanted
    return np.clip((wanted - before) / sizes, 0, 1)[group.ravel()]
