"""Processes that work together: joining them for an evaluation under torchrun, and leaving them at the end."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
from typing import NamedTuple


class World(NamedTuple):
    """This process among its fellows. ``rank`` counts over all nodes, ``local_rank`` (the card) within one."""

    rank: int
    local_rank: int
    size: int

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


def join_world() -> World:
    """Read what torchrun says and, with several processes, join their group (gloo: only barriers cross it)."""
    world = World(*(int(os.environ.get(name, default)) for name, default in _ENVIRONMENT))
    if world.size > 1:
        import torch.distributed as dist

        # A slow card must not be taken for a dead one: a set takes hours on a busy machine.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return world


def leave_world() -> None:
    """End a finished process that is in a process group; without a group, do nothing.

    The interpreter's own end is left out: now and then a gloo thread that still wants the interpreter takes the process
    down there with SIGABRT (https://github.com/pytorch/pytorch/pull/179291, not merged), also after
    ``destroy_process_group``, and to its launcher a finished run has failed. What would run at exit runs here; the
    group's connections close with the process, after its last barrier.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


_ENVIRONMENT = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
