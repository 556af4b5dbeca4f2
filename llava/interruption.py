"""Signals that end a queued job: what they do to a process depends on what it would lose.

Slurm announces a time limit or a preemption with the signal of ``--signal`` (here SIGUSR1 or SIGUSR2), or with SIGTERM.
A process that has nothing to save leaves at once; one that is ``held`` is only told, and saves when it can. Either way
it ends with ``EXIT_STOPPED``: the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not a failure, try again

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class Stopped(Exception):
    """A signal ended the run after everything was saved; the message says where it goes on."""


class _State:
    held = 0
    received: str | None = None
    ending = False


def listen() -> None:
    """From now on the signals are answered; call it first. Where they are not to be had (a thread), do nothing."""
    if threading.current_thread() is threading.main_thread():
        _State.held, _State.received, _State.ending = 0, None, False
        for number in SIGNALS:
            signal.signal(number, _answer)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, a signal only sets what ``requested`` gives: the run saves, then raises ``Stopped``."""
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Inside, the end is being written, and a signal changes nothing: stopping would only lose it."""
    with held():
        _State.ending = True
        try:
            yield
        finally:
            _State.ending = False
            _State.received = None


def ignore() -> None:
    """The signals are not for this process but for the one it works for."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_if_requested(what_stays: str) -> None:
    """Raise ``Stopped`` where this process was sent a signal; ``what_stays`` says what it will find when it goes on."""
    if _State.received is not None and not _State.ending:
        raise Stopped(f"stopped by {_State.received}; {what_stays}")


def requested() -> str | None:
    """Name of the signal that this process was sent while ``held``, or None."""
    return _State.received


def _answer(number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    if not _State.held:
        # os.write: a handler may interrupt a print, whose buffer must not be entered twice.
        os.write(sys.__stderr__.fileno(), f"note: {name}: leaving, with nothing to save\n".encode())
        os._exit(EXIT_STOPPED)
    if not _State.ending and _State.received is None:
        _State.received = name
