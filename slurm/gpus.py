"""Cards of a shared box: waiting until enough are free, and keeping them while the run lives."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llava.errors import UserError, note
from llava.interruption import Stopped

LOCK_FOLDER = Path("/tmp")
POLL_SECONDS = 0.2
NEARLY_ALL = 0.9  # of a card's memory: what a card that nobody uses has free


class Card(NamedTuple):
    """One row of nvidia-smi; memory in MiB."""

    index: int
    uuid: str
    free: int
    total: int


def mebibytes(text: str) -> int:
    """``22G``, ``22GiB`` or ``500M`` -> MiB; the type of a flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([GM])(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: expected gibibytes or mebibytes, as 22G or 500M")
    return int(float(match[1]) * (1024 if match[2] in "Gg" else 1))


def cards() -> list[Card]:
    """The cards of this machine, in the order of their index."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("--wait-gpus: there is no nvidia-smi here to ask for free cards; leave the flag out") from None
    try:
        rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
        found = [Card(int(index), uuid, int(free), int(total)) for index, uuid, free, total in rows]
    except ValueError:
        found = []
    if done.returncode or not found:
        said = " ".join((done.stderr + done.stdout).split()) or f"exit code {done.returncode}"
        raise UserError(f"--wait-gpus: nvidia-smi does not say which cards are free: {said}")
    return sorted(found)


def runs_at_a_time(count: int, at_least: int | None) -> int:
    """How many runs of ``count`` cards each this machine has cards for, were they all free."""
    return sum(card.total >= (at_least or 0) for card in able_cards(count, at_least)) // count


def able_cards(count: int, at_least: int | None) -> list[Card]:
    """All cards, of which ``count`` have that much memory in all.

    Raises:
        UserError: fewer have.
    """
    here = cards()
    able = sum(card.total >= (at_least or 0) for card in here)
    if able < count:
        size = f" of {at_least} MiB or more" if at_least else ""
        raise UserError(f"--wait-gpus {count}: this machine has {able} card(s){size}; ask for no more than that")
    return here


@contextlib.contextmanager
def taken(
    count: int, at_least: int | None, interval: float = 10.0, stop: Callable[[], bool] = lambda: False
) -> Iterator[tuple[list[int], list[int]]]:
    """Wait until ``count`` cards have ``at_least`` MiB free (None: nearly all); inside, no other waiter gets them.

    Gives the cards' indices, and the open lock files: handed to the run's process, they hold the cards as long as it
    lives, even where this process is killed. It asks nvidia-smi every ``interval`` seconds.

    Raises:
        UserError: there are no such cards here.
        Stopped: ``stop`` has become true while it waited.
    """
    wanted = "nearly all of their memory" if at_least is None else f"{at_least} MiB"
    here = able_cards(count, at_least)
    told = False
    while not (locks := _lock([card for card in here if card.free >= (at_least or NEARLY_ALL * card.total)], count)):
        if not told:
            note(f"waiting for {count} of {len(here)} cards that have {wanted} free and that no other run waits with")
            told = True
        again = time.monotonic() + interval
        while time.monotonic() < again:
            if stop():
                raise Stopped("stopped while it waited for cards; nothing was begun")
            time.sleep(min(interval, POLL_SECONDS))
        here = cards()
    try:
        note(f"taking card(s) {', '.join(map(str, sorted(locks)))}")
        yield sorted(locks), list(locks.values())
    finally:
        _release(locks)


def _lock(free: list[Card], count: int) -> dict[int, int]:
    """``{index: open lock file}`` of ``count`` cards, or nothing: one who kept some could wait for ever."""
    locks: dict[int, int] = {}
    for card in free:
        handle = _open(LOCK_FOLDER / f"llava-{card.uuid}.lock")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            continue
        locks[card.index] = handle
        if len(locks) == count:
            return locks
    _release(locks)
    return {}


def _open(path: Path) -> int:
    # Opened before it is made: in a sticky folder like /tmp the kernel refuses O_CREAT on another user's file.
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.fchmod(handle, 0o644)  # whatever the umask: others must be able to open it
            return handle


def _release(locks: dict[int, int]) -> None:
    for handle in locks.values():
        os.close(handle)
