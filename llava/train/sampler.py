"""Orders of the training data: batches of like kind and length, or of few pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """LLaVA's ``--group_by_modality_length``: indices in which every run of ``megabatch`` samples (one optimizer step
    over all ranks) is of one kind and of similar length.

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
