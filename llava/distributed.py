"""Processes that work together: joining them for an evaluation, saying which device each has, and leaving."""

from __future__ import annotations

import atexit
import datetime
import difflib
import os
import platform
import re
import signal
import sys
import time
from typing import Any, NamedTuple

from llava import interruption

VISIBLE = "CUDA_VISIBLE_DEVICES"
WRITTEN = "the same command goes on from what is written"


class LostRank(Exception):
    """Another rank has ended before its time; this one cannot go on without it."""


class World(NamedTuple):
    """This process among its fellows. ``rank`` counts over all nodes, ``local_rank`` (the card) within one."""

    rank: int
    local_rank: int
    size: int
    group: Any = None  # through which the ranks wait for each other; None: torch's own

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, once all of them are here.

        Raises:
            LostRank: one of them has ended.
            Stopped: the same, because a signal ends them all.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            # If a signal has ended the other one, this one's own is on its way.
            time.sleep(2)
            interruption.stop_if_requested(WRITTEN)
            raise LostRank(
                f"another rank has ended; its own message, or its node's log, says why; {WRITTEN} ({_cause(error)})"
            ) from None
        return values

    def rank_0s(self, value: Any) -> Any:
        """Rank 0's value, for what must be the same everywhere."""
        return self.gather(value)[0]


def read_world() -> World:
    """What the launcher says about this process; without one it is alone."""
    return World(*(int(os.environ.get(name, default)) for name, default in _ENVIRONMENT))


def join_world() -> World:
    """Read what torchrun says and, with several processes, join their group (gloo: a few numbers cross it)."""
    world = read_world()
    if world.size == 1:
        return world
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo")
        # A slow card must not be taken for a dead one: a set takes hours on a busy machine. Of a rank that ends,
        # the others hear at once: its connections close.
        return world._replace(group=dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7)))
    except RuntimeError as error:
        raise LostRank(f"the {world.size} ranks did not come together ({_cause(error)})") from None


def refuse_lost_rank(error: Exception) -> None:
    """Raise ``LostRank`` where ``error`` is what a collective says when another rank is gone; else do nothing."""
    if re.search(
        r"[Cc]onnection (was )?(closed|reset|refused)|Broken pipe|remote process exited|communicator was aborted",
        str(error),
    ):
        raise LostRank(
            f"another rank has ended, or cannot be reached ({_cause(error)}); its own message, or its node's log, says "
            "why; the same command goes on from what is written"
        ) from None


def _cause(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]  # what follows is advice for developers


def say_device(world: World, on_cuda: bool | None = None) -> None:
    """One line on stderr: which device this rank has; ``on_cuda``: whether it uses a GPU (default: if there is one).

    The launchers renumber: what a rank calls ``cuda:0`` is the first entry of CUDA_VISIBLE_DEVICES.
    """
    import torch

    if torch.cuda.is_available() if on_cuda is None else on_cuda:
        visible = os.environ.get(VISIBLE)
        entries = [entry.strip() for entry in visible.split(",")] if visible else []
        card = entries[world.local_rank] if world.local_rank < len(entries) else str(world.local_rank)
        named = f"GPU {card}" if card.isdigit() else card  # else a UUID: GPU-... or MIG-...
        of = f" of {VISIBLE}={visible}" if visible else ""
        device = f"cuda:{world.local_rank} = {named}{of} ({torch.cuda.get_device_name(world.local_rank)})"
    else:
        threads = torch.get_num_threads()
        device = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
        if os.environ.get(VISIBLE, "NoDevFiles") not in ("", "-1", "NoDevFiles"):
            device += f", although {VISIBLE}={os.environ[VISIBLE]}"
    line = f"rank {world.rank} (local {world.local_rank} on {platform.node()}): {device}\n"
    sys.stderr.write(line)  # in one piece: print would write the end of the line apart, between those of other ranks
    sys.stderr.flush()


def take_card(world: World) -> str:
    """Make this rank's GPU the current one; its device name, or ``cpu`` where there is no GPU.

    Raises:
        UserError: more ranks on this node than GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if world.local_rank >= torch.cuda.device_count():
        from llava.errors import UserError

        raise UserError(
            f"local rank {world.local_rank} on {platform.node()}: has no GPU of its own, {torch.cuda.device_count()} "
            f"can be seen; start fewer processes on a node, or let {VISIBLE} name more",
            everywhere=False,
        )
    torch.cuda.set_device(world.local_rank)  # libraries that ask for "cuda" mean this rank's card
    return f"cuda:{world.local_rank}"


def check_device_variables() -> None:
    """Warn, from rank 0, of names in the environment that look like CUDA_VISIBLE_DEVICES and that nothing reads."""
    from llava.errors import warn

    for name in sorted(os.environ):
        # 0.9 of all letters: a slip of the fingers, and not HIP_, ROCR_, MUSA_ or NVIDIA_VISIBLE_DEVICES.
        alike = difflib.SequenceMatcher(None, _letters(name), _letters(VISIBLE), autojunk=False).ratio()
        if name != VISIBLE and alike > 0.9:
            warn(f"{name} is set, which nothing reads; {VISIBLE} chooses the GPUs")


def _letters(name: str) -> str:
    return "".join(filter(str.isalpha, name.upper()))


def end_workers() -> None:
    """End what data workers are left: they do not hear SIGTERM, with which the interpreter would end and await them."""
    multiprocessing = sys.modules.get("multiprocessing")
    workers = multiprocessing.active_children() if multiprocessing else []
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a worker's end for an error
    for worker in workers:
        worker.kill()
        worker.join()


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
