"""TensorBoard's event file of one run over all its restarts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO, Any

from transformers.integrations.integration_utils import rewrite_logs

from llava.files import atomic_write


class EventFile:
    """TensorBoard's event file of one run, with the part of ``SummaryWriter`` that Trainer uses.

    ``flush`` hands all that was added to the system: a process killed afterwards has lost none of it. A tag has one
    value a step, the first: Trainer repeats some (``epoch``), and an end that is run again repeats its summary.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[Any] = []
        self._last_step: dict[str, int] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """A number; its step must not be lower than the tag's last."""
        self._add(_event(tag, value, step, time.time()))

    def add_text(self, tag: str, text: str, step: int = 0) -> None:
        """A text."""
        self._add(_event(tag, text, step, time.time()))

    def add_image(self, tag: str, encoded: bytes, size: tuple[int, int], step: int) -> None:
        """A picture: a PNG's or JPEG's bytes, width and height in pixels."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(width=size[0], height=size[1], colorspace=3, encoded_image_string=encoded)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Append what was added. The file is not kept open: there is nothing to lose in between."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._pending.insert(0, _head(self._pending))
        with self.path.open("ab") as file:
            self._write(file)

    close = flush

    def take_over(self, old: Path | None, step: int, history: list[dict[str, Any]]) -> None:
        """Begin with the logs of the run's earlier parts up to ``step``; the file of these parts becomes this one.

        Args:
            old: The earlier parts' file, if there is one.
            step: The checkpoint's; 0 keeps nothing.
            history: The checkpoint's ``log_history``.
        """
        for event in _events_until(old, step, history) if step else ():
            self._add(event)
        if old is None:
            return
        self._pending.insert(0, _head(self._pending))
        # Without "tfevents" in its name no reader takes it for an event file; the suffix is the run's.
        new = old.with_name(f"continued{self.path.suffix}")
        with atomic_write(new, "wb") as file:
            self._write(file)
        # At every moment there is one file, with whole contents. It gets a new name, because a TensorBoard that is open
        # would never look at the old one again.
        new.replace(old)
        old.replace(self.path)

    def _add(self, event: Any) -> None:
        tag = event.summary.value[0].tag
        if event.step > self._last_step.get(tag, -1):
            self._last_step[tag] = event.step
            self._pending.append(event)

    def _write(self, file: IO[bytes]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        writer = RecordWriter(file)
        for event in self._pending:
            writer.write(event.SerializeToString())
        file.flush()
        self._pending = []


def _events_until(old: Path | None, step: int, history: list[dict[str, Any]]) -> list[Any]:
    """What was logged up to ``step``, in order: values from ``history``, times and all the rest from the file."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    events: dict[tuple[str, int], Any] = {}
    for log in history:
        for tag, value in rewrite_logs({key: value for key, value in log.items() if key != "step"}).items():
            if isinstance(value, (int, float, str)):
                event = _event(tag, value, log["step"])
                events.setdefault((event.summary.value[0].tag, event.step), event)
    # The loader ends at a record that a kill has torn.
    for event in LegacyEventFileLoader(str(old)).Load() if old is not None else ():
        for value in event.summary.value:
            if event.step <= step:
                kept = events.setdefault((value.tag, event.step), event)
                kept.wall_time = kept.wall_time or event.wall_time
    ordered = sorted(events.values(), key=lambda event: event.step)
    clock = next((event.wall_time for event in ordered if event.wall_time), time.time())
    for event in ordered:  # the time of what the file lacks is not known: that of the event before
        clock = event.wall_time = event.wall_time or clock
    return ordered


def _event(tag: str, value: float | str, step: int, wall_time: float = 0.0) -> Any:
    """An event as ``SummaryWriter`` writes it; ``wall_time`` in seconds since the epoch."""
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard.summary import scalar, text

    summary = text(tag, value) if isinstance(value, str) else scalar(tag, value)
    return Event(wall_time=wall_time, step=step, summary=summary)


def _head(events: list[Any]) -> Any:
    """What a file begins with."""
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=events[0].wall_time if events else time.time(), file_version="brain.Event:2")
