"""The same script under plain python, torchrun and deepspeed, with and without a GPU, and no environment to set."""

from __future__ import annotations

import datetime
import os
import socket
import sys

import torch

from llava.command_line import quiet, refuse_copies
from llava.distributed import check_device_variables


def prepare_processes(argv: list[str] | None = None) -> None:
    """Process groups as DeepSpeed and accelerate need them; call it first, before the arguments are parsed.

    Without a GPU three things do not work by themselves: DeepSpeed in a single process (it looks for MPI), ZeRO-3's
    loading (``deepspeed.comm`` is not initialised by accelerate) and the start-up itself where there is no compiler
    (its shared-memory operator is built on first use, some 70 s).
    """
    argv = sys.argv[1:] if argv is None else argv
    refuse_copies()
    check_device_variables()
    quiet()
    if not any(arg == "--deepspeed" or arg.startswith("--deepspeed=") for arg in argv):
        return
    on_cpu = not torch.cuda.is_available() or _flag(argv, "--use_cpu", "False").lower() in ("true", "1", "yes")
    # The group is made before the arguments are parsed; its timeout is theirs all the same (default: half an hour).
    timeout = _flag(argv, "--ddp_timeout", "1800")
    timeout = datetime.timedelta(seconds=int(timeout) if timeout.isdigit() else 1800)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # accelerate reads it as "no DeepSpeed, please": the run would go on without ZeRO and say nothing.
    if os.environ.pop("ACCELERATE_USE_CPU", None):
        print("note: ACCELERATE_USE_CPU would switch DeepSpeed off; it is ignored", file=sys.stderr)
    single = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    if "RANK" not in os.environ:
        os.environ.update({name: os.environ.get(name, value) for name, value in single.items()})
    import deepspeed

    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False, timeout=timeout)
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed(verbose=False, timeout=timeout)


def _flag(argv: list[str], name: str, default: str) -> str:
    """Value of ``--name VALUE`` or ``--name=VALUE``; a bare flag is true."""
    for index, arg in enumerate(argv):
        if arg.startswith(f"{name}="):
            return arg.split("=", 1)[1]
        if arg == name:
            bare = index + 1 == len(argv) or argv[index + 1].startswith("--")
            return "True" if bare else argv[index + 1]
    return default


def free_port() -> int:
    """A TCP port nobody listens on at the moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
