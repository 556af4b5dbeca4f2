"""Errors that a user can mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from llava import interruption, status
from llava.distributed import LostRank, end_workers, leave_world
from llava.interruption import EXIT_STOPPED, Stopped

T = TypeVar("T")

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Input that cannot be used. The message names the file, the record, the key and the mend, on one line.

    ``everywhere`` says that every rank meets the same error (bad flags, bad files read at start-up), so one
    rank of every node prints it. An error met inside training or a data worker may exist on one rank only.
    """

    mend = ""  # what a script adds to the message

    def __init__(self, message: str, *, everywhere: bool = True) -> None:
        if "Original Traceback" in message:
            # A DataLoader worker's exception arrives as the text of its traceback; the last line is the message.
            message = re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1], count=1)
            everywhere = False
        super().__init__(" ".join(message.split("\n")))
        self.everywhere = everywhere


class BrokenImage(UserError):
    """A picture that is missing or cannot be decoded: the one error that ``--skip_missing_images`` passes over."""

    mend = "; fetch it again, or pass --skip_missing_images"


def warn(message: str, *, everywhere: bool = True) -> None:
    """One warning line on stderr; from rank 0 only where every rank has the same one to give."""
    if not everywhere or os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def note(message: str) -> None:
    """One line on stderr about something harmless, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr, flush=True)


def command_line(main: Callable[[], T]) -> Callable[[], T]:
    """Turn a ``UserError`` raised by a script's ``main`` into one line on stderr and exit code 2.

    A run that a signal has stopped (``Stopped``) ends with one line and exit code 75. The heartbeat (``status.json``)
    says how it ended. A ``main`` that returns ends its process here where it was in a process group (``leave_world``).
    """

    @functools.wraps(main)
    def run() -> T:
        interruption.listen()
        try:
            result = main()
        except Stopped as stopped:
            note(str(stopped))
            _end(EXIT_STOPPED)
        except UserError as error:
            rank = os.environ.get("RANK", "0")
            message = f"{error}{error.mend}"
            # One line a node where all ranks meet the same error: another node may lack what this one has.
            if os.environ.get("LOCAL_RANK", "0") == "0" or not error.everywhere:
                where = f"[rank {rank}] " if rank != "0" else ""
                print(f"{where}error: {message}", file=sys.stderr, flush=True)
            status.failed(message)
            _end(EXIT_BAD_INPUT)
        except LostRank as lost:
            print(f"error: {lost}", file=sys.stderr, flush=True)
            status.failed(str(lost))
            _end(1)
        except Exception as error:
            status.failed(f"{type(error).__name__}: {error}")
            end_workers()
            raise
        end_workers()
        interruption.ignore()  # all is written; a signal now would only make a finished run look stopped
        leave_world()
        return result

    return run


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    end_workers()
    # The other ranks may be waiting in a collective: the interpreter's exit would wait for them.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)
