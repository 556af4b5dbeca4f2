"""Runs of the scripts as processes of their own, without paying for their imports each time.

A server, started as a fresh process with the first run, imports torch, transformers, DeepSpeed and the scripts once
(some 10 s) and forks every run from there: one process for each rank, all in one new process group. A run behaves as
one under ``python`` (one rank) or ``torchrun`` (several) does: its own flags, environment, files and exit codes.

    run = forked.run("train_dpo", ["--output_dir", folder, ...], world_size=2)
    assert run.codes == [0, 0], run.text

    run = forked.start("train_dpo", flags, die=AtCall("llava.train.trainer.DPOTrainer.training_step", 5))
    run.send(signal.SIGUSR2)      # to every rank; run.kill() is SIGKILL
    assert run.wait() == [-9]     # as in subprocess: minus the signal
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a launcher, or a test that ran a script in the tests' own process, may have left in the environment.
NOT_INHERITED = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(ACCELERATE|TORCHELASTIC|SLURM|DS)_.*"
    r"|TENSORBOARD_LOGGING_DIR|PYTEST_CURRENT_TEST"
)


@dataclasses.dataclass
class AtCall:
    """At the ``number``-th call (from 1) of a function, which ``target`` names by module and attributes.

    The signal goes to the whole process group (or to ``rank`` alone, the one that counts), before the call or after it.
    """

    target: str
    number: int = 1
    after: bool = False
    rank: int = 0
    signal: int = signal.SIGKILL
    group: bool = True


@dataclasses.dataclass
class AtFile:
    """Just before the ``number``-th change of a file (from 1) whose line in ``Run.events`` matches ``among``."""

    number: int
    among: str = ""
    rank: int = 0
    signal: int = signal.SIGKILL


class Run:
    """A run that was started: ``pids`` by rank, ``codes`` once it has ended, and what it wrote."""

    def __init__(self, server: Server, pids: list[int], folder: Path) -> None:
        self._server = server
        self.pids = pids
        self.folder = folder
        self.codes: list[int] | None = None

    def poll(self) -> list[int | None]:
        """Exit code of every rank, None while it runs."""
        codes = self.codes or self._server.ask({"poll": self.pids})
        if None not in codes:
            self.codes = codes
        return codes

    def wait(self, timeout: float = 300, grace: float = 15) -> list[int]:
        """Exit codes by rank; a rank that failed takes the others with it, as under a launcher, after ``grace`` s.

        A run that is not over after ``timeout`` seconds is killed, and fails the test with what it wrote.
        """
        end, failed = time.monotonic() + timeout, None
        while None in (codes := self.poll()):
            now = time.monotonic()
            if failed is None and any(codes):
                failed = now
            if now > end or (failed is not None and now > failed + grace):
                self.kill()
                while None in self.poll():
                    time.sleep(0.01)
                assert now <= end, f"not over after {timeout} s:\n{self.text}"
            time.sleep(0.02)
        return codes

    def send(self, number: int) -> None:
        """A signal to every rank, and to what they started."""
        if self.codes is None:  # until then the group's number is not given to others
            os.killpg(self.pids[0], number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send(signal.SIGKILL)

    def stdout(self, rank: int = 0) -> str:
        return (self.folder / f"{rank}.out").read_text(errors="replace")

    def stderr(self, rank: int = 0) -> str:
        return (self.folder / f"{rank}.err").read_text(errors="replace")

    @property
    def text(self) -> str:
        """Everything that every rank wrote, for a test's message."""
        files = [self.folder / f"{rank}.{kind}" for rank in range(len(self.pids)) for kind in ("out", "err")]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files)

    def events(self, rank: int = 0) -> list[str]:
        """Changes of files in the watched folder, one line each, in order; see ``_watch_files``."""
        return (self.folder / f"{rank}.events").read_text().splitlines()


