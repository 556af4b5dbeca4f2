"""Orders of the training data: batches of like kind and length, of few pictures, or those of upstream's runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from llava.errors import UserError


class ModalityLengthSampler(Sampler[int]):
    """LLaVA's ``--group_by_modality_length``: indices in which every run of ``megabatch`` samples (one optimizer step
    over all ranks) is of one kind and of similar length.

    ``lengths`` are positive for samples with a picture and negative for text only. Within a kind the samples are
    shuffled, cut into megabatches and sorted inside them by length; the megabatches are shuffled; what is left over of
    both kinds forms the last one. Each epoch (``epoch()`` counts from 0) has an order of its own.
    """

    def __init__(self, lengths: Sequence[int], megabatch: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths = lengths
        self.megabatch = megabatch
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch())
        lengths = np.asarray(self.lengths)
        sizes, pictured = np.abs(lengths), lengths > 0
        full, left = [], []
        for kind in (pictured, ~pictured):
            members = np.flatnonzero(kind)
            members = members[torch.randperm(len(members), generator=draw).numpy()]
            cut = len(members) - len(members) % self.megabatch
            full.append(members[:cut].reshape(-1, self.megabatch))
            left.append(members[cut:])
        rows = np.concatenate(full)
        rows = np.take_along_axis(rows, np.argsort(-sizes[rows], axis=1, kind="stable"), axis=1)
        yield from rows[torch.randperm(len(rows), generator=draw).numpy()].ravel().tolist()
        last = np.concatenate(left)
        yield from last[np.argsort(-sizes[last], kind="stable")].tolist()


class ImageSampler(Sampler[int]):
    """``--group_by_image``: indices in which every run of ``batch_size`` has as few pictures as possible.

    A picture's samples are cut into pieces of at most a batch, and the pieces are put into batches: the largest that
    still fits first, and where none fits, the front of one. Pictures, and the batches, are shuffled, in each epoch
    (``epoch()`` counts from 0) anew. Every index comes once.
    """

    def __init__(self, pictures: Sequence[Hashable], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.pictures = pictures
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(len(self.pictures), generator=draw).tolist()
        of_picture: dict[Hashable, list[int]] = defaultdict(list)
        for index in order:
            of_picture[self.pictures[index]].append(index)
        size = self.batch_size
        by_size: dict[int, list[list[int]]] = defaultdict(list)  # pieces, by their number of samples
        for members in of_picture.values():
            for start in range(0, len(members), size):
                piece = members[start : start + size]
                by_size[len(piece)].append(piece)
        batches: list[list[int]] = []
        while any(by_size.values()):
            batch: list[int] = []
            while len(batch) < size and any(by_size.values()):
                room = size - len(batch)
                length = max((n for n, pieces in by_size.items() if pieces and n <= room), default=None)
                if length is not None:
                    batch += by_size[length].pop()
                    continue
                length = min(n for n, pieces in by_size.items() if pieces)
                piece = by_size[length].pop()
                batch += piece[:room]
                by_size[len(piece) - room].append(piece[room:])
            batches.append(batch)
        *full, last = batches  # only the last one may be short
        for index in torch.randperm(len(full), generator=draw).tolist():
            yield from full[index]
        yield from last


class UpstreamSampler(Sampler[int]):
    """The order in which LLaVA's and HA-DPO's runs see their data: torch's ``RandomSampler`` under transformers 4.31 to
    4.37 and accelerate 0.21 and 0.22 (as their sources say), which deal out batches to the processes as today's do.

    One process: of the numbers that torch's generator gives after ``seed``, every epoch uses two; the first is the data
    loader's, the second seeds a permutation. Several processes: accelerate makes a generator with torch's own default
    seed, whatever ``seed`` is; every epoch draws two permutations from it and uses the first.

    ``seen`` indices are given out of ``length`` (``samples_of_whole_steps``).
    """

    def __init__(self, length: int, seen: int, processes: int, seed: int, epoch: Callable[[], int]) -> None:
        self.length = length
        self.seen = seen
        self.processes = processes
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.seen

    def __iter__(self) -> Iterator[int]:
        if self.processes == 1:
            draw = torch.Generator().manual_seed(self.seed)
            numbers = [torch.empty((), dtype=torch.int64).random_(generator=draw) for _ in range(2 * self.epoch() + 2)]
            draw = torch.Generator().manual_seed(int(numbers[-1]))
        else:
            draw = torch.Generator()
            for _ in range(2 * self.epoch()):
                torch.randperm(self.length, generator=draw)
        yield from torch.randperm(self.length, generator=draw).tolist()[: self.seen]


def samples_of_whole_steps(length: int, args: Any) -> int:
    """How many of ``length`` samples upstream's Trainer sees in an epoch: its steps are whole ones.

    Raises:
        UserError: batches are left over at the end of an epoch that is not the last; what upstream does with them
            depends on its engine, and is not reproduced.
    """
    batches = math.ceil(math.ceil(length / args.train_batch_size) / args.world_size)  # of every process
    steps, left = divmod(batches, args.gradient_accumulation_steps)
    wanted = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
    if left and (not steps or wanted > steps):
        flag = "--hadpo_compat" if getattr(args, "hadpo_compat", False) else "--upstream_order"
        accumulation = f"--gradient_accumulation_steps {args.gradient_accumulation_steps}"
        if not steps:
            raise UserError(f"{flag}: {batches} batches an epoch are fewer than {accumulation}; lower that")
        raise UserError(
            f"{flag}: {batches} batches an epoch are no multiple of {accumulation}, and what upstream does with those "
            "left over is not reproduced; choose --per_device_train_batch_size and --gradient_accumulation_steps so "
            "that none are, or train one epoch"
        )
    return min(length, steps * args.gradient_accumulation_steps * args.world_size * args.train_batch_size)
