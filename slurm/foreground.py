"""A run on this machine, without a queue: its output is shown and kept, and the signals of a queue reach it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from slurm import gpus, table
from slurm.launch import ROOT
from slurm.watch import Tail

POLL_SECONDS = 0.2
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def launch_command(args: argparse.Namespace, command: list[str]) -> list[str]:
    """How launch.py is called for these flags of submit.py."""
    processes = ["--processes", str(args.processes)] if args.processes else []
    include = ["--include", args.include] if args.include else []
    return [
        sys.executable,
        str(ROOT / "slurm" / "launch.py"),
        *("--launcher", args.launcher),
        *processes,
        *include,
        "--",
        *command,
    ]


def run(args: argparse.Namespace, command: list[str], log: Path) -> int:
    """Run the command, waiting for cards first if it was asked for; its exit code.

    Ctrl-C ends it. Any other signal that ends a process makes the run save and leave.
    """
    launch = launch_command(args, command)
    if args.dry_run:
        print(shlex.join(launch))
        return 0
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}  # a log that is read while it is written
    with contextlib.ExitStack() as stack:
        held: list[int] = []
        if args.wait_gpus:
            indices, held = stack.enter_context(gpus.taken(args.wait_gpus, args.min_free))
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, indices))
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's order; CUDA's own begins with the fastest card
        table.remember(args.logs, [(None, log, command)])
        print(f"log: {log}", flush=True)
        received: list[int] = []
        for number in (*STOPPING, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda number, _: received.append(number))
        with log.open("ab") as file:
            # A session of its own: the terminal's Ctrl-C comes once, through this process.
            process = subprocess.Popen(
                launch,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=held,
                start_new_session=True,
            )
        tail = Tail(log)
        while process.poll() is None:
            if received and _pass_on(received[0], process):
                received.pop(0)
            tail.show()
            time.sleep(POLL_SECONDS)
        tail.show(last=True)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _pass_on(number: int, process: subprocess.Popen[bytes]) -> bool:
    """Tell the run to save and leave (or, for SIGINT, its launcher to end it); false while it has no ranks yet."""
    if number == signal.SIGINT:
        process.send_signal(signal.SIGINT)
        return True
    # The ranks are in sessions of their own, and the launcher is deaf: each is told, as Slurm does it.
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(process.pid).children(recursive=True)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR2)
        return bool(ranks)
    return True
