"""Records of a training as prompts that wait for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collate import Example, PreferenceExample
from llava.data.images import ImageLoader
from llava.data.packing import pack_prompts
from llava.model.llava_arch import Pictures


class Prompt(NamedTuple):
    """Ids up to a row's first answer, and the paths of the pictures in them."""

    ids: list[int]
    paths: tuple[str, ...]


def learner(example: Example | PreferenceExample) -> Example:
    """The row whose answer is the wanted one: of a pair, the chosen one."""
    return example.chosen if isinstance(example, PreferenceExample) else example


def prompt_of(row: Example) -> Prompt:
    """What stands before the row's first answer."""
    first = next((i for i, label in enumerate(row.labels) if label != IGNORE_INDEX), len(row.labels))
    ids = row.input_ids[:first]
    return Prompt(ids, row.image_paths[: ids.count(IMAGE_TOKEN_INDEX)])


def first_answer(row: Example) -> list[int]:
    """Ids of the row's first answer, with what closes it."""
    ids: list[int] = []
    for label in row.labels:
        if label != IGNORE_INDEX:
            ids.append(label)
        elif ids:
            break
    return ids


def pixel_loader(dataset: Any) -> ImageLoader:
    """The data set's pictures as pixels, whatever the training is given in their place."""
    loader = dataset.builder.load_image
    return ImageLoader(loader.image_processor, loader.image_aspect_ratio)


def stream_of(
    bare: Any, loader: ImageLoader, prompts: Sequence[Prompt], device: torch.device
) -> tuple[dict[str, Any], Pictures, list[int]]:
    """The prompts as a stream that waits for answers, those about one picture together, and their pictures.

    Also which prompt each of the stream's questions is, in the order of its answers.
    """
    paths = list(dict.fromkeys(path for prompt in prompts for path in prompt.paths))
    pixels = torch.stack([loader(path, "") for path in paths] or [loader.blank()]).to(device)
    pictures = bare.look(pixels, loader.levels().to(device))
    rows = []
    for ids, own in prompts:
        shown = iter(own)
        rows.append([(i, paths.index(next(shown))) if i == IMAGE_TOKEN_INDEX else i for i in ids])
    order = sorted(range(len(rows)), key=lambda number: _beginning(rows[number]))
    stream = pack_prompts(
        [rows[number] for number in order], pictures.features.shape[1], bare.config.tokenizer_model_max_length
    )
    stream = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in stream.items()}
    return stream, pictures, order


def _beginning(row: list[Any]) -> list[tuple[Any, ...]]:
    """What tells trees apart, as something that can be sorted: the row up to its first picture."""
    first = next((at for at, symbol in enumerate(row) if isinstance(symbol, tuple)), len(row))
    return [symbol if isinstance(symbol, tuple) else (0, symbol) for symbol in row[: first + 1]]
