#!/usr/bin/env python
"""Steps of preference optimisation against HA-DPO's recipe and against TRL, same weights, same tokens, same result.

    python benchmarks/dpo.py --json dpo.json

The first epoch asks the reference in every step; afterwards (or from the start, once the file is there) its
log-probabilities are known. The two-model, two-row step is HA-DPO's on today's transformers, with gradient
checkpointing as its recipe has it. TRL runs without, which is its fastest setting (``--trl_checkpointing``: its
default), and so do we (``--checkpointing``).
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import duel, examples, flops, steps
from benchmarks.models import REAL, TINY

PLAIN = "two models, two rows, full logits"
QUESTIONS_PER_IMAGE = 4


def main() -> int:
    parser = duel.options(__doc__)
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--question_pairs", type=int, default=8, help="pairs a step, yes/no questions")
    parser.add_argument("--checkpointing", action="store_true", help="our steps recompute activations")
    parser.add_argument("--trl_checkpointing", action="store_true", help="TRL's steps do")
    args = parser.parse_args()
    geometry = TINY if args.tiny else REAL

    descriptions = partial(examples.descriptions, geometry, args.pairs, args.seed)
    questions = partial(examples.questions, geometry, args.question_pairs, args.seed, QUESTIONS_PER_IMAGE)
    ours = partial(steps.our_dpo, geometry, seed=args.seed, checkpointing=args.checkpointing)
    trl = "TRL " + (duel.version_of("trl") or "(not installed)")
    by_image = f"DPO on {QUESTIONS_PER_IMAGE} yes/no questions per image"
    # Work, against, our step, theirs, data; steps that rows have in common run once.
    first, cached = "DPO step, LoRA, first epoch", "the same, reference cached"
    contenders = {
        "ours": partial(ours, descriptions),
        "ours, cached": partial(ours, descriptions, cached=True),
        "plain": partial(steps.PlainDPO, geometry, descriptions, args.seed),
        "trl": partial(steps.trl_dpo, geometry, descriptions, args.seed, args.trl_checkpointing),
        "ours by image": partial(ours, questions),
        "plain by image": partial(steps.PlainDPO, geometry, questions, args.seed),
    }

    def worth(data: examples.Drawing, cached: bool) -> float:
        return flops.dpo(geometry, flops.Amount.of(steps.our_inputs(data, geometry)), steps.LORA_R, cached)

    rows = [
        duel.Row(first, PLAIN, "ours", "plain", worth(descriptions, False)),
        duel.Row(cached, PLAIN, "ours, cached", "plain", worth(descriptions, True)),
        duel.Row(first, trl, "ours", "trl", worth(descriptions, False)),
        duel.Row(cached, trl, "ours, cached", "trl", worth(descriptions, True)),
        duel.Row(by_image, PLAIN, "ours by image", "plain by image", worth(questions, False)),
    ]
    # Both groups by themselves, so that no more than four models are in memory.
    records = []
    for group in (rows[:4], rows[4:]):
        chosen = [row for row in group if args.only in f"{row.work} {row.against}"]
        if chosen:
            records += duel.run(contenders, chosen, args.rounds, args.threads)
    return duel.report(records, args.json)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