class Server:
    """The client's end of the process that forks."""

    def __init__(self) -> None:
        env = {k: v for k, v in os.environ.items() if not NOT_INHERITED.fullmatch(k)}
        # One thread from the beginning: a process that has had several hangs in the first operator after a fork.
        env.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TRANSFORMERS_VERBOSITY="error", PYTHONPATH=str(ROOT))
        self._folders = tempfile.TemporaryDirectory(prefix="forked-")
        self._log = Path(self._folders.name) / "server.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                cwd=ROOT,
                start_new_session=True,
            )
        atexit.register(self.close)

    def ask(self, request: dict) -> list:
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the fork server has died:\n{self._log.read_text()[-3000:]}"
        return json.loads(answer)

    def start(self, request: dict) -> Run:
        folder = Path(tempfile.mkdtemp(dir=self._folders.name))
        for rank in range(request["world_size"]):
            for kind in ("out", "err", "events"):  # readable from the first moment
                (folder / f"{rank}.{kind}").touch()
        return Run(self, self.ask({**request, "folder": str(folder)}), folder)

    def close(self) -> None:
        """At the end of its input the server kills what still runs, and leaves."""
        self._process.stdin.close()
        self._process.wait()
        self._folders.cleanup()


@functools.cache
def server() -> Server:
    return Server()


def start(
    script: str,
    flags: list,
    world_size: int = 1,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    die: AtCall | AtFile | None = None,
    watch: Path | None = None,
) -> Run:
    """Start ``script`` (``train_dpo``) and do not wait.

    ``cwd`` is by default a new folder of the run's own; ``watch``, whose files count as events, is ``--output_dir``.
    """
    flags = [str(flag) for flag in flags]
    if watch is None and "--output_dir" in flags:
        watch = Path(flags[flags.index("--output_dir") + 1])
    death = None if die is None else {"kind": type(die).__name__, **dataclasses.asdict(die)}
    ranks = {}
    if world_size > 1:  # one process needs no launcher, and has none of its variables
        ranks = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
        ranks["MASTER_PORT"] = free_port()
    request = {"script": script, "flags": flags, "ranks": ranks, "env": env or {}, "die": death}
    paths = {"cwd": None if cwd is None else str(cwd), "watch": None if watch is None else str(watch)}
    return server().start({**request, **paths, "world_size": world_size})


def run(*args, timeout: float = 300, **kwargs) -> Run:
    """``start`` and wait."""
    started = start(*args, **kwargs)
    started.wait(timeout)
    return started


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- the server's side -----------------------------------------------------------------------------------------------

IMPORTED = (
    *("torch", "transformers", "transformers.trainer", "transformers.models.llama.modeling_llama"),
    *("transformers.models.clip.modeling_clip", "transformers.integrations.deepspeed", "deepspeed", "peft"),
    *("accelerate", "torch.utils.tensorboard", "safetensors.torch", "sentencepiece", "PIL.Image"),
    *("deepspeed.runtime.engine", "deepspeed.runtime.zero.stage3", "deepspeed.checkpoint"),
    *("llava.train.arguments", "llava.train.build", "llava.train.trainer", "llava.train.hidden_cache"),
    *("llava.train.reference_cache", "llava.data.preferences", "llava.data.captions", "llava.run_card"),
    *("llava.eval.pope_run", "train_dpo", "train_pretrain", "pope_eval"),
)


