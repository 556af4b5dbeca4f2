#!/usr/bin/env python
"""What our first-epoch DPO step costs as prompts, answers and questions per picture grow, and the law behind it.

    python benchmarks/scaling.py --png docs/scaling.png --json scaling.json

Every step is timed in turns with all others. One law is fitted to all of them at once (least squares):

    seconds of a step = a + b * tokens + c * attended + d * predictions

with tokens of the stream (shared beginnings once), pairs of tokens of which one sees the other, and positions that
predict a label. Nothing takes less than no time: a term that would is left out. (A picture's tower is in ``b``: it
comes with 576 tokens.) A pair's time is a step's over its number of pairs.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import duel, examples, steps
from benchmarks.flops import Amount
from benchmarks.models import REAL, TINY, Geometry
from llava.files import write_json

TERMS = ("step", "tokens", "attended", "predictions")


class Series(NamedTuple):
    """One panel: what is varied, at which values, and the pairs of a step as a function of it."""

    name: str
    values: tuple[int, ...]
    pairs: int
    draw: Any  # value -> examples.Drawing


def all_series(geometry: Geometry, seed: int) -> list[Series]:
    descriptions = partial(examples.descriptions, geometry, 2, seed)
    questions = partial(examples.questions, geometry, 8, seed)
    around = examples.BEFORE_IMAGE + geometry.tokens_per_image
    return [
        Series(
            f"prompt, tokens ({geometry.tokens_per_image} of them a picture's)",
            tuple(around + question for question in (21, 128, 256, 512, 1024)),
            2,
            lambda value: partial(descriptions, question=value - around, answer=80),
        ),
        Series("answer, tokens", (10, 40, 80, 160, 320, 640), 2, lambda value: partial(descriptions, answer=value)),
        Series("questions per picture", (1, 2, 4, 8), 8, lambda value: partial(questions, per_image=value)),
    ]


def regressors(data: examples.Drawing, geometry: Geometry) -> list[float]:
    """The law's terms for a step."""
    amount = Amount.of(steps.our_inputs(data, geometry))
    return [1, amount.tokens, amount.attended, amount.queries]


def measure(series: list[Series], geometry: Geometry, seed: int, rounds: int) -> list[list[float]]:
    """Median seconds of a step, for every value of every series."""
    points = [one.draw(value) for one in series for value in one.values]
    runner = steps.our_dpo(geometry, points[0], seed)
    times: list[list[float]] = [[] for _ in points]
    for number in range(rounds + 1):
        for point, taken in zip(points, times, strict=True):
            runner.batch = partial(steps.our_inputs, point, geometry)
            start = time.perf_counter()
            runner.step()
            if number:  # the first round warms up
                taken.append(time.perf_counter() - start)
        print(f"round {number}/{rounds}", file=sys.stderr, flush=True)
    medians = iter([statistics.median(taken) for taken in times])
    return [[next(medians) for _ in one.values] for one in series]


def fit(terms: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares of relative errors: terms (n, 4), seconds (n,) -> coefficients (4,), none negative, and R²."""
    law, used = np.zeros(terms.shape[1]), np.arange(terms.shape[1])
    while len(used):
        found = np.linalg.lstsq(terms[:, used] / seconds[:, None], np.ones_like(seconds), rcond=None)[0]
        if (found >= 0).all():
            law[used] = found
            break
        # What a term would take off in all; units differ too much to compare the coefficients themselves.
        used = np.delete(used, np.argmin(found * terms[:, used].sum(0)))
    residual = ((seconds - terms @ law) ** 2).sum()
    return law, float(1 - residual / ((seconds - seconds.mean()) ** 2).sum())


def draw(
    series: list[Series], seconds: list[list[float]], law: np.ndarray, geometry: Geometry, title: str, file: Path
) -> None:
    """Three panels: measured points and the law."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for panel, one, taken in zip(panels, series, seconds, strict=True):
        between = sorted({round(v) for v in np.linspace(one.values[0], one.values[-1], 15)} | set(one.values))
        if one.values[-1] <= 10:
            between = list(one.values)
        curve = [np.dot(regressors(one.draw(value), geometry), law) / one.pairs for value in between]
        panel.plot(between, curve, color="tab:gray", label="law, fitted to all points at once")
        panel.plot(one.values, [t / one.pairs for t in taken], "o", ms=9, color="tab:blue", label="measured")
        panel.set_xlabel(one.name)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a pair")
    panels[0].legend(frameon=False, loc="upper left")
    figure.suptitle(title)
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = duel.options(__doc__, rounds=3)
    parser.add_argument("--png", type=Path, default=Path("docs/scaling.png"), help="the chart")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    geometry = TINY if args.tiny else REAL
    series = all_series(geometry, args.seed)
    seconds = measure(series, geometry, args.seed, args.rounds)
    terms = np.array([regressors(one.draw(value), geometry) for one in series for value in one.values], dtype=float)
    law, r2 = fit(terms, np.array([t for taken in seconds for t in taken]))

    print("| varied | value | pairs a step | seconds a pair | law |\n|---|---:|---:|---:|---:|")
    predicted = iter(terms @ law)
    for one, taken in zip(series, seconds, strict=True):
        for value, t in zip(one.values, taken, strict=True):
            print(f"| {one.name} | {value} | {one.pairs} | {t / one.pairs:.3f} | {next(predicted) / one.pairs:.3f} |")
    each = ", ".join(f"{coefficient * 1e6:.4g} us x {term}" for coefficient, term in zip(law, TERMS, strict=True))
    print(f"\nseconds of a step = {each}; R2 {r2:.4f}\n{duel.machine(args.threads)}")
    title = f"DPO step, LoRA, first epoch ({duel.machine(args.threads)}; R² of the law {r2:.3f})"
    draw(series, seconds, law, geometry, title, args.png)
    if args.json is not None:
        points = [
            {"varied": one.name, "value": value, "pairs": one.pairs, "seconds": t}
            for one, taken in zip(series, seconds, strict=True)
            for value, t in zip(one.values, taken, strict=True)
        ]
        write_json(
            args.json,
            {
                "law": dict(zip(TERMS, law, strict=True)),
                "r2": r2,
                "points": points,
                "machine": duel.machine(args.threads),
            },
        )
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
