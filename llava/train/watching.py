"""What one sees of a training run: a line per log, the heartbeat, and TensorBoard's curves over all restarts."""

from __future__ import annotations

import datetime
import math
import os
import socket
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
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


def tokens_in(batch: Mapping[str, Any], tokens_per_image: int, max_length: int | None) -> int | torch.Tensor:
    """Tokens of a batch (``llava.data.collate``), pictures expanded, without padding.

    Of rows that share beginnings, those of the stream: what they share counts once, as it is computed once. A batch of
    separate rows gives a tensor on the batch's device, so that nothing waits for it.
    """
    if "rows" in batch:
        return len(batch["rows"]["input_ids"])
    lengths = batch["attention_mask"].sum(1) + (batch["image_index"] >= 0).sum(1) * (tokens_per_image - 1)  # (B,)
    return (lengths if max_length is None else lengths.clamp(max=max_length)).sum()


class Meter:
    """What all ranks did since the last log: tokens of the training, and the memory that it took.

    Tokens are those that the policy was given (``tokens_in``); a reference's forward and evaluations are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokens = 0
        self.memory: dict[str, float] = {}
        self._seen: int | torch.Tensor = 0

    def saw(self, tokens: int | torch.Tensor) -> None:
        """Count a batch of this rank."""
        self._seen = self._seen + tokens

    def meet(self, accelerator: Any) -> None:
        """Every rank calls it at a log: ``tokens`` since the last one, and ``memory`` in GB (1e9 bytes).

        ``cuda_memory_gb``: the most that was allocated since the last log, of the fullest rank.
        ``resident_memory_gb``: on the CPU, what this process holds now.
        """
        on_cuda = self.device.type == "cuda"
        held = torch.cuda.max_memory_allocated(self.device) if on_cuda else psutil.Process().memory_info().rss
        both = accelerator.gather(torch.tensor([[int(self._seen), held]], device=self.device))  # (ranks, 2)
        self.tokens, self._seen = int(both[:, 0].sum()), 0
        if on_cuda:
            self.memory = {"cuda_memory_gb": int(both[:, 1].max()) / 1e9}
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.memory = {"resident_memory_gb": held / 1e9}


class Progress(TrainerCallback):
    """A plain line per log from rank 0, which a log file of a queued job can hold, and the run's heartbeat.

    ``step 10/100 loss=0.69 rewards/margins=0.1 3.2 pairs/s 0:12:30 left``: the rate counts the ``unit`` of all ranks
    since the last line, and not the time of evaluations and checkpoints; a batch that the data's end cut short counts
    as a whole one. The time left follows from it. ``measured`` are this rate and the ``meter``'s figures of the last
    line, for TensorBoard: the clock decides them, so they are not in the history of logs, which a restart repeats.
    """

    def __init__(self, unit: str, status: Status, meter: Meter | None = None) -> None:
        self.unit = unit
        self.status = status
        self.meter = meter
        self.measured: dict[str, float] = {}
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
        self.pause()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pause()
        self.status.update(state="running", last_checkpoint=checkpoint_name(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        values = [f"{key}={_short(value)}" for key, value in logs.items() if not key.startswith("learning_rate/")]
        numbers = {key: logs[key] for key in SHOWN if key in logs}
        self._metrics.update({key: x if math.isfinite(x) else str(x) for key, x in numbers.items()})  # JSON has no NaN
        step, now = state.global_step, self._clock()
        pace: dict[str, float] = {}
        if "loss" in logs and self._last is not None and step > self._last[0]:  # no evaluation, and no summary
            a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            passed = max(now - self._last[1], 1e-6)
            seconds = passed / (step - self._last[0])
            self._last = (step, now)
            self.measured = {"samples_per_second": a_step / seconds}
            if self.meter is not None:
                self.measured |= {"tokens_per_second": self.meter.tokens / passed, **self.meter.memory}
                values.append(f"{self.meter.tokens / passed:.0f} tokens/s")
            pace = {"rate": a_step / seconds, "seconds_left": seconds * (state.max_steps - step)}
            left = datetime.timedelta(seconds=round(pace["seconds_left"]))
            values += [f"{_short(pace['rate'])} {self.unit}/s", f"{left} left"]
        print(f"step {step}/{state.max_steps}", *values, flush=True)
        self.status.update(force=True, step=step, metrics=dict(self._metrics), **pace)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.status.update(state="saving", step=state.global_step, seconds_left=0)

    def _clock(self) -> float:
        return time.monotonic() - self._paused

    def pause(self) -> None:
        """Leave the time since the last step's end, or since the last pause behind it, out of the rates."""
        now = time.monotonic()
        self._paused += now - self._mark
        self._mark = now


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Drawn(NamedTuple):
    """A picture as a file's bytes (PNG or JPEG), its width and height in pixels."""

    encoded: bytes
    size: tuple[int, int]


class TensorBoardOfAllParts(TensorBoardCallback):
    """TensorBoard's curves of a run and all its restarts: every step once, however its parts ended.

    A run has one event file. A part that goes on takes it over, without what came after the checkpoint; what the file
    lacks, or has otherwise, comes from the checkpoint's own history of logs. A new run gets a folder of its own under
    ``runs/``; in the folder of ``--logging_dir`` it gets a file of its own.

    Args:
        continues: Whether a start at step 0 repeats the output folder's last run, which ended before it had a
            checkpoint. After a checkpoint the run goes on in any case.
        progress: Whose ``measured`` figures are shown as ``train/...``; they are in the file only, so what a failing
            node takes of its end is not filled in.
    """

    def __init__(self, continues: bool, progress: Progress | None = None) -> None:
        super().__init__()
        self.continues = continues
        self.progress = progress
        self._events: EventFile | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._events = self.tb_writer = self._take_over(args, state)
        super().on_train_begin(args, state, control, **kwargs)
        if self._events is not None:
            self._events.flush()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._events is not None and self.progress is not None and "loss" in (logs or {}):
            for name, value in self.progress.measured.items():
                self._events.add_scalar(f"train/{name}", value, state.global_step)
        super().on_log(args, state, control, logs=logs, **kwargs)

    def show(self, tag: str, text: str, pictures: Sequence[Drawn], step: int) -> None:
        """A text (Markdown) and pictures, which get the tags ``tag/1``, ``tag/2``, ... (first process)."""
        if self._events is not None:
            self._events.add_text(tag, text, step)
            for number, picture in enumerate(pictures, 1):
                self._events.add_image(f"{tag}/{number}", picture.encoded, picture.size, step)
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
