#!/usr/bin/env python
"""Put a run into Slurm's queue, follow it, or start it here.

    python slurm/submit.py --nodes 2 --gpus 4 --hours 8 --watch -- train_dpo.py --output_dir checkpoints/ha-dpo ...
    python slurm/submit.py --local --wait-gpus 4 --min-free 22G -- train_dpo.py ...
    python slurm/submit.py --sweep sweep.yaml --gpus 1 --hours 8 --parallel 4 --watch
    python slurm/submit.py --status

Behind -- stands the script with its arguments; a sweep's file holds them. A job that is preempted, or whose time is
up, saves, goes back into the queue and on from there. What no flag says (partition, account, ...) is as slurm/env.sh
has it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor, SlurmJob, _make_sbatch_string

from llava.errors import UserError, command_line
from slurm import flags, foreground, runs, sweep, table, watch
from slurm.launch import LAUNCHERS, ROOT
from slurm.sweep import log_file

SETTINGS = ROOT / "slurm" / "env.sh"
# Options of sbatch by the names of their variables, which win over a script's lines; of a group one alone may be given.
VARIABLES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX"}
GROUPS = [
    flags.CARDS,
    {"mem", "mem-per-cpu", "mem-per-gpu"},
    {"requeue", "no-requeue"},
    {"output", "error"},
]


Call = tuple[str, str, dict[str, Any]]  # module, function, arguments


class Job:
    """What the batch step calls. It is pickled by value: a node's Python finds submitit, but not this file."""

    def __init__(self, module: str, function: str, arguments: dict[str, Any]) -> None:
        self.root = str(ROOT)
        self.module = module
        self.function = function
        self.arguments = arguments

    def __call__(self) -> None:
        """Run the job; end the process with the job's exit code, of which submitit would make 1."""
        import importlib
        import sys

        sys.path.insert(0, self.root)
        code = getattr(importlib.import_module(self.module), self.function)(**self.arguments)
        if code:
            sys.exit(code)


