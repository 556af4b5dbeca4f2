"""A row of steps that is gone through once: every finished one is noted, and a killed run goes on behind the last."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from llava.errors import UserError
from llava.files import read_json, write_json

LAST_LINES = 12  # of a failed command's log


class Journey:
    """Steps whose results lie in ``out``; ``progress.json`` there holds the finished ones with their seconds.

    What an unfinished run left behind is used where code, weights and seed (``settings``) are the same. A finished run
    is set aside as ``out``.previous, and the journey begins anew.
    """

    def __init__(self, out: Path, root: Path, settings: str) -> None:
        self.out = out
        self.root = root
        self.key = _fingerprint(root, settings)
        self.step = 0
        self.progress: dict[str, Any] = {}

    def __enter__(self) -> Journey:
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = self.out.with_name(f".{self.out.name}.lock").open("a+")
        self._take_lock()
        self.progress = self._earlier()
        write_json(self.out / "progress.json", self.progress)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.close()

    @property
    def times(self) -> dict[str, float]:
        """Seconds of the finished steps."""
        return self.progress["seconds"]

    def _earlier(self) -> dict[str, Any]:
        file = self.out / "progress.json"
        earlier = read_json(file) if file.is_file() else {}
        if earlier.get("key") == self.key and not earlier["finished"]:
            if earlier["seconds"]:
                print(f"going on after: {', '.join(earlier['seconds'])}", flush=True)
            return earlier
        if any(self.out.iterdir()):
            previous = self.out.with_name(f"{self.out.name}.previous")
            shutil.rmtree(previous, ignore_errors=True)
            self.out.rename(previous)
            self.out.mkdir()
            print(f"the run that was in {self.out} is now in {previous}", flush=True)
        return {"key": self.key, "finished": False, "seconds": {}}

    def _take_lock(self) -> None:
        """One run at a time. The running command holds the lock too: it outlives a run that died of SIGKILL, and two
        writers in one folder would spoil both."""
        deadline = time.monotonic() + 10
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._lock.seek(0)
                owner, _, group = self._lock.read().partition(" ")
                if not group or _alive(int(owner)) or time.monotonic() > deadline:
                    message = f"{self.out}: another run of the demo writes there; wait for it, or end it"
                    raise UserError(message) from None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(group), signal.SIGKILL)
                time.sleep(0.2)

    def _note_command(self, group: int) -> None:
        """Who runs which process group, for ``_take_lock`` of a later run."""
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} {group}")
        self._lock.flush()

    def _begin(self, title: str) -> bool:
        """Whether the step has to be gone."""
        self.step += 1
        if title in self.times:
            return False
        print(f"{self.step:2}. {title} ... ", end="", flush=True)
        self._began = time.monotonic()
        return True

    def _end(self, title: str) -> None:
        self.times[title] = round(time.monotonic() - self._began, 1)
        write_json(self.out / "progress.json", self.progress)
        print(f"{self.times[title]:.0f} s", flush=True)

    def make(self, title: str, target: Path, fill: Callable[[Path], Any]) -> None:
        """A folder that ``fill`` writes; it gets its name when it is complete."""
        if not self._begin(title):
            return
        unfinished = target.with_name(f".{target.name}.unfinished")
        for left in (unfinished, target):
            shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir()
        fill(unfinished)
        unfinished.rename(target)
        self._end(title)

    def run(self, title: str, command: str, threads: int = 2) -> None:
        """A command, on the CPU alone, with as many ``threads`` on every machine: sums depend on their number.

        Raises:
            UserError: it failed; the end of its log is printed before.
        """
        if not self._begin(title):
            return
        words = shlex.split(command)
        words[0] = str(Path(sys.executable).parent / words[0])  # python, deepspeed: those of this environment
        log = self.out / "logs" / f"{self.step:02} {title}.log"
        log.parent.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        }
        with log.open("ab") as file:
            file.write(f"$ {command}\n".encode())
            file.flush()
            process = subprocess.Popen(
                words,
                stdout=file,
                stderr=file,
                cwd=self.root,
                env=environment,
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )
            self._note_command(process.pid)
            try:
                code = process.wait()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if code:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            print("failed", *tail, sep="\n", flush=True)
            raise UserError(f"'{title}' ended with exit code {code}; all it said is in {log}")
        self._end(title)

    def finish(self) -> None:
        """The next run begins anew."""
        self.progress["finished"] = True
        write_json(self.out / "progress.json", self.progress)

    @property
    def port(self) -> int:
        """A TCP port nobody listens on at the moment."""
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            return server.getsockname()[1]


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
