"""Runs on this machine, without a queue: their output is shown and kept, and the signals of a queue reach them."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from slurm import gpus, table
from slurm.launch import ROOT
from slurm.watch import Tail

POLL_SECONDS = 0.2
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """Inside ``with``, what would end this process is kept in ``received``, and ``execute`` passes it on to its run."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> Signals:
        numbers = [n for n in (*STOPPING, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]  # as nohup has it
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


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


def card_variables(indices: list[int]) -> dict[str, str]:
    """What makes a run see these cards, by nvidia-smi's numbers."""
    # CUDA's own order begins with the fastest card.
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, indices)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def run(args: argparse.Namespace, command: list[str], log: Path) -> int:
    """Run the command, waiting for cards first if it was asked for; its exit code.

    Ctrl-C ends it. Any other signal that ends a process makes the run save and leave.
    """
    launch = launch_command(args, command)
    if args.dry_run:
        print(shlex.join(launch))
        return 0
    variables: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        held: list[int] = []
        if args.wait_gpus:
            indices, held = stack.enter_context(gpus.taken(args.wait_gpus, args.min_free))
            variables = card_variables(indices)
        table.remember(args.logs, [(None, log, command)])
        print(f"log: {log}", flush=True)
        signals = stack.enter_context(Signals())
        return execute(launch, log, signals, variables=variables, held=held, show=True)


def execute(
    command: list[str],
    log: Path,
    signals: Signals,
    *,
    variables: Mapping[str, str] | None = None,
    held: Sequence[int] = (),
    show: bool = False,
    launcher: bool = True,
    started: Callable[[int], None] | None = None,
) -> int:
    """Run a command to its end, its output added to ``log`` and with ``show`` printed; its exit code, or 128 + signal.

    ``held`` are open files that the command keeps open. Without ``launcher`` (launch.py) it hears signals itself.
    ``started`` is told the number of its process.
    """
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **(variables or {})}  # a log that is read while it is written
    with log.open("ab") as file:
        # A session of its own: the terminal's Ctrl-C comes once, through this process.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=held,
            start_new_session=True,
        )
    if started:
        started(process.pid)
    tail = Tail(log) if show else None
    follow(psutil.Process(process.pid), signals, launcher=launcher, alive=lambda: process.poll() is None, tail=tail)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def follow(
    process: psutil.Process,
    signals: Signals,
    *,
    launcher: bool = True,
    alive: Callable[[], bool] | None = None,
    tail: Tail | None = None,
) -> None:
    """Wait until a process ends, which need not be a child; what this one is sent meanwhile is passed on to it."""
    alive = alive or (lambda: is_alive(process))
    passed = 0
    while alive():
        if len(signals.received) > passed and _pass_on(signals.received[passed], process, launcher):
            passed += 1
        if tail:
            tail.show()
        time.sleep(POLL_SECONDS)
    if tail:
        tail.show(last=True)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs, and is not only waited for by nobody."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _pass_on(number: int, process: psutil.Process, launcher: bool) -> bool:
    """Tell the run to save and leave (or, for SIGINT, its launcher to end it); false while it has no ranks yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if number == signal.SIGINT:
            process.send_signal(signal.SIGINT)
            return True
        # The ranks are in sessions of their own, and the launcher is deaf: each is told, as Slurm does it.
        ranks = process.children(recursive=True) if launcher else [process]
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR2)
        return bool(ranks)
    return True