class Executor(SlurmExecutor):
    """submitit's, which writes its script also where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, tasks: int) -> str:
        """The batch script of so many tasks."""
        array = {"map_count": tasks} if tasks > 1 else {}
        return _make_sbatch_string(self._submitit_command_str, self.folder, **self.parameters, **array)


def settings() -> dict[str, str]:
    """The variables of slurm/env.sh, which keeps those that are set already; sbatch's are also set in this process."""
    source = ["bash", "-c", 'set -a; . "$0" >&2 && env -0', str(SETTINGS)]
    done = subprocess.run(source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{SETTINGS} fails: {' '.join(done.stderr.split())}")
    found = {name: value for name, _, value in (line.partition("=") for line in done.stdout.split("\0"))}
    os.environ.update({name: value for name, value in found.items() if name.startswith("SBATCH_")})
    return found


def executor(args: argparse.Namespace, name: str, tasks: int, **options: str) -> Executor:
    """submitit's executor with the flags as its parameters; removes variables that would override them.

    ``options`` are further ones of sbatch.
    """
    folder = args.logs / "jobs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    # The batch process is Python itself, so that it gets the signal of --signal=B; until it can answer, none harms it.
    made = Executor(folder, python=f"exec {shlex.quote(sys.executable)}")
    made.update_parameters(
        job_name=name,
        nodes=args.nodes,
        ntasks_per_node=1,
        gpus_per_node=args.gpus,
        time=math.ceil(args.hours * 60) if args.hours else None,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        exclude=args.exclude,
        mem=f"{args.mem_gb}G" if args.mem_gb else None,
        cpus_per_task=args.cpus_per_task,
        array_parallelism=args.parallel or tasks,
        wckey=None,
        use_srun=False,
        stderr_to_stdout=True,
        setup=["trap '' USR1 USR2", "export SUBMITIT_LOG_LEVEL=ERROR"],
        additional_parameters={
            "output": str(log_file(args.logs, name, "%A_%a" if tasks > 1 else "%j")),
            "signal": f"B:USR2@{args.signal_before}",
            "requeue" if args.max_requeues else "no-requeue": True,
            **dict(map(flags.sbatch_option, args.sbatch)),
            **options,
        },
    )
    options = set(re.findall(r"^#SBATCH --([\w-]+)", made.script(tasks), flags=re.MULTILINE))
    for option in options.union(*(group for group in GROUPS if group & options)):
        os.environ.pop("SBATCH_" + VARIABLES.get(option, option.upper().replace("-", "_")), None)
    return made


def put(
    args: argparse.Namespace, name: str, tasks: list[tuple[Call, list[str]]], **options: str
) -> list[tuple[str, Path]]:
    """Submit a job, or of several calls an array of jobs: their numbers and logs. The words are for ``--status``.

    ``options`` are further ones of sbatch. ``--dry-run`` only prints, and then the numbers are names.
    """
    queue = executor(args, name, len(tasks), **options)
    if args.dry_run:
        print(queue.script(len(tasks)))
        for key in sorted(key for key in os.environ if key.startswith("SBATCH_")):
            print(f"# set: {key}={os.environ[key]}")
        for _, words in tasks:
            print(f"# runs: {shlex.join(words)}")
        return [(f"{name.upper()}_{task}", queue.folder) for task in range(len(tasks))]
    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise UserError("there is no Slurm on this machine (sbatch, srun); --local runs here, --dry-run only prints")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what the error says too
            jobs: list[SlurmJob[None]] = queue.submit_array([Job(*call) for call, _ in tasks])
    except FailedJobError as error:
        shutil.rmtree(queue.folder)
        said = str(error).replace("sbatch: error: ", "").strip().splitlines()
        raise UserError(f"sbatch refuses the job: {'; '.join(said)}") from None
    except OSError as error:
        raise UserError(f"--logs {args.logs}: cannot be written: {error.strerror}") from None
    logs = [(job.job_id, log_file(args.logs, name, job.job_id)) for job in jobs]
    table.remember(args.logs, [(*job, words) for job, (_, words) in zip(logs, tasks, strict=True)])
    number = jobs[0].job_id.split("_")[0]
    print(f"submitted job {number}; log: {log_file(args.logs, name, number + '_*' if len(tasks) > 1 else number)}")
    return logs


def enqueue(args: argparse.Namespace, command: list[str]) -> int:
    """Submit the command, or the array; with ``--watch`` follow it. Gives an exit code."""
    todo = runs.commands(command, args.array)
    flags.fill(args, settings())
    how = {
        "launcher": args.launcher,
        "processes": args.processes,
        "include": args.include,
        "max_requeues": args.max_requeues,
        "logs": args.logs,
    }
    logs = put(args, args.name, [(("slurm.job", "run_job", {"command": run, **how}), run) for run in todo])
    if args.dry_run or not args.watch:
        return 0
    number = logs[0][0].split("_")[0]
    try:
        return watch.follow(number, dict(logs))
    except KeyboardInterrupt:
        print(f"\nnote: job {number} goes on; scancel {number} ends it", file=sys.stderr)
        return 128 + signal.SIGINT


@command_line
def main() -> int:
    """The command line; gives the exit code."""
    args, command = flags.parse_args(__doc__, sys.argv[1:])
    if args.status is not None:
        table.show(args.status, args.logs)
        return 0
    args.name = args.name or re.sub(r"[^\w.-]", "-", Path(args.sweep or command[0]).stem.removeprefix("train_"))
    if args.sweep:
        if args.local:
            args.launcher = args.launcher or LAUNCHERS[0]
        else:
            flags.fill(args, settings())
        return sweep.start(args, put)
    if not args.local:
        return enqueue(args, command)
    args.launcher = args.launcher or LAUNCHERS[0]
    log = log_file(args.logs, args.name, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    if args.wait_gpus:
        runs.commands(command, None)  # a mistake in them would show after the waiting only
    return foreground.run(args, command, log)


if __name__ == "__main__":
    sys.exit(main())
