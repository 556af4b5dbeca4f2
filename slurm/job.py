#!/usr/bin/env python
"""Run a script on all nodes of a Slurm job; when the job is stopped, have it saved, queued again and gone on with.

    python slurm/job.py --max-requeues 10 -- train_dpo.py ARGS

It is the batch process of the job (``exec`` it), which Slurm sends the signal of ``--signal=B:USR2@180``. It passes
SIGUSR2 on to all processes of all nodes, waits until they have saved and left, and then queues the job again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from llava.command_line import OneLineParser, refuse_unknown  # noqa: E402
from llava.errors import UserError, command_line  # noqa: E402
from llava.interruption import EXIT_STOPPED, SIGNALS  # noqa: E402
from slurm.launch import add_launch_options, find_script, split_command  # noqa: E402

MAX_REQUEUES = 10
LOGS = ROOT / "slurm" / "logs"
LAUNCH = ROOT / "slurm" / "launch.py"
KILLED = 128 + signal.SIGKILL
CANCELLED = 128 + signal.SIGTERM
_AGAIN = (EXIT_STOPPED, KILLED)
# A rank that is just starting up misses a signal; a second one changes nothing for those that heard the first.
REPEAT_SECONDS = 15.0
_CARDS = re.compile(r"SLURM_(GPUS(_PER_(NODE|TASK|SOCKET))?|CPUS_PER_GPU)")
_GO_ON = "submitted again, it goes on from its last checkpoint"


class Outcome(NamedTuple):
    """How a node ended: exit code, and when its first process failed (seconds since 1970)."""

    code: int
    when: float


class _Signals:
    """What this process was sent, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)


def run_job(
    command: list[str],
    *,
    launcher: str = "torchrun",
    processes: int | None = None,
    include: str | None = None,
    max_requeues: int = MAX_REQUEUES,
    logs: Path = LOGS,
) -> int:
    """Run ``command`` (a script and its arguments) on all nodes of this job; call it in the batch step.

    ``logs`` is a folder that all nodes share. Gives the exit code with which the job should end: 0; 75 where it was
    stopped (queued again or not, a line says which); 143 where it was cancelled; else that of the first failure.
    """
    if max_requeues < 0:
        raise UserError(f"--max-requeues {max_requeues}: expected 0 or more")
    job = job_name(os.environ)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    with _Signals() as signals:
        if restarts > max_requeues:
            _say(job, f"was started again {restarts} times, more than --max-requeues {max_requeues}; {_GO_ON}")
            return EXIT_STOPPED
        options = ["--launcher", launcher]
        options += ["--processes", str(processes)] if processes is not None else []
        options += ["--include", include] if include is not None else []
        code = _run_nodes([*options, "--", *find_script(command)], job, logs / f".outcome-{job}", signals)
        return _settled(job, code, signals.names, max_requeues)


def run_here(command: list[str], env: Mapping[str, str], max_requeues: int = MAX_REQUEUES) -> int:
    """Run one process (a program with its arguments) in the batch step; otherwise as ``run_job``."""
    job = job_name(os.environ)
    again = 0.0
    with _Signals() as signals:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env)
        while process.poll() is None:
            if signals.names and time.monotonic() >= again:
                again = time.monotonic() + REPEAT_SECONDS
                process.send_signal(signal.SIGUSR2)
            time.sleep(0.2)
        code = process.returncode
        if -code in SIGNALS:
            code = EXIT_STOPPED  # in its first moments it has no handler yet
        return _settled(job, code if code >= 0 else 128 - code, signals.names, max_requeues)


def _settled(job: str, code: int, signals: list[str], max_requeues: int) -> int:
    """What the end of a run means for its job, which is queued again where the run is to go on; the job's exit code."""
    if code == 0:
        return code
    if "SIGTERM" in signals or (code in _AGAIN and _is_ending(job)):
        _say(job, "was ended: cancelled, or its time was up before all was saved")
        return CANCELLED
    if code not in _AGAIN:
        _say(job, f"failed with exit code {code}")
        return code
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    why = f"stopped by {signals[0] if signals else 'a signal'}" if code == EXIT_STOPPED else "killed"
    if restarts >= max_requeues:
        _say(job, f"{why}; not queued again: --max-requeues {max_requeues} reached; {_GO_ON}")
    else:
        _requeue(job, why, f"{restarts + 1} of {max_requeues}")
    return code


