"""The table of all runs: what their heartbeats say, and what Slurm's queue says of those that have none."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.errors import UserError, warn
from llava.files import existing, whole_lines
from llava.status import ACTIVE, is_stale, read_status, seconds_since
from slurm.runs import heartbeat_root
from slurm.watch import ENDED

REMEMBERED = "jobs.jsonl"
COLUMNS = ("run", "state", "step", "rate", "left", "loss", "checkpoint", "updated", "job")
DEPTH = 3  # folders below the one that is named: checkpoints/NAME/pope
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "COMPLETING", "CONFIGURING")


def remember(logs: Path, jobs: list[tuple[str | None, Path, list[str]]]) -> None:
    """Note what was submitted or started here, ``(job, log, command)`` each, for ``--status``."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    lines = []
    for job, log, command in jobs:
        root = heartbeat_root(command)
        row = {"job": job, "submitted": now, "root": root and str(root), "log": str(log), "command": command}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    try:
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / REMEMBERED).open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise UserError(f"--logs {logs}: cannot be written: {error.strerror}") from None


def show(folders: list[str], logs: Path, now: float | None = None) -> None:
    """Print the table of the runs under ``folders``; without, of those under ./checkpoints and all that were submitted.

    ``now`` is in seconds since the epoch, by default this moment.
    """
    now = time.time() if now is None else now
    known = list(whole_lines(logs / REMEMBERED)) if not folders and (logs / REMEMBERED).exists() else []
    roots = [existing(folder, "--status", directory=True) for folder in folders] or [Path("checkpoints")]
    roots += [Path(run["root"]) for run in known if run["root"]]
    jobs = [run for run in known if run["job"]]
    runs = {file.resolve(): status for file in _heartbeats(roots) if (status := _read(file))}
    folders_told = {file.parent for file in runs}
    told = {status["job"] for status in runs.values() if status.get("job")}
    queue = _queue(told | {job["job"] for job in jobs})
    rows = [_row(file, status, queue, now) for file, status in sorted(runs.items())]
    for job in jobs:  # those that have not got as far as a heartbeat
        root = Path(job["root"]).resolve() if job["root"] else None
        state = queue.get(job["job"])
        # One that ended so, in a folder that has another job's heartbeat by now, is history.
        if state and job["job"] not in told and not (state in ENDED and root in folders_told):
            name = _short(root) if root else shlex.join(job["command"])[:40]
            rows.append([name, state.lower(), *[""] * (len(COLUMNS) - 3), job["job"]])
    if not rows:
        print(f"no runs found under {', '.join(map(str, roots))}")
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _heartbeats(roots: list[Path]) -> Iterator[Path]:
    seen = set()
    for root in roots:
        for folder, below, files in os.walk(root):
            if Path(folder).resolve() not in seen:
                seen.add(Path(folder).resolve())
                # Several POPE runs share a folder: status_random.json, status_all.json.
                yield from (Path(folder) / name for name in sorted(files) if re.fullmatch(r"status(_\w+)?\.json", name))
            deep = len(Path(folder).relative_to(root).parts) >= DEPTH
            below[:] = [] if deep else sorted(name for name in below if not name.startswith((".", "checkpoint-")))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return read_status(file)
    except UserError as error:
        warn(str(error))  # one broken file is no reason to show no other run
        return None


def _queue(jobs: set[str]) -> dict[str, str]:
    """``{job: state}`` of those that Slurm still knows."""
    if not jobs:
        return {}
    asked = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={','.join(sorted(jobs))}"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return {}
    if done.returncode and "nvalid job id" not in done.stderr:
        warn(f"Slurm does not answer, its states are left out: {' '.join(done.stderr.split())}")
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())


def _row(file: Path, status: dict[str, Any], queue: dict[str, str], now: float) -> list[str]:
    state = _state(status, queue.get(status.get("job") or ""), now)
    live = state in ACTIVE
    step, steps, rate = status.get("step"), status.get("max_steps"), status.get("rate")
    loss = (status.get("metrics") or {}).get("loss")
    return [
        " ".join([_short(file.parent), *file.stem.split("_")[1:]]),
        state,
        "" if step is None else f"{step}/{steps}" if steps else str(step),
        f"{rate:.3g} {status.get('unit')}/s" if live and rate else "",
        _span(status["seconds_left"]) if live and status.get("seconds_left") is not None else "",
        f"{loss:.4g}" if isinstance(loss, (int, float)) else "",
        status.get("last_checkpoint") or "",
        f"{_span(seconds_since(status, now))} ago",
        status.get("job") or "",
    ]


def _state(status: dict[str, Any], queued: str | None, now: float) -> str:
    """The heartbeat's state, unless the queue or the silence of its process says more."""
    state = status["state"]
    if queued in WAITING and state not in ("finished", "failed"):
        return queued.lower()
    if state not in ACTIVE:
        return state
    if queued and queued not in ENDED:
        return f"{state}, silent" if is_stale(status, now) else state
    if queued or is_stale(status, now) or _process_is_gone(status):
        return "dead"
    return state


def _process_is_gone(status: dict[str, Any]) -> bool:
    if status.get("host") != socket.gethostname() or not status.get("pid") or status.get("job"):
        return False
    try:
        os.kill(status["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, so it lives
    return False


def _short(folder: Path) -> str:
    """Relative to here where it lies below."""
    here = Path.cwd().resolve()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def _span(seconds: float) -> str:
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
