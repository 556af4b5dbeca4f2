"""Ranks of an evaluation under torchrun, and one process without it."""

from __future__ import annotations

import datetime
import os
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


_ENVIRONMENT = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
