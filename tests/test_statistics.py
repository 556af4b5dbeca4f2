"""Counts, metrics, resampled pictures, intervals and curves, against figures worked by hand or recorded elsewhere."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from llava.eval.pope import Confusion
from llava.eval.statistics import (
    COUNTS,
    METRICS,
    Bootstrap,
    auroc,
    expected_confusion,
    holm,
    image_counts,
    interval,
    mean_deviation,
    metrics,
    precision_recall,
    said_at_ratio,
    weighted_auroc,
)

# Recorded with scipy 1.17.1, scikit-learn 1.9.1, numpy 2.4.6.
TRUTH = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1], dtype=bool)
SCORES = np.array([0.9, 0.9, 0.8, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.3, 0.3, 0.05])


def test_no_torch():
    code = "import sys, llava.eval.statistics; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_answers_are_counted_by_picture():
    images = np.array(["b", "a", "a", "b", "a"])
    truth = np.array([True, True, False, False, False])
    said = np.array([True, False, True, False, False])
    counts = image_counts(images, truth, said, ["c", "b", "a"])
    assert counts.dtype == np.int64
    assert counts.tolist() == [[0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1]]  # tp, fp, tn, fn
    shared = image_counts(images, truth, np.array([1.0, 0.25, 0.5, 0.0, 0.0]), ["a", "b"])
    assert shared.tolist() == [[0.25, 0.5, 1.5, 0.75], [1.0, 0.0, 1.0, 0.0]]
    assert shared.sum(axis=0).tolist() == expected_confusion(truth, np.array([1.0, 0.25, 0.5, 0.0, 0.0])).tolist()


@pytest.mark.parametrize(
    ("pictures", "what"), [(["a"], "the picture b is not among"), (["a", "b", "a"], "1 pictures are named twice")]
)
def test_pictures_that_do_not_fit_are_refused(pictures, what):
    with pytest.raises(ValueError, match=what):
        image_counts(np.array(["a", "b"]), np.array([True, True]), np.array([True, True]), pictures)


def test_metrics_are_those_of_pope():
    # LLaVA-1.5-7B on POPE's popular set: 1360 of 1500 yes-questions, 274 of 1500 no-questions answered yes.
    found = metrics(np.array([[1360, 274, 1226, 140], [0, 0, 5, 5], [0, 0, 0, 0]]))
    assert tuple(found) == METRICS
    assert {name: round(float(values[0]), 6) for name, values in found.items()} == {
        "accuracy": 0.862,  # 2586 / 3000
        "precision": 0.832313,  # 1360 / 1634
        "recall": 0.906667,  # 1360 / 1500
        "f1": 0.867900,  # 2720 / 3134
        "yes_ratio": 0.544667,  # 1634 / 3000
    }
    assert [values[1] for values in found.values()] == [0.5, 0, 0, 0, 0]
    assert [values[2] for values in found.values()] == [0, 0, 0, 0, 0]
    one = Confusion(tp=7, fp=2, tn=9, fn=3)
    numbers = metrics(np.array([getattr(one, count) for count in COUNTS]))
    assert all(math.isclose(numbers[name], getattr(one, name)) for name in METRICS)


def test_three_pictures_are_drawn_in_all_27_ways_alike():
    counts = np.array([[1, 0, 2, 0], [0, 3, 0, 1], [2, 1, 1, 1]])
    expected = Counter(tuple(counts[list(drawn)].sum(axis=0)) for drawn in itertools.product(range(3), repeat=3))
    times = 50_000
    found = Counter(map(tuple, Bootstrap(["x", "y", "z"], times).draws(counts).astype(int).tolist()))
    assert found.keys() == expected.keys()
    for total, ways in expected.items():
        chance = ways / 27
        assert abs(found[total] - times * chance) < 4 * math.sqrt(times * chance * (1 - chance)), total


def test_draws_are_paired_and_depend_on_names_and_seed_alone():
    counts = np.array([[1, 0, 0, 0], [0, 10, 0, 0], [0, 0, 100, 0], [0, 0, 0, 1000]])
    boot = Bootstrap(["a", "b", "c", "d"], 500, seed=7)
    drawn = boot.draws(counts)
    assert (drawn @ [1, 0.1, 0.01, 0.001] == pytest.approx(4)) and (boot.weights.sum(axis=1) == 4).all()
    turned = Bootstrap(["c", "a", "d", "b"], 500, seed=7)
    assert (turned.draws(counts[[2, 0, 3, 1]]) == drawn).all()
    assert (boot.draws(np.hstack([counts, 2 * counts])) == np.hstack([drawn, 2 * drawn])).all()
    assert not (Bootstrap(["a", "b", "c", "d"], 500, seed=8).draws(counts) == drawn).all()


def test_counts_too_large_for_float32_and_shares_are_exact():
    boot = Bootstrap(["a", "b", "c"], 200)
    large = np.array([[1 << 40], [1], [3]])
    assert (boot.draws(large)[:, 0] == [int(a) * (1 << 40) + int(b) + 3 * int(c) for a, b, c in boot.weights]).all()
    assert boot.draws(np.array([[0.1], [0.2], [0.3]]))[:, 0] == pytest.approx(boot.weights @ [0.1, 0.2, 0.3], abs=1e-6)


def test_many_resamples_need_no_more_than_their_weights():
    boot = Bootstrap([f"picture {number:04}" for number in range(500)])
    assert boot.weights.shape == (10_000, 500) and boot.weights.nbytes == 20_000_000
    assert (boot.weights.sum(axis=1) == 500).all()
    # A picture is drawn Binomial(500, 1/500) times: of variance 1 - 1/500.
    assert float(boot.weights.var()) == pytest.approx(1 - 1 / 500, rel=0.01)


@pytest.mark.parametrize(("pictures", "times"), [([], 10), (["a"], 0), (["a", "a"], 10)])
def test_a_bootstrap_of_nothing_is_refused(pictures, times):
    with pytest.raises(ValueError):
        Bootstrap(pictures, times)


def test_counts_of_other_pictures_are_refused():
    with pytest.raises(ValueError, match="counts of 3 pictures, but 2"):
        Bootstrap(["a", "b"], 5).draws(np.zeros((3, 4), dtype=int))


def test_interval_of_a_difference_of_accuracy_is_scipys():
    # 20 pictures of 6 questions, right answers by two models. scipy.stats.bootstrap((a, b), difference of means / 6,
    # paired=True, method="percentile", n_resamples=100000), seeds 0, 1 and 2: 0.0250 to 0.1083.
    first = [5, 6, 4, 6, 3, 5, 6, 6, 2, 5, 4, 6, 5, 3, 6, 5, 4, 6, 5, 5]
    second = [5, 5, 4, 6, 2, 5, 6, 5, 2, 4, 4, 6, 3, 3, 6, 5, 3, 6, 5, 4]
    boot = Bootstrap([f"{number:02}" for number in range(20)], 20_000)
    drawn = [
        metrics(boot.draws(np.array([[right, 6 - right, 0, 0] for right in model])))["accuracy"]
        for model in (first, second)
    ]
    found = interval((sum(first) - sum(second)) / 120, drawn[0] - drawn[1])
    assert found.value == pytest.approx(8 / 120)
    assert (found.low, found.high) == pytest.approx((0.025, 0.108333), abs=0.0005)


def test_interval_of_a_difference_of_ratios_is_scipys():
    # The same call for a difference of precisions:
    # -0.3503 to 0.1513 with seed 0, -0.3484 to 0.1517 with 1, -0.3508 to 0.1520 with 2.
    tp = [2, 3, 0, 3, 1, 2, 2, 1, 3, 0, 1, 1, 2, 1, 0, 0, 0, 0, 0, 3]
    fp = [0, 2, 3, 0, 1, 1, 1, 3, 0, 3, 3, 3, 0, 1, 2, 1, 2, 2, 2, 0]
    other_tp = [3, 2, 3, 1, 1, 3, 0, 0, 1, 2, 0, 3, 1, 0, 2, 3, 3, 3, 1, 0]
    other_fp = [3, 2, 3, 0, 0, 2, 1, 1, 3, 0, 2, 1, 1, 3, 0, 1, 0, 0, 1, 2]
    boot = Bootstrap([f"{number:02}" for number in range(20)], 20_000)
    zeros = [0] * 20
    drawn = [
        metrics(boot.draws(np.array([*zip(*columns, zeros, zeros, strict=True)])))["precision"]
        for columns in ((tp, fp), (other_tp, other_fp))
    ]
    found = interval(25 / 55 - 29 / 58, drawn[0] - drawn[1])
    assert (found.low, found.high) == pytest.approx((-0.350, 0.1517), abs=0.008)


def test_p_counts_the_resamples_beyond_zero():
    draws = np.concatenate([np.full(3, -0.5), np.full(1, 0.0), np.full(95, 0.5)])
    found = interval(0.4, draws)
    assert found.p == pytest.approx(2 * (1 + 4) / 100)  # 4 of 99 at or below zero
    assert found == interval(0.4, draws[::-1])
    assert interval(-0.4, -draws).p == found.p
    assert interval(0.1, np.full(99, 0.1)).p == pytest.approx(0.02)  # 2 / 100: never 0
    assert interval(0.0, np.zeros(100)) == (0.0, 0.0, 0.0, 1.0)


def test_ends_are_linear_quantiles():
    found = interval(0.0, np.arange(101.0), level=0.9)
    assert (found.low, found.high) == pytest.approx((5.0, 95.0))
    assert interval(0.0, np.array([0.0, 1.0]), level=0.5)[1:3] == (0.25, 0.75)


def test_small_p_and_an_interval_beside_zero_agree():
    for beyond, apart in ((248, True), (249, True), (251, False), (252, False)):
        draws = np.concatenate([np.full(beyond, -1.0), np.full(10_000 - beyond, 1.0)])
        found = interval(1.0, draws)
        assert (found.p < 0.05) == apart and (found.low > 0) == apart, beyond
    draws = np.concatenate([np.full(250, -1.0), np.full(9750, 1.0)])
    assert interval(1.0, draws).p == pytest.approx(502 / 10_001) and interval(1.0, draws).low > 0  # the one exception


def test_holm():
    # Sorted: 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, 0.04 x 1 < 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_mean_and_deviation_over_seeds():
    mean, deviation = mean_deviation([88.5, 89.0, 89.8])
    assert mean == pytest.approx(89.1)
    assert deviation == pytest.approx(math.sqrt((0.36 + 0.01 + 0.49) / 2))
    assert mean_deviation([0.5]) == (0.5, None)


def test_auroc():
    # scipy.stats.mannwhitneyu(SCORES[TRUTH], SCORES[~TRUTH]): U 19.5, of 36 pairs.
    # sklearn.metrics.roc_auc_score(TRUTH, SCORES): 0.541667.
    assert auroc(TRUTH, SCORES) == pytest.approx(19.5 / 36)
    assert auroc(~TRUTH, -SCORES) == pytest.approx(19.5 / 36)
    assert auroc([True, False], [0.5, 0.5]) == 0.5
    assert math.isnan(auroc([True, True], [0.1, 0.2])) and math.isnan(auroc([], []))


def test_weighted_auroc_counts_questions_as_often_as_they_weigh():
    weights = np.array([2, 0, 1, 3, 1, 1, 0, 2, 1, 1, 0, 1])
    # sklearn.metrics.roc_auc_score(TRUTH, SCORES, sample_weight=weights)
    assert weighted_auroc(TRUTH, SCORES, weights) == pytest.approx(0.7)
    both = weighted_auroc(TRUTH, SCORES, np.stack([weights, np.ones(12), TRUTH]))
    assert both[:2] == pytest.approx([0.7, 19.5 / 36]) and np.isnan(both[2])


def test_precision_and_recall_by_threshold():
    # sklearn.metrics.precision_recall_curve(TRUTH, SCORES)
    precision, recall, thresholds = precision_recall(TRUTH, SCORES)
    assert thresholds.tolist() == [0.05, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert precision == pytest.approx([1 / 2, 5 / 11, 5 / 9, 1 / 2, 4 / 7, 1 / 2, 2 / 3, 1 / 2, 1])
    assert recall == pytest.approx([1, 5 / 6, 5 / 6, 4 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def test_threshold_at_a_share_of_yes():
    assert said_at_ratio(SCORES, 3 / 12).tolist() == [1, 1, 1, *[0] * 9]
    shared = said_at_ratio(SCORES, 4 / 12)  # one yes is left for the three that score 0.7
    assert shared == pytest.approx([1, 1, 1, 1 / 3, 1 / 3, 1 / 3, *[0] * 6])
    # yes labels: 0.9, 0.8 and a third of one at 0.7; no labels: 0.9 and two thirds
    assert expected_confusion(TRUTH, shared) == pytest.approx([7 / 3, 5 / 3, 13 / 3, 11 / 3])
    assert said_at_ratio(SCORES, 0).sum() == 0 and said_at_ratio(SCORES, 1).sum() == 12
    for answers in range(13):
        assert said_at_ratio(SCORES, answers / 12).sum() == pytest.approx(answers)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        said_at_ratio(SCORES, 54.3)
