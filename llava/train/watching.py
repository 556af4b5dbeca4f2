"""What one sees of a training run: a line per log, the heartbeat, and TensorBoard's curves over all restarts."""

from __future__ import annotations

import datetime
import math
import os
import socket
import time
import zlib
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from llava.status import Status
from llava.train.checkpoints import checkpoint_name
from llava.train.event_file import EventFile

# What the heartbeat shows of the last logs.
SHOWN = (
    "loss",
    "eval_loss",
    "rewards/margins",
    "rewards/accuracies",
    "eval_rewards/margins",
    "eval_rewards/accuracies",
    "grad_norm",
    "learning_rate",
    "epoch",
)


class Progress(TrainerCallback):
    """A plain line per log from rank 0, which a log file of a queued job can hold, and the run's heartbeat.

    ``step 10/100 loss=0.69 rewards/margins=0.1 3.2 pairs/s 0:12:30 left``: the rate counts the ``unit`` of all ranks
    since the last line, and not the time of evaluations and checkpoints; a batch that the data's end cut short counts
    as a whole one. The time left follows from it.
    """

    def __init__(self, unit: str, status: Status) -> None:
        self.unit = unit
        self.status = status
        self._last: tuple[int, float] | None = None  # step and clock of the last rate
        self._paused = 0.0  # seconds of evaluations and checkpoints
        self._mark = 0.0
        self._metrics: dict[str, float | str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last, self._mark = None, time.monotonic()
        checkpoint = checkpoint_name(state.global_step) if state.global_step else None
        begun = {"step": state.global_step, "max_steps": state.max_steps, "last_checkpoint": checkpoint}
        self.status.update(state="running", **begun)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._last is None:  # not at on_train_begin: a resumed run first passes over the data it has seen
            self._last = (state.global_step, self._clock())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark = time.monotonic()
        self.status.update(state="saving" if control.should_save else "running", step=state.global_step)

    on_epoch_end = on_step_end  # a checkpoint may follow here too

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.status.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pause()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pause()
        self.status.update(state="running", last_checkpoint=checkpoint_name(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        values = [f"{key}={_short(value)}" for key, value in logs.items()]
        numbers = {key: logs[key] for key in SHOWN if key in logs}
        self._metrics.update({key: x if math.isfinite(x) else str(x) for key, x in numbers.items()})  # JSON has no NaN
        step, now = state.global_step, self._clock()
        pace: dict[str, float] = {}
        if "loss" in logs and self._last is not None and step > self._last[0]:  # no evaluation, and no summary
            a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            seconds = max(now - self._last[1], 1e-6) / (step - self._last[0])
            self._last = (step, now)
            pace = {"rate": a_step / seconds, "seconds_left": seconds * (state.max_steps - step)}
            left = datetime.timedelta(seconds=round(pace["seconds_left"]))
            values += [f"{_short(pace['rate'])} {self.unit}/s", f"{left} left"]
        print(f"step {step}/{state.max_steps}", *values, flush=True)
        self.status.update(force=True, step=step, metrics=dict(self._metrics), **pace)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.status.update(state="saving", step=state.global_step, seconds_left=0)

    def _clock(self) -> float:
        return time.monotonic() - self._paused

    def _pause(self) -> None:
        now = time.monotonic()
        self._paused += now - self._mark
        self._mark = now


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class TensorBoardOfAllParts(TensorBoardCallback):
    """TensorBoard's curves of a run and all its restarts: every step once, however its parts ended.

    A run has one event file. A part that goes on takes it over, without what came after the checkpoint; what the file
    lacks, or has otherwise, comes from the checkpoint's own history of logs. A new run gets a folder of its own under
    ``runs/``; in the folder of ``--logging_dir`` it gets a file of its own.

    Args:
        continues: Whether a start at step 0 repeats the output folder's last run, which ended before it had a
            checkpoint. After a checkpoint the run goes on in any case.
    """

    def __init__(self, continues: bool) -> None:
        super().__init__()
        self.continues = continues
        self._events: EventFile | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._events = self.tb_writer = self._take_over(args, state)
        super().on_train_begin(args, state, control, **kwargs)
        if self._events is not None:
            self._events.flush()

    def _init_summary_writer(self, args: Any) -> None:
        if self._events is None:
            super()._init_summary_writer(args)  # an evaluation without a training
        else:
            self.tb_writer = self._events  # an evaluation after it

    def _take_over(self, args: Any, state: Any) -> EventFile:
        # In a folder that several runs share, the name tells whose file it is.
        run = f"{zlib.crc32(str(Path(args.output_dir).resolve()).encode()):08x}"
        if self.logging_dir is None:
            folder = Path(args.output_dir) / default_logdir()
            files = folder.parent.glob("*/*tfevents*")
        else:
            folder = Path(self.logging_dir)
            files = folder.glob(f"*tfevents*.{run}")
        old = None
        if state.global_step or self.continues:
            old = max(files, key=lambda file: file.name, default=None)  # names begin with the time
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{run}"
        events = EventFile((old.parent if old else folder) / name)
        events.take_over(old, state.global_step, state.log_history)
        return events
