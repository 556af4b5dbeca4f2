"""Following jobs in Slurm's queue: their states, their logs, and the code that they end with."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llava.errors import warn

ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
UNKNOWN_AFTER = 5  # looks in a row that find no such job


class Unreachable(Exception):
    """Slurm's controller does not answer; it may later."""


@dataclass(frozen=True)
class State:
    """What Slurm says of one job or task: ``detail`` is where it runs or why it waits."""

    name: str
    exit_code: int = 0
    signal: int = 0
    detail: str = ""
    restarts: int = 0

    @property
    def code(self) -> int:
        """The exit code of a job that has ended: its own, 128 + signal, or 1 where Slurm ended it and names neither."""
        if self.name == "COMPLETED":
            return 0
        return self.exit_code or (128 + self.signal if self.signal else 1)

    def __str__(self) -> str:
        again = f", restart {self.restarts}" if self.restarts else ""
        where = f" {self.detail}" if self.detail else ""
        return f"{self.name}{where}{again}"


def states(job: str) -> dict[str, State]:
    """``{"7": state}`` of a job, ``{"7_0": state, ...}`` of an array; empty where Slurm does not know it.

    The controller is asked first and forgets an ended job after minutes; then the accounting, where there is one.

    Raises:
        Unreachable: the controller does not answer.
    """
    done = _run("scontrol", "-o", "show", "job", job)
    if done.returncode == 0:
        return dict(found for line in done.stdout.splitlines() for found in _from_scontrol(line))
    if "nvalid job id" not in done.stderr:
        raise Unreachable(" ".join(done.stderr.split()))
    try:
        done = _run("sacct", "-n", "-P", "-X", "-j", job, "-o", "JobID,State,ExitCode")
    except FileNotFoundError:
        return {}
    rows = [line.split("|") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    # "CANCELLED by 1000"; an array's waiting tasks are one row, "7_[2-5]", but then the controller knows them.
    return {row[0]: State(row[1].split()[0], *map(int, row[2].split(":"))) for row in rows if len(row) == 3}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _from_scontrol(line: str) -> list[tuple[str, State]]:
    """One line of ``scontrol -o show job``: a job, a task, or the tasks of an array that wait together (``2-5%1``)."""
    # The first of a name: what a user wrote (a comment, a command) comes later and may look like anything.
    fields = dict(reversed(re.findall(r"(?:^| )(\w+)=(\S*)", line)))
    if "JobState" not in fields:
        return []
    code, signal = map(int, fields.get("ExitCode", "0:0").split(":"))
    nodes, reason = fields.get("NodeList", "(null)"), fields.get("Reason", "None")
    on = f"on {nodes}" if nodes not in ("(null)", "") else ""
    why = f"({reason})" if reason != "None" else ""
    name = fields["JobState"]
    detail = why if name in ENDED or name == "PENDING" else on
    state = State(name, code, signal, detail, int(fields.get("Restarts", "0")))
    if "ArrayJobId" not in fields:
        return [(fields["JobId"], state)]
    numbers: list[int] = []
    for part in fields.get("ArrayTaskId", "").split("%")[0].split(","):
        if re.fullmatch(r"\d+(-\d+)?", part):
            first, last = (part.split("-") * 2)[:2]
            numbers += range(int(first), int(last) + 1)
    return [(f"{fields['ArrayJobId']}_{number}", state) for number in numbers]


class Tail:
    """The lines that are added to a file, which need not exist yet."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self._offset = 0
        self._rest = b""

    def show(self, *, last: bool = False) -> None:
        """Print the whole lines that are new; with ``last`` also one that was never ended."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                self._rest += file.read()
                self._offset = file.tell()
        *lines, self._rest = self._rest.split(b"\n")
        if last and self._rest:
            lines.append(self._rest)
        for line in lines:
            print(self.prefix + line.decode(errors="replace"))
        sys.stdout.flush()


def follow(job: str, logs: dict[str, Path], interval: float = 3.0) -> int:
    """Print states and logs of a job's tasks (``{"7_0": log}``) until all have ended; the worst of their exit codes.

    Looks every ``interval`` seconds. A job that Slurm no longer knows ends with 1.
    """
    several = len(logs) > 1
    tails = {task: Tail(log, f"[{task.split('_')[1]}] " if several else "") for task, log in logs.items()}
    shown: dict[str, str] = {}
    seen_last: dict[str, State] = {}
    ended: dict[str, int] = {}
    unknown = 0
    unreachable = False
    while len(ended) < len(logs):
        try:
            found = states(job)
            unreachable = False
        except Unreachable as error:
            if not unreachable:
                warn(f"Slurm does not answer, asking again: {error}")
            unreachable = True
            time.sleep(interval)
            continue
        unknown = 0 if found else unknown + 1
        for task in [task for task in logs if task not in ended]:
            tails[task].show()
            state = found.get(task)
            if state is not None and shown.get(task) != str(state):
                shown[task] = str(state)
                print(f"job {task}: {state}", flush=True)
            if unknown >= UNKNOWN_AFTER:
                print(f"job {task}: Slurm no longer knows it; how it ended is not known", flush=True)
                ended[task] = 1
            # Seen twice: between a preemption and the new place in the queue an end may show, and a log may come late.
            elif state is not None and state.name in ENDED and seen_last.get(task) == state:
                tails[task].show(last=True)
                print(f"job {task}: ended with exit code {state.code}; log: {logs[task]}", flush=True)
                ended[task] = state.code
            if state is not None:
                seen_last[task] = state
        if len(ended) < len(logs):
            time.sleep(interval)
    return max(ended.values())