def serve() -> None:
    """Fork what is asked for, until the input ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    sys.argv, sys.orig_argv = ["forked.py"], [sys.executable, "forked.py"]
    for name in IMPORTED:
        importlib.import_module(name)
    sys.stdout.flush()
    gc.freeze()
    running: dict[int, int] = {}  # process -> group
    ended: dict[int, int] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "poll" in request:
            for pid in [pid for pid in request["poll"] if pid in running]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = os.waitstatus_to_exitcode(status)
                    del running[pid]
            answer = [ended.get(pid) for pid in request["poll"]]
        else:
            answer = []
            for rank in range(request["world_size"]):
                pid = os.fork()
                if pid == 0:
                    os.close(answers)
                    _become(request, rank, answer[0] if answer else 0)
                os.setpgid(pid, answer[0] if answer else pid)
                answer.append(pid)
            running.update(dict.fromkeys(answer, answer[0]))
        os.write(answers, json.dumps(answer).encode() + b"\n")
    for group in set(running.values()):
        os.killpg(group, signal.SIGKILL)


def _become(request: dict, rank: int, group: int) -> None:
    """In a new process: be this rank of the run, and never return."""
    code = 1
    try:
        os.setpgid(0, group)
        folder, name = Path(request["folder"]), request["script"]
        for number, path in ((0, os.devnull), (1, folder / f"{rank}.out"), (2, folder / f"{rank}.err")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
        import torch

        torch.set_num_threads(1)
        os.environ.update(request["env"])
        if request["ranks"]:
            ranks = {**request["ranks"], "RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({key: str(value) for key, value in ranks.items()})
        working = Path(request["cwd"] or folder / "cwd")
        working.mkdir(exist_ok=True)
        os.chdir(working)
        sys.argv = [str(ROOT / f"{name}.py"), *request["flags"]]
        sys.orig_argv = [sys.executable, *sys.argv]
        _watch_files(request, rank, folder / f"{rank}.events")
        _count_calls(request, rank)
        importlib.import_module(name).main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _count_calls(request: dict, rank: int) -> None:
    die = request["die"]
    if die is None or die["kind"] != "AtCall" or die["rank"] != rank:
        return
    parts = die["target"].split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[cut:-1]:
        owner = getattr(owner, part)
    original, calls = getattr(owner, parts[-1]), 0

    @functools.wraps(original)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != die["number"]:
            return original(*args, **kwargs)
        process = -os.getpgrp() if die["group"] else os.getpid()
        if not die["after"]:
            os.kill(process, die["signal"])
        result = original(*args, **kwargs)
        if die["after"]:
            os.kill(process, die["signal"])
        return result

    setattr(owner, parts[-1], counted)


# Python's audit events that change files, and which of their arguments is the path.
CHANGES = {"open": 0, "os.mkdir": 0, "os.remove": 0, "os.rename": 1, "os.rmdir": 0, "os.truncate": 0}


def _watch_files(request: dict, rank: int, log: Path) -> None:
    """Write a line to ``log`` just before every change of a file in the watched folder, and die where asked.

    ``open checkpoint-4/latest``; the paths are relative. torch and safetensors write in C++ and Rust, of which Python
    hears nothing: they get ``torch.save``, ``torch.save half`` (the data is there, the archive's end is not),
    ``safetensors`` and ``safetensors half`` (the file is cut) lines of their own.
    """
    die = request["die"]
    if request["watch"] is None:
        return
    folder = os.path.abspath(request["watch"]) + os.sep
    lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    mine = die if die is not None and die["kind"] == "AtFile" and die["rank"] == rank else None
    matching = 0

    def happened(what: str, path: str, cut: bool = False) -> None:
        nonlocal matching
        path = os.path.abspath(path)
        if not path.startswith(folder):
            return
        line = f"{what} {path.removeprefix(folder)}"
        os.write(lines, f"{line}\n".encode())
        if mine is not None and re.search(mine["among"], line):
            matching += 1
            if matching == mine["number"]:
                if cut:
                    os.truncate(path, os.path.getsize(path) // 2)
                os.killpg(0, mine["signal"])

    def hook(event: str, args: tuple) -> None:
        if event not in CHANGES:
            return
        path = args[CHANGES[event]]
        if event == "open":
            mode, opening = args[1:]
            if not (set(mode or "") & set("wax+") or (opening or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        if not os.path.isabs(path):
            # shutil.rmtree names entries relative to an open folder, the last argument of these events.
            here = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") and args[-1] >= 0 else None
            path = os.path.join(os.readlink(f"/proc/self/fd/{here}") if here is not None else os.getcwd(), path)
        happened(event.removeprefix("os."), path)

    sys.addaudithook(hook)

    import safetensors.torch
    import torch

    writer, save, serialize = (
        torch.serialization._open_zipfile_writer,
        torch.serialization._save,
        safetensors.torch.serialize_file,
    )
    target = ""

    def opened(where):
        nonlocal target
        name = getattr(where, "name", where)  # a path, an open file, or bytes in memory
        target = os.readlink(f"/proc/self/fd/{name}") if isinstance(name, int) else str(name)
        happened("torch.save", target)
        return writer(where)

    def saved(*args, **kwargs):
        save(*args, **kwargs)
        happened("torch.save half", target)

    def serialized(tensors, path, *args, **kwargs):
        happened("safetensors", path)
        serialize(tensors, path, *args, **kwargs)
        happened("safetensors half", path, cut=True)

    torch.serialization._open_zipfile_writer = opened
    torch.serialization._save = saved
    safetensors.torch.serialize_file = serialized


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve()
