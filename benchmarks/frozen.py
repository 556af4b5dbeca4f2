#!/usr/bin/env python
"""DPO of what lies behind a frozen backbone against HA-DPO's recipe for the same, with and without ``--cache_hidden``.

    python benchmarks/frozen.py --json frozen.json

The other side trains lm_head as HA-DPO's code would on today's transformers: a second model as the reference, a row for
either answer, logits everywhere, gradient checkpointing, and gradients down to the embeddings since that is how LLaVA
switches it on. Ours is the trainer's own step with its own loader and no data worker: pictures are JPEG files that the
data set opens (and remembers), or hidden states that it reads from disk; the other side finds its batches ready. The
folder of ``--cache_hidden`` is filled before the warm-up step, so that every step here is one of the second epoch or
later; our peak memory contains the filling.

Losses of all steps must be the same, and the first gradients. The other side has no post block, so a post block's
results are compared between ours with and ours without the cache; the time beside it is that of the head alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import duel, examples, flops, steps
from benchmarks.models import REAL, TINY

PLAIN = "two models, two rows, full logits, checkpointing; lm_head trains"
HEAD, BLOCK = "DPO of lm_head alone", "DPO of a post block (interaction) alone"
KEPT, COMPUTED = "hidden states kept", "hidden states computed"


def main() -> int:
    parser = duel.options(__doc__)
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--batches", type=int, default=3, help="steps an epoch")
    args = parser.parse_args()
    geometry = TINY if args.tiny else REAL

    with tempfile.TemporaryDirectory() as folder:
        drawn = partial(examples.descriptions, geometry, args.pairs * args.batches, args.seed)
        data = partial(examples.with_files, drawn, geometry, Path(folder))
        ours = partial(steps.our_frozen_dpo, geometry, data, args.pairs, seed=args.seed)
        contenders = {
            f"{part}, {way}": partial(ours, part, hidden=Path(folder) / "hidden" if way == KEPT else None)
            for part in ("lm_head", "post_block")
            for way in (KEPT, COMPUTED)
        }
        contenders["plain"] = partial(steps.PlainDPO, geometry, data, args.seed, args.pairs, head_alone=True)

        def row(work: str, part: str, way: str, same_as: str = "") -> duel.Row:
            worth = statistics.mean(flops.frozen_dpo(geometry, amount, part, way == KEPT) for amount in amounts)
            return duel.Row(work, PLAIN, f"{part}, {way}", "plain", worth, same_as, follow=True)

        pairs = data()
        batches = [pairs[start : start + args.pairs] for start in range(0, len(pairs), args.pairs)]
        amounts = [flops.Amount.of(steps.our_inputs(batch.copy, geometry)) for batch in batches]
        rows = [
            row(f"{HEAD}, {KEPT}", "lm_head", KEPT),
            row(f"{HEAD}, {COMPUTED}", "lm_head", COMPUTED),
        ]
        rows += [
            row(
                f"{BLOCK}, {way} (the same as ours, {other}; theirs has no block)",
                "post_block",
                way,
                f"post_block, {other}",
            )
            for way, other in ((KEPT, COMPUTED), (COMPUTED, KEPT))
        ]
        chosen = [row for row in rows if args.only in row.work]
        records = duel.run(contenders, chosen, args.rounds, args.threads) if chosen else []
    return duel.report(records, args.json)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
