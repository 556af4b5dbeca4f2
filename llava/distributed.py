"""Processes that work together: joining them for an evaluation under torchrun, and leaving them at the end."""

from __future__ import annotations

import datetime
import gc
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
    """End the process group, if there is one, while the interpreter is whole.

    A gloo thread that still holds a tensor when the interpreter ends takes the process down with SIGABRT
    (https://github.com/pytorch/pytorch/pull/179291, not merged): to its launcher a finished run has failed.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        gc.collect()  # models and trainers refer to the group in cycles
        dist.destroy_process_group()
        gc.collect()


_ENVIRONMENT = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