def job_name(env: Mapping[str, str]) -> str:
    """What scontrol takes for this job alone: the number of an array's last task also means the whole array."""
    if "SLURM_JOB_ID" not in env:
        raise UserError("slurm/job.py runs inside a job; sbatch a script of slurm/, or use slurm/submit.py")
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def verdict(outcomes: list[Outcome], srun: int) -> int:
    """The exit code of the first failure. ``srun`` is srun's own code, for nodes that ended without a word.

    A rank whose fellow was killed, or left, loses its connection and fails with 1: that is the cause only where no
    node has another.
    """
    failures = [outcome for outcome in outcomes if outcome.code]
    causes = [outcome for outcome in failures if outcome.code != 1] or failures
    if causes:
        return min(causes, key=lambda outcome: outcome.when).code
    code = 128 - srun if srun < 0 else srun
    return EXIT_STOPPED if code - 128 in SIGNALS else code  # in its first moments launch.py is not deaf to them yet


def _run_nodes(launch: list[str], job: str, folder: Path, signals: _Signals) -> int:
    """Start launch.py on every node and wait; gives the verdict."""
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        # Made here: on a network file system a new name may take half a minute to be seen, new content does not.
        files = [folder / str(node) for node in range(nodes)]
        for file in files:
            file.touch()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; name a shared folder for logs") from None
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--quiet"]
    srun.append("--cpu-bind=none")  # one task a node, whose processes share all of the job's CPUs there
    # srun would read these as its own options. Without them a step gets all cards of the job, also those that another
    # option than the script's own has brought (--gres).
    env = {name: value for name, value in os.environ.items() if not _CARDS.fullmatch(name)}
    if "SLURM_CPUS_PER_TASK" in env:
        env["SRUN_CPUS_PER_TASK"] = env["SLURM_CPUS_PER_TASK"]  # since Slurm 22.05 srun does not take it over itself
    step = subprocess.Popen(
        [*srun, sys.executable, str(LAUNCH), "--outcome", f"{folder}/", *launch], stdin=subprocess.DEVNULL, env=env
    )
    again = 0.0
    while step.poll() is None:
        if signals.names and time.monotonic() >= again:
            if not again:
                _say(job, f"{signals.names[0]}: telling all processes to save and leave")
            again = time.monotonic() + REPEAT_SECONDS
            step.send_signal(signal.SIGUSR2)  # srun passes it on to every process of the step
        time.sleep(0.2)
    outcomes = [Outcome(**json.loads(text)) for file in files if (text := file.read_text())]
    shutil.rmtree(folder)
    return verdict(outcomes, step.returncode)


def _is_ending(job: str) -> bool:
    """Whether Slurm is ending the job already. Cancelled, it would be queued again all the same if asked to be."""
    state = subprocess.run(["squeue", "--noheader", "--format=%T", f"--jobs={job}"], capture_output=True, text=True)
    return state.stdout.strip() in ("COMPLETING", "CANCELLED")


def _requeue(job: str, why: str, count: str) -> None:
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr + done.stdout).split())
        _say(job, f"{why}; Slurm does not queue it again ({said}); {_GO_ON}")
    else:
        _say(job, f"{why}; queued again ({count})")


def _say(job: str, what: str) -> None:
    print(f"job {job}: {what}", file=sys.stderr, flush=True)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the command to run."""
    parser = OneLineParser(description="Run a script on all nodes of this Slurm job.", allow_abbrev=False)
    add_launch_options(parser)
    parser.add_argument(
        "--max-requeues",
        type=int,
        metavar="N",
        default=MAX_REQUEUES,
        help="how often the job may be queued again after it was stopped or killed (default: %(default)s)",
    )
    own, command = split_command(argv)
    args, rest = parser.parse_known_args(own)
    refuse_unknown(parser, rest)
    return args, command


@command_line
def main() -> int:
    """The command line; gives the exit code."""
    args, command = parse_args(sys.argv[1:])
    return run_job(
        command,
        launcher=args.launcher,
        processes=args.processes,
        include=args.include,
        max_requeues=args.max_requeues,
    )


if __name__ == "__main__":
    sys.exit(main())
