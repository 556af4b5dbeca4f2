"""The batch: the one place where data and model meet.

    input_ids       (B, L)       LongTensor   right-padded; IMAGE_TOKEN_INDEX (-200) stands for one image
    labels          (B, L)       LongTensor   IGNORE_INDEX (-100) where nothing is learned
    attention_mask  (B, L)       BoolTensor   False on padding
    images          (N, 3, H, W) ByteTensor   every distinct picture once, as bytes
    pixel_levels    (3, 256)     FloatTensor  pixel value of each byte, by channel
    image_index     (B, K)       LongTensor   row b's k-th image is images[image_index[b, k]]; -1 where it has fewer
    records         (B,)         LongTensor   which records of the data set these are, where they say so

``images`` may be float pixel values themselves, without ``pixel_levels``; pictures whose features are kept on disk come
as ``vision_features`` (N, T, D) instead, or behind the connector as ``image_features`` (N, T, D).

Rows without a picture point to none. A batch without any picture carries one blank image that no row points to, so
that every rank runs the vision tower and the connector in every step (ZeRO-3 and DDP would wait for it).

A preference batch has the same keys: rows 0..B-1 hold the chosen answers, rows B..2B-1 the rejected ones, in the same
order and pointing to the same pictures. Where the reference's log-probabilities are known it also has

    reference_logps (2B,)        FloatTensor  in the order of the rows

and where every pair brings a row whose language-model loss is added, these rows 2B..2B+A-1 behind the others and

    aux_rows        int          A

``PackingCollator`` puts ``rows`` (``llava.data.packing.PackedRows``) in place of the first three and ``image_index``,
and beside rows that a reference which is still to be asked has nothing to say about, ``reference_rows``: the pairs'
alone. Examples whose hidden states are kept on disk bring these instead of pictures, in the order of the trees, as what
``forward`` calls ``hidden_at_labels`` or ``backbone_hidden``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.packing import PackedRows, pack_batch


class Example(NamedTuple):
    """One row before batching; ``images`` maps a picture's path to its pixel values (3, H, W), in order of use.

    None: no picture is loaded. ``hidden`` holds the hidden states of its tree where they are known.
    """

    input_ids: list[int]
    labels: list[int]
    image_paths: tuple[str, ...]
    images: dict[str, torch.Tensor] | None
    number: int = -1  # of the record in its data set
    hidden: torch.Tensor | None = None


class PreferenceExample(NamedTuple):
    """A chosen and a rejected row for the same prompt and pictures, and what the reference says of them, if known.

    ``aux`` is a row beside the pair that a language model learns from; ``hidden`` is of the pair's tree.
    """

    chosen: Example
    rejected: Example
    number: int = -1
    reference_logps: tuple[float, float] | None = None
    aux: Example | None = None
    hidden: torch.Tensor | None = None


class Batch(TypedDict, total=False):
    """See the module's docstring."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    images: torch.Tensor
    pixel_levels: torch.Tensor
    vision_features: torch.Tensor
    image_features: torch.Tensor
    image_index: torch.Tensor
    reference_logps: torch.Tensor
    records: torch.Tensor
    aux_rows: int


