"""Batches of like kind and length, as LLaVA's ``--group_by_modality_length`` makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Indices in which every run of ``megabatch`` samples (one optimizer step over all ranks) is of one kind and of
    similar length.

    ``lengths`` are positive for samples with a picture and negative for text only. Within a kind the samples are
    shuffled, cut into megabatches and sorted inside them by length; the megabatches are shuffled; what is left over of
    both kinds forms the last one. Each epoch (``epoch()`` counts from 0) has an order of its own.
    """

    def __init__(self, lengths: list[int], megabatch: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths = lengths
        self.megabatch = megabatch
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch())
        full: list[list[int]] = []
        left: list[int] = []
        for kind in (True, False):
            members = [i for i, length in enumerate(self.lengths) if (length > 0) is kind]
            members = [members[i] for i in torch.randperm(len(members), generator=draw).tolist()]
            cut = len(members) - len(members) % self.megabatch
            full += [self._sorted(members[i : i + self.megabatch]) for i in range(0, cut, self.megabatch)]
            left += members[cut:]
        for i in torch.randperm(len(full), generator=draw).tolist():
            yield from full[i]
        yield from self._sorted(left)

    def _sorted(self, indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda i: abs(self.lengths[i]), reverse=True)
