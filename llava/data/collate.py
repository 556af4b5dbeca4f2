"""The batch: the one place where data and model meet.

    input_ids       (B, L)       LongTensor   right-padded; IMAGE_TOKEN_INDEX (-200) stands for one image
    labels          (B, L)       LongTensor   IGNORE_INDEX (-100) where nothing is learned
    attention_mask  (B, L)       BoolTensor   False on padding
    images          (N, 3, H, W) FloatTensor  every distinct picture once
    image_index     (B, K)       LongTensor   row b's k-th image is images[image_index[b, k]]; -1 where it has fewer

Rows without a picture point to none. A batch without any picture carries one blank image that no row points to, so
that every rank runs the vision tower and the connector in every step (ZeRO-3 and DDP would wait for it).

A preference batch has the same keys: rows 0..B-1 hold the chosen answers, rows B..2B-1 the rejected ones, in the same
order and pointing to the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class Example(NamedTuple):
    """One row before batching; ``images`` maps a picture's path to its pixel values (3, H, W), in order of use."""

    input_ids: list[int]
    labels: list[int]
    image_paths: tuple[str, ...]
    images: dict[str, torch.Tensor]


class PreferenceExample(NamedTuple):
    """A chosen and a rejected row for the same prompt and pictures."""

    chosen: Example
    rejected: Example


class Batch(TypedDict):
    """See the module's docstring."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    images: torch.Tensor
    image_index: torch.Tensor


class Collator:
    """Examples (or preference examples) -> ``Batch``.

    ``pad_token_id`` fills ``input_ids``; it is never looked at, since the mask comes from the lengths. Ids are cut to
    ``model_max_length`` first, as upstream's collator does; the model cuts again once the images are spliced in.
    """

    def __init__(
        self, pad_token_id: int | None, model_max_length: int | None, blank_image: Callable[[], torch.Tensor]
    ) -> None:
        self.pad_token_id = pad_token_id or 0
        self.model_max_length = model_max_length
        self.blank_image = blank_image

    def __call__(self, examples: Sequence[Example | PreferenceExample]) -> Batch:
        rows = [e.chosen if isinstance(e, PreferenceExample) else e for e in examples]
        rows += [e.rejected for e in examples if isinstance(e, PreferenceExample)]
        ids = [torch.tensor(row.input_ids[: self.model_max_length]) for row in rows]
        labels = [torch.tensor(row.labels[: self.model_max_length]) for row in rows]
        lengths = torch.tensor([len(i) for i in ids])
        # A cut that loses an <image> loses its picture too.
        paths = [row.image_paths[: int((i == IMAGE_TOKEN_INDEX).sum())] for row, i in zip(rows, ids, strict=True)]
        images, image_index = self._images(rows, paths)
        return Batch(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            attention_mask=torch.arange(int(lengths.max())) < lengths[:, None],
            images=images,
            image_index=image_index,
        )

    def _images(
        self, rows: Sequence[Example], paths_of: Sequence[tuple[str, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots: dict[str, int] = {}
        pixels: list[torch.Tensor] = []
        index = torch.full((len(rows), max([1, *map(len, paths_of)])), -1)
        for row_number, (row, paths) in enumerate(zip(rows, paths_of, strict=True)):
            for position, path in enumerate(paths):
                if path not in slots:
                    slots[path] = len(pixels)
                    pixels.append(row.images[path])
                index[row_number, position] = slots[path]
        return torch.stack(pixels or [self.blank_image()]), index
