"""``status.json``: the heartbeat of a run, by which another process sees how it fares.

One JSON object in the output folder, always whole. Rank 0 keeps it up to date; an end (stopped, failed) is written by
whichever rank meets it first. A killed process cannot write: its status stays as it was and goes stale (``is_stale``).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

FILE = "status.json"

# What a run is doing, and how it ended. "saving" is also the time in which the final model is written.
ACTIVE = ("starting", "running", "saving")
ENDED = ("stopped", "finished", "failed")

INTERVAL = 5.0  # seconds between two writes, where nothing but numbers changed
# Seconds without a word after which a run counts as dead. Steps and evaluation give a sign every INTERVAL, or as long
# as one step takes; reading a model and writing one give none.
STALE_AFTER = {"starting": 1800.0, "running": 600.0, "saving": 1800.0}
LONGEST_MESSAGE = 500  # characters

current: Status | None = None  # the status of the run in this process


class Status:
    """The heartbeat of the run in this process; from now on also ``current``. Every rank makes one.

    Nothing here ends a run: where the file cannot be written (a full disk), one warning says so.

    Args:
        folder: The output folder; made where it is missing.
        script: Name of the entry script, ``train_dpo.py``.
        unit: What ``rate`` counts: pairs, records or questions.
        world_size: Number of ranks.
        writer: Whether this rank keeps the file; true on rank 0 alone.
        name: Of the file, where several runs share a folder; it begins with ``status``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        script: str,
        unit: str,
        world_size: int,
        writer: bool,
        name: str = FILE,
    ) -> None:
        global current
        self.path = Path(folder).expanduser().resolve() / name
        self.unit = unit
        self.writer = writer
        self._warned = False
        self._written = 0.0
        now = _now()
        self._content: dict[str, Any] = {
            "script": script,
            "state": "starting",
            "step": None,
            "max_steps": None,
            "unit": unit,
            "rate": None,
            "seconds_left": None,
            "last_checkpoint": None,
            "metrics": {},
            "message": None,
            "started": now,
            "updated": now,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": _job(),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            "world_size": world_size,
            "output_dir": str(self.path.parent),
        }
        # When the file last changed, as far as this rank knows: a later change is another rank's.
        self._seen = self._read()[0]
        if writer:
            self._write(self._content)
        current = self

    def update(self, force: bool = False, **fields: Any) -> None:
        """Change fields; the file follows at once where ``state`` changes or with ``force``, else every 5 seconds.

        After an end (stopped, finished, failed) nothing changes any more.

        Raises:
            ValueError: an unknown field or state.
        """
        unknown = fields.keys() - self._content.keys()
        if unknown or fields.get("state", "running") not in (*ACTIVE, *ENDED):
            raise ValueError(f"no such field or state of a status: {fields}")
        before = self._content["state"]
        if before in ENDED:
            return
        self._content.update(fields)
        due = force or self._content["state"] != before or time.monotonic() - self._written >= INTERVAL
        if self.writer and due and not self._ended_by_another():
            self._write(self._content)

    def fail(self, message: str) -> None:
        """The run failed; may come from any rank. The first message stays: what other ranks say later follows of it."""
        self._end("failed", message)

    def stop(self, message: str) -> None:
        """The run was stopped and has saved; may come from any rank."""
        self._end("stopped", message)

    def _end(self, state: str, message: str) -> None:
        if self._content["state"] in ENDED:
            return
        rank = os.environ.get("RANK", "0")
        text = ("" if rank == "0" else f"[rank {rank}] ") + " ".join(message.split())
        end = {"state": state, "message": text[:LONGEST_MESSAGE], "seconds_left": None}
        self._content.update(end)
        if self._ended_by_another():
            return
        seen, content = self._read()
        # Only rank 0 knows the step and the rest: what it wrote last is kept.
        known = self._content if self.writer or seen == self._seen else content
        self._write({**known, **end})

    def _ended_by_another(self) -> bool:
        seen, content = self._read()
        return seen != self._seen and content.get("state") in ENDED

    def _read(self) -> tuple[int | None, dict[str, Any]]:
        """When the file was written (ns), and what it holds; ``(None, {})`` where there is none to be read."""
        try:
            with self.path.open(encoding="utf-8") as file:
                written = os.fstat(file.fileno()).st_mtime_ns
                content = json.load(file)
        except (OSError, ValueError):  # none yet; or a broken one, which the next write replaces
            return None, {}
        return written, content if isinstance(content, dict) else {}

    def _write(self, content: dict[str, Any]) -> None:
        content["updated"] = _now()
        self._written = time.monotonic()
        # A rank's own name: two ranks may write at the same moment.
        temporary = self.path.with_name(f".{self.path.name}.{os.environ.get('RANK', '0')}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            self._seen = temporary.stat().st_mtime_ns
            # Not flushed to the disk: after a crash of the node an old heartbeat is as good as this one.
            os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self._warned:
                from llava.errors import warn  # imports this module

                self._warned = True
                warn(f"{self.path} cannot be written ({error.strerror}); the run goes on without", everywhere=False)


def failed(message: str) -> None:
    """The run in this process failed: say so in its heartbeat, if it has one."""
    if current is not None:
        current.fail(message)


def read_status(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The heartbeat of a run, by its output folder or by the file itself.

    Raises:
        UserError: there is none, or the file is none.
    """
    from llava.errors import UserError  # imports this module
    from llava.files import field, read_object

    path = Path(path).expanduser()
    file = path / FILE if path.is_dir() else path
    content = read_object(file)
    mend = "delete the file if no run writes it"
    for key in ("state", "updated"):
        field(str(file), content, key, str, mend)
    if content["state"] not in (*ACTIVE, *ENDED):
        raise UserError(f"{file}: unknown state '{content['state']}'; {mend}")
    try:
        seconds_since(content)
    except (ValueError, TypeError):
        raise UserError(
            f"{file}: 'updated' is no time in ISO 8601 with its zone: {content['updated']}; {mend}"
        ) from None
    return content


def seconds_since(status: dict[str, Any], now: float | None = None) -> float:
    """Seconds from the last sign of life to ``now`` (seconds since the epoch; by default this moment)."""
    return (time.time() if now is None else now) - _epoch(status["updated"])


def is_stale(status: dict[str, Any], now: float | None = None) -> bool:
    """Whether a run that has not ended gave no sign for so long that its process must be dead (``STALE_AFTER``).

    ``now`` is in seconds since the epoch, by default this moment.
    """
    return status["state"] in ACTIVE and seconds_since(status, now) > STALE_AFTER[status["state"]]


def _epoch(text: str) -> float:
    moment = datetime.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("no zone")
    return moment.timestamp()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _job() -> str | None:
    """Slurm's name of the job: 123, or 123_4 for a task of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
