"""A row of steps, each run once: finished ones are noted, and a run that was killed goes on after the last of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from llava.errors import UserError
from llava.files import atomic_folder, read_object, write_json

LAST_LINES = 12  # of a failed command's log
PROGRESS = "progress.json"
# Not bin/deepspeed: pip writes the interpreter's path into its first line, which fails where that path holds a space.
LAUNCHERS = {"python": [sys.executable], "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner"]}


class Journey:
    """Steps whose results lie in ``out``; ``progress.json`` there holds the finished ones with their seconds.

    What an unfinished run left behind is used where code, weights and seed (``settings``) are the same. A finished run
    is set aside as ``out``.previous, and the journey begins anew.

    Raises:
        UserError: ``out`` cannot be written, holds something else, or another run is at work there.
    """

    def __init__(self, out: Path, root: Path, settings: str) -> None:
        self.out = out
        self.root = root
        self.previous = out.parent / f"{out.name}.previous"
        self.key = _fingerprint(root, settings)
        self.step = 0
        self.progress: dict[str, Any] = {}

    def __enter__(self) -> Journey:
        if self.out == self.root or self.out in self.root.parents:
            raise UserError(f"--output_dir {self.out}: holds the program itself; choose another folder")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for folder in (self.out, self.previous):
                if folder.is_dir() and any(folder.iterdir()) and not (folder / PROGRESS).is_file():
                    raise UserError(f"--output_dir: {folder} holds files of something else; choose another folder")
            self._lock = (self.out.parent / f".{self.out.name}.lock").open("a+")
        except OSError as error:
            raise UserError(f"--output_dir {self.out}: cannot be written ({error.strerror})") from None
        self._take_lock()
        self._on_term = signal.signal(signal.SIGTERM, _interrupt)
        self.progress = self._earlier()
        write_json(self.out / PROGRESS, self.progress)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.close()
        signal.signal(signal.SIGTERM, self._on_term)
        if kind is KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from here", file=sys.stderr, flush=True)
            raise SystemExit(128 + signal.SIGINT) from None

    @property
    def times(self) -> dict[str, float]:
        """Seconds of the finished steps; of a step that was interrupted, those of its last attempt."""
        return self.progress["seconds"]

    def _earlier(self) -> dict[str, Any]:
        file = self.out / PROGRESS
        earlier = read_object(file) if file.is_file() else {}
        if earlier.get("key") == self.key and not earlier["finished"]:
            if earlier["seconds"]:
                print(f"going on after: {', '.join(earlier['seconds'])}", flush=True)
            return earlier
        if earlier:
            shutil.rmtree(self.previous, ignore_errors=True)
            self.out.rename(self.previous)
            self.out.mkdir()
            print(f"the run that was in {self.out} is now in {self.previous}", flush=True)
        return {"key": self.key, "finished": False, "seconds": {}}

    def _take_lock(self) -> None:
        """One run at a time. The running command holds the lock too: it outlives a run that died of SIGKILL, and two
        writers in one folder would spoil both."""
        deadline = time.monotonic() + 10
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                self._lock.seek(0)
                owner, _, group = self._lock.read().partition(" ")
                if not group or _alive(int(owner)) or time.monotonic() > deadline:
                    message = f"{self.out}: another run of the demo writes there; wait for it, or end it"
                    raise UserError(message) from None
                _end(int(group))
                time.sleep(0.2)
        self._note_command(None)

    def _note_command(self, group: int | None) -> None:
        """Who runs which process group, for ``_take_lock`` of a later run."""
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} {group}" if group else f"{os.getpid()}")
        self._lock.flush()

    def _begin(self, title: str) -> bool:
        """Whether the step still has to run."""
        self.step += 1
        if title in self.times:
            return False
        print(f"{self.step:2}. {title} ... ", end="", flush=True)
        self._began = time.monotonic()
        return True

    def _finish(self, title: str) -> None:
        self.times[title] = round(time.monotonic() - self._began, 1)
        write_json(self.out / PROGRESS, self.progress)
        print(f"{self.times[title]:.0f} s", flush=True)

    def make(self, title: str, target: Path, fill: Callable[[Path], Any]) -> None:
        """A folder that ``fill`` writes; it gets its name when it is complete."""
        if self._begin(title):
            for left in target.parent.glob(f".{target.name}.*"):
                shutil.rmtree(left, ignore_errors=True)
            with atomic_folder(target) as folder:
                fill(folder)
            self._finish(title)

    def run(self, title: str, command: str, threads: int = 2) -> None:
        """A command, on the CPU alone, with as many ``threads`` on every machine: sums depend on their number.

        Raises:
            UserError: it failed; the end of its log is printed before.
        """
        if not self._begin(title):
            return
        first, *rest = shlex.split(command)
        log = self.out / "logs" / f"{self.step:02} {title}.log"
        log.parent.mkdir(exist_ok=True)
        settings = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        with log.open("ab") as file:
            file.write(f"$ {command}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [*LAUNCHERS[first], *rest],
                stdout=file,
                stderr=file,
                cwd=self.root,
                env={**os.environ, **settings},
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )
            try:
                self._note_command(process.pid)
                code = process.wait()
            finally:
                _end(process.pid)  # also what a launcher that died has left running
                process.wait()
                self._note_command(None)
        if code:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            print("failed", *tail, sep="\n", flush=True)
            raise UserError(f"'{title}' ended with exit code {code}; all it said is in {log}")
        self._finish(title)

    def finish(self) -> None:
        """The next run begins anew."""
        self.progress["finished"] = True
        write_json(self.out / PROGRESS, self.progress)


def is_finished(out: Path) -> bool:
    """Whether ``out`` holds a journey that came to its end."""
    return (out / PROGRESS).is_file() and read_object(out / PROGRESS).get("finished") is True


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end(group: int) -> None:
    # macOS says EPERM of a group whose processes have ended and were not waited for.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fingerprint(root: Path, settings: str) -> str:
    """A hash of everything that decides the results: the code, the pins, the shipped weights, the settings."""
    digest = hashlib.sha256(settings.encode())
    files = [*root.glob("*.py"), *root.glob("*.txt"), *root.glob("llava/**/*.py"), *root.glob("zero_configs/*")]
    files += [file for file in root.glob("demo/*") if file.suffix in (".py", ".html")]
    files += [file for file in root.glob("demo/weights/**/*") if file.is_file()]
    for file in sorted(files):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()
