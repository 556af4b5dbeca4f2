"""``run.json``: how an output folder came to be, enough to repeat it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.files import claim_folder, read_object, sha256, write_json

FILE = "run.json"
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "peft",
    "tokenizers",
    "sentencepiece",
    "numpy",
    "pillow",
)
AFRESH = ("False", "false")  # values of --resume_from_checkpoint
# Variables of a process that decide on which card and with how many threads it computes.
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS", "DS_ACCELERATOR")
LONGEST_DIFF = 100_000  # characters; a longer one is cut, and says so


class RunCard:
    """Written when a run starts and again when it ends (``finish``), each time whole."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        arguments: dict[str, Any],
        data: Iterable[str | os.PathLike[str] | None],
        seed: int | None,
        name: str = FILE,
    ) -> None:
        self.path = Path(folder) / name
        self.goes_on = False
        self._start = time.time()
        self.content: dict[str, Any] = {
            "command": shlex.join(sys.orig_argv),
            "working_directory": str(Path.cwd()),
            "arguments": arguments,
            "git": git_state(),
            "versions": versions(),
            "data": {str(path): {"sha256": sha256(path), "bytes": Path(path).stat().st_size} for path in data if path},
            "hardware": hardware(),
            "launch": launch(),
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            "seed": seed,
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "run": uuid.uuid4().hex,
            "status": "running",
        }

    def begin(self, resumed: bool = False) -> None:
        """Write the card; one that goes on has the name (``run``) of its earlier parts, and their cards in ``earlier``.

        A run ``goes_on`` when it is ``resumed`` from a checkpoint, and also where it was killed before it had one.

        Raises:
            UserError: another process is writing to the folder, or a file of records is another one by now.
        """
        claim_folder(self.path.parent)
        before = read_object(self.path) if self.path.is_file() else {}
        arguments = self.content["arguments"]
        killed = before.get("status") not in (None, "finished") and before.get("arguments") == arguments
        afresh = str(arguments.get("resume_from_checkpoint")) in AFRESH and not queued_again()
        self.goes_on = resumed or (killed and not afresh)
        for path, file in self.content["data"].items() if resumed else ():
            if before.get("data", {}).get(path, file)["sha256"] != file["sha256"]:
                raise UserError(
                    f"{path} has changed since the run began, and its records would not be those that are still to "
                    "come; bring it back, choose another --output_dir, or pass --resume_from_checkpoint False"
                )
        if self.goes_on and before:
            self.content["run"] = before.get("run", self.content["run"])
            self.content["earlier"] = [*before.pop("earlier", []), before]
        self.write()

    def write(self) -> None:
        """Write the card as it stands."""
        write_json(self.path, self.content)

    def stop(self, reason: str) -> None:
        """The run was stopped by a signal and will go on."""
        self.content.update(status="stopped", wall_time_s=round(time.time() - self._start, 3), stopped=reason)
        self.write()

    def finish(self, metrics: dict[str, Any]) -> None:
        """The run ended well: wall time in seconds and final metrics."""
        self.content.update(status="finished", wall_time_s=round(time.time() - self._start, 3), metrics=metrics)
        self.write()


def queued_again() -> bool:
    """Whether this is not the first start of a Slurm job: its command was written for that one."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def git_state() -> dict[str, str] | None:
    """Commit and uncommitted changes of the code that runs; None where it is no git checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, errors="replace"
        ).stdout

    try:
        diff = git("diff", "HEAD")
        cut = "" if len(diff) <= LONGEST_DIFF else f"\n[cut: {len(diff)} characters in all]"
        return {"commit": git("rev-parse", "HEAD").strip(), "diff": diff[:LONGEST_DIFF] + cut}
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Python and the packages that decide a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def launch() -> dict[str, Any]:
    """What started this process, and how many like it on how many nodes."""
    env = os.environ
    processes = int(env.get("WORLD_SIZE", "1"))
    launcher, here = "python", processes
    if "TORCHELASTIC_RUN_ID" in env:
        launcher, here = "torchrun", int(env["LOCAL_WORLD_SIZE"])
    elif "CROSS_SIZE" in env and "LOCAL_SIZE" in env:  # its own names; LOCAL_WORLD_SIZE is not its
        launcher, here = "deepspeed", int(env["LOCAL_SIZE"])
    return {"launcher": launcher, "processes": processes, "nodes": processes // here, "processes_per_node": here}


def hardware() -> dict[str, Any]:
    """Host, processors and accelerators of this process's world."""
    import torch

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": cards,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