class Collator:
    """Examples (or preference examples) -> ``Batch``.

    ``pad_token_id`` fills ``input_ids``; it is never looked at, since the mask comes from the lengths. Ids are cut to
    ``model_max_length`` first, as upstream's collator does; the model cuts again once the images are spliced in.
    ``pixel_levels`` belong to pictures that are bytes; features come as ``features_as``.
    """

    features_as = "vision_features"

    def __init__(
        self,
        pad_token_id: int | None,
        model_max_length: int | None,
        blank_image: Callable[[], torch.Tensor],
        pixel_levels: torch.Tensor | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id or 0
        self.model_max_length = model_max_length
        self.blank_image = blank_image
        self.pixel_levels = pixel_levels

    def __call__(self, examples: Sequence[Example | PreferenceExample]) -> Batch:
        pairs = [e for e in examples if isinstance(e, PreferenceExample)]
        aux = [pair.aux for pair in pairs if pair.aux is not None]
        rows = [e.chosen if isinstance(e, PreferenceExample) else e for e in examples]
        rows += [*(pair.rejected for pair in pairs), *aux]
        ids = [torch.tensor(row.input_ids[: self.model_max_length]) for row in rows]
        labels = [torch.tensor(row.labels[: self.model_max_length]) for row in rows]
        lengths = torch.tensor([len(i) for i in ids])
        # A cut that loses an <image> loses its picture too.
        paths = [row.image_paths[: int((i == IMAGE_TOKEN_INDEX).sum())] for row, i in zip(rows, ids, strict=True)]
        images, image_index = self._images(rows, paths)
        batch = Batch(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            attention_mask=torch.arange(int(lengths.max())) < lengths[:, None],
            image_index=image_index,
        )
        if images is not None:
            batch["images" if images.ndim == 4 else self.features_as] = images
            if self.pixel_levels is not None and images.dtype == torch.uint8:
                batch["pixel_levels"] = self.pixel_levels
        if aux:
            batch["aux_rows"] = len(aux)
        if all(example.number >= 0 for example in examples):
            batch["records"] = torch.tensor([example.number for example in examples])
        known = [pair.reference_logps for pair in pairs if pair.reference_logps is not None]
        if known and len(known) == len(pairs):
            batch["reference_logps"] = torch.tensor([sides[side] for side in (0, 1) for sides in known])
        return batch

    def _images(
        self, rows: Sequence[Example], paths_of: Sequence[tuple[str, ...]]
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        slots: dict[str, int] = {}
        pixels: list[torch.Tensor] = []
        index = torch.full((len(rows), max([1, *map(len, paths_of)])), -1)
        for row_number, (row, paths) in enumerate(zip(rows, paths_of, strict=True)):
            for position, path in enumerate(paths):
                if path not in slots:
                    slots[path] = len(slots)
                    if row.images is not None:
                        pixels.append(row.images[path])
                index[row_number, position] = slots[path]
        if all(row.images is None for row in rows):
            return None, index
        return torch.stack(pixels or [self.blank_image()]), index


class PackingCollator(Collator):
    """``Collator`` whose rows share their beginnings (``llava.data.packing``); ``tokens_per_image`` is the model's.

    With ``apart`` only the rows of one example share (a pair's two are one tree, and so is the row it brings), so that
    an example's hidden states are the same in every batch. ``hidden_as`` names the argument they are passed as.
    """

    hidden_as = "hidden_at_labels"

    def __init__(self, *args: Any, tokens_per_image: int, apart: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens_per_image = tokens_per_image
        self.apart = apart

    def __call__(self, examples: Sequence[Example | PreferenceExample]) -> dict[str, Any]:
        batch = super().__call__(examples)
        count, aux = len(batch["input_ids"]), batch.get("aux_rows", 0)
        owners = None
        if self.apart:
            owners = [row % len(examples) for row in range(count - aux)]
            owners += range(len(examples), len(examples) + aux)
        rows = pack_batch(batch, self.tokens_per_image, self.model_max_length, owners)
        packed = ("input_ids", "labels", "attention_mask", "image_index")
        done = {"rows": rows, **{key: value for key, value in batch.items() if key not in packed}}
        known = [*examples, *(e.aux for e in examples if isinstance(e, PreferenceExample) and e.aux is not None)]
        if known[0].hidden is not None:
            done[self.hidden_as] = self._hidden([example.hidden for example in known], rows)
        elif aux and "reference_logps" not in batch:
            pairs = {key: batch[key][: count - aux] for key in packed}
            done["reference_rows"] = pack_batch(pairs, self.tokens_per_image, self.model_max_length, owners)
        return done

    @staticmethod
    def _hidden(kept: list[torch.Tensor], rows: PackedRows) -> torch.Tensor:
        """(Q, D) or (T, D); a batch without labels has one query, and nothing is kept of it."""
        hidden = torch.cat(kept)
        return hidden if len(hidden) else hidden.new_zeros(len(rows["queries"]), hidden.shape[1])
