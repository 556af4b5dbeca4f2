"""What ends a run before its last step: a signal, which all ranks answer together, and numbers that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from llava import interruption
from llava.errors import UserError
from llava.files import write_json

OVERFLOWS = 50  # of float16 in a row: the scale, 2^16 at first and halved each time, was below 1 long ago


class StopWhenAsked(TrainerCallback):
    """After an optimizer step: where any rank was sent a signal, all of them save; ``asked`` is its name.

    The ranks ask each other over the processors (gloo): what a card still computes is not waited for.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._group: dist.ProcessGroup | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # What is due at an epoch's end comes first: a run that goes on from here begins with the next one.
        if not (state.epoch.is_integer() and IntervalStrategy.EPOCH in (args.eval_strategy, args.logging_strategy)):
            self._ask(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ask(state, control)

    def _ask(self, state: Any, control: Any) -> None:
        names = [None, *(number.name for number in interruption.SIGNALS)]
        asked = torch.tensor(names.index(interruption.requested()))
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        if asked and state.global_step < state.max_steps:  # after the last step there is only the end to write
            self.asked = names[int(asked)]
            control.should_save = True


def deaf_worker(seed_worker: Any, number: int) -> None:
    """Start of a data worker: the signals are for the rank it works for (a worker would die of SIGTERM)."""
    interruption.ignore()
    if seed_worker is not None:
        seed_worker(number)


class Finite:
    """Ends a run whose loss or gradient is not finite, and names the records of the batch.

    Weights that were updated with such a gradient, and every checkpoint made of them, would be worthless.
    """

    def __init__(self, dataset: Any, args: Any) -> None:
        self.dataset = dataset
        self.args = args
        self.records: list[int] = []  # of this rank, since the last optimizer step
        self.overflows = 0  # steps in a row

    def saw(self, records: torch.Tensor | None) -> None:
        """A batch begins."""
        self.records += [] if records is None else records.tolist()

    def check_loss(self, loss: torch.Tensor, step: int) -> None:
        """Raise ``UserError`` on the rank whose loss is not finite, before it is derived."""
        value = loss.item()
        if not math.isfinite(value):
            raise self._refusal("loss", value, step, {self.args.process_index: self.records}, everywhere=False)

    def check_gradient(self, norm: Any, step: int) -> None:
        """Raise ``UserError`` on all ranks; ``norm`` is the gradient's, over all of them. The step's records end here.

        In float16 an overflow is part of the game: its step is left out and the scale lowered, but not for ever.
        """
        records, self.records = self.records, []
        finite = norm is None or math.isfinite(float(norm))
        self.overflows = 0 if finite else self.overflows + 1
        if finite or (self.args.fp16 and self.overflows < OVERFLOWS):
            return
        of_rank: list[Any] = [records]
        if self.args.world_size > 1:
            of_rank = [None] * self.args.world_size
            dist.all_gather_object(of_rank, records)
        raise self._refusal("gradient", float(norm), step, dict(enumerate(of_rank)), everywhere=True)

    def _refusal(
        self, what: str, value: float, step: int, of_rank: dict[int, list[int]], everywhere: bool
    ) -> UserError:
        """The error, and its file: one where all ranks meet it, one of the rank that does."""
        rank = f"-rank-{self.args.process_index}" if self.args.world_size > 1 and not everywhere else ""
        path = Path(self.args.output_dir) / f"nonfinite-step-{step}{rank}.json"
        if self.args.process_index == 0 or not everywhere:
            rows = [
                {"rank": r, "record": number, "place": self.dataset.place(number)}
                for r, numbers in of_rank.items()
                for number in numbers
            ]
            write_json(path, {"step": step, "what": what, "value": str(value), "records": rows})
        return UserError(
            f"step {step}: the {what} is {value}, so nothing after step {step - 1} is kept; the batch's records are in "
            f"{path}; look at them, or lower --learning_rate",
            everywhere=everywhere,
        )
