#!/usr/bin/env python
"""A step of pre-training, connector only, against transformers' own loss over logits at every position.

    python benchmarks/pretrain.py --json pretrain.json

Template ``plain``: a picture and its caption of 20 to 40 tokens. Neither side uses gradient checkpointing.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import duel, examples, flops, steps
from benchmarks.models import REAL, TINY


def main() -> int:
    parser = duel.options(__doc__)
    parser.add_argument("--captions", type=int, default=8, help="pictures a step")
    args = parser.parse_args()
    geometry = TINY if args.tiny else REAL

    captions = partial(examples.captions, geometry, args.captions, args.seed)
    contenders = {
        "ours": partial(steps.our_pretrain, geometry, captions, args.seed),
        "full logits": partial(steps.FullLogitsPretrain, geometry, captions, args.seed),
    }
    amount = flops.Amount.of(steps.our_inputs(captions, geometry))
    row = duel.Row(
        "pre-training step, connector only",
        "transformers, logits everywhere",
        "ours",
        "full logits",
        flops.pretrain(geometry, amount),
    )
    return duel.report(duel.run(contenders, [row], args.rounds, args.threads), args.json)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
