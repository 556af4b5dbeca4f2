"""Parts of the demo's LLaVA trained one at a time, all else frozen, each measured as the demo measures HA-DPO.

    python -m demo.parts          (or: make demo-parts)

Reads a finished demo (``demo/out``) and writes to ``parts`` inside it. What a run saves is a delta: only what trained,
and what it stands on. Started again after an interruption, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from demo import results
from demo.journey import PROGRESS, Journey, is_finished
from demo.run import ASK, HERE, RECIPE, from_root, instruction_data, pope_data, preference_data
from llava.errors import UserError, command_line
from llava.eval.pope import SETS, table_header, table_row
from llava.files import read_object

# Two threads wait for each other at matrices this small where another program is at work: it took four times as long.
THREADS = 1
NEW_BLOCK = "--tune post_block --post_block interaction"


class Run(NamedTuple):
    """One training and its evaluation."""

    name: str  # its folder; that of its answers is pope-NAME
    title: str  # in the table
    flags: str
    start: str | None = None  # the run whose delta it goes on from; None: the demo's LLaVA
    tuning: bool = False  # on the instruction data instead of the preference pairs
    cached: bool = True  # with --cache_hidden


RUNS = (
    Run("head", "lm_head", "--tune lm_head"),
    Run("connector", "projector", "--tune projector", cached=False),  # what it trains is below the hidden states
    Run("block", "post_block", NEW_BLOCK),
    # Sees each conversation once: 0.3 GB of hidden states would be written to be read once.
    Run("block-tuned", "post_block, tuned", NEW_BLOCK, tuning=True, cached=False),
    Run("block-tuned-dpo", "post_block, tuned, then DPO", "--tune post_block", start="block-tuned"),
)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Train parts of the demo's LLaVA one at a time, and measure each.")
    parser.add_argument("--demo", type=Path, default=HERE / "out", help="folder of a finished demo")
    parser.add_argument("--output_dir", type=Path, help="where everything is written (default: parts, in --demo)")
    args = parser.parse_args()
    demo = args.demo.expanduser().resolve()
    if not is_finished(demo):
        raise UserError(f"--demo {demo}: holds no finished demo; run 'make demo' first (or python -m demo.run)")
    folder = args.output_dir.expanduser().resolve() if args.output_dir else demo / "parts"
    seed = read_object(demo / "llava/run.json")["seed"]

    # The demo's seconds are in it: what another demo began is not gone on with, even if it had the same seed.
    settings = (demo / PROGRESS).read_text(encoding="utf-8")
    with Journey(folder, HERE.parent, settings) as journey:
        for run in RUNS:
            journey.run(f"training {run.name}", training(run, from_root(demo), from_root(folder), seed), THREADS)
            journey.run(
                f"POPE {run.name}",
                f"{ASK} --model-path {from_root(folder / run.name)} {pope_data(from_root(demo))} "
                f"--output_dir {from_root(folder / f'pope-{run.name}')}",
                THREADS,
            )
        table = write_table(demo, folder)
        journey.finish()
    print(f"\n{table}", flush=True)


def training(run: Run, demo: str, out: str, seed: int) -> str:
    """The command of a run; ``demo`` and ``out`` are folders as commands name them."""
    start = f"{out}/{run.start}" if run.start else f"{demo}/llava"
    cache = f"--cache_hidden {out}/hidden " if run.cached else ""
    flags = f"--model_name_or_path {start} {run.flags} --output_dir {out}/{run.name} {cache}--seed {seed} {RECIPE}"
    if run.tuning:
        return f"python train_pretrain.py {instruction_data(demo)} {flags}"
    return f"python train_dpo.py {preference_data(demo)} --beta 0.1 {flags}"


def write_table(demo: Path, out: Path) -> str:
    """``table.md``: the demo's LLaVA, then every run; returns it."""
    head, rule = table_header().splitlines()
    lines = [f"{head} Trained parameters | Saved bytes |", f"{rule}---:|---:|"]
    for name in SETS:
        lines.append(f"{table_row(results.MODEL, name, results.WITHOUT, results.counts(demo, 'pope', name))} - | - |")
    for run in RUNS:
        trained, size = saved(out / run.name)
        mark = results.WITHOUT if run.tuning else results.WITH
        for name in SETS:
            row = table_row(run.title, name, mark, results.counts(demo, out / f"pope-{run.name}", name))
            lines.append(f"{row} {trained:,} | {size:,} |")
    return results.write_table(out, lines)


def saved(folder: Path) -> tuple[int, int]:
    """Parameters in a delta's weight files, and the bytes of these."""
    from llava.model.checkpoint import read_tensors
    from llava.model.delta import read_chain

    files = read_chain(str(folder), "--output_dir").stages[-1].files()
    parameters = sum(tensor.numel() for file in files for tensor in read_tensors(file).values())
    return parameters, sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    main()
