"""Random conversations of realistic lengths, and transformers' batches of them.

Ids are drawn, so that no tokenizer has a say: both sides get the same tokens. Ours are collated by the project's own
``PackingCollator``. Pictures are drawn pixels, or files where a data set is to open them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.models import BOS, EOS, PAD, Geometry, expand_images, image_processor
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collate import Example, PreferenceExample
from llava.data.examples import ExampleBuilder
from llava.data.images import ImageLoader
from llava.data.preferences import Pair, PreferencePairs

# BOS, system prompt and "USER: " of the v1 template come before the picture.
BEFORE_IMAGE = 37


Drawing = Callable[[], "list[Example] | list[PreferenceExample]"]


class Writer:
    """Draws examples of the given lengths (in tokens, inclusive ranges)."""

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        self.geometry = geometry
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.before = [BOS, *self.words(BEFORE_IMAGE - 1)]
        self.pictures = 0

    def words(self, length: int | tuple[int, int]) -> list[int]:
        length = length if isinstance(length, int) else self.random.randint(*length)
        return [self.random.randrange(EOS + 1, self.geometry.image_token) for _ in range(length)]

    def picture(self) -> dict[str, torch.Tensor]:
        """A new picture's path and pixels, normalised as CLIP's are."""
        self.pictures += 1
        size = self.geometry.image_size
        return {f"{self.pictures}.jpg": torch.randn(3, size, size, generator=self.generator)}

    def example(self, prompt: list[int], answer: list[int], image: dict[str, torch.Tensor]) -> Example:
        return Example(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, tuple(image), image)

    def pair(
        self,
        question: int | tuple[int, int] = 21,
        answer: int | tuple[int, int] = (60, 100),
        image: dict[str, torch.Tensor] | None = None,
    ) -> PreferenceExample:
        """Template, picture, question, and two answers that end with EOS."""
        image = image or self.picture()
        prompt = [*self.before, IMAGE_TOKEN_INDEX, *self.words(question)]
        return PreferenceExample(
            *(self.example(prompt, [*self.words(answer)[:-1], EOS], image) for _ in ("chosen", "rejected"))
        )

    def caption(self, length: tuple[int, int] = (20, 40)) -> Example:
        """Template ``plain``: BOS, picture, caption, EOS."""
        return self.example([BOS, IMAGE_TOKEN_INDEX], [*self.words(length)[:-1], EOS], self.picture())


def descriptions(
    geometry: Geometry, pairs: int, seed: int, question: int = 21, answer: int | tuple[int, int] = (60, 100)
) -> list[PreferenceExample]:
    """HA-DPO's ``desc`` pairs: a 58-token prompt around the picture, answers of 60 to 100 tokens."""
    writer = Writer(geometry, seed)
    return [writer.pair(question, answer) for _ in range(pairs)]


def questions(geometry: Geometry, pairs: int, seed: int, per_image: int = 4) -> list[PreferenceExample]:
    """HA-DPO's ``pope`` pairs: short questions, ``per_image`` about every picture, and short answers."""
    writer = Writer(geometry, seed)
    image: dict[str, torch.Tensor] = {}
    examples = []
    for number in range(pairs):
        image = image if number % per_image else writer.picture()
        examples.append(writer.pair((12, 16), (5, 12), image))
    return examples


def captions(geometry: Geometry, number: int, seed: int) -> list[Example]:
    """Pictures with captions of 20 to 40 tokens."""
    writer = Writer(geometry, seed)
    return [writer.caption() for _ in range(number)]


def draw(path: Path, seed: str) -> None:
    """A smooth coloured picture; the same for the same seed."""
    from PIL import Image

    noise = random.Random(seed).randbytes(16 * 12 * 3)
    Image.frombytes("RGB", (16, 12), noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)


def with_files(pairs: Drawing, geometry: Geometry, folder: Path) -> list[PreferenceExample]:
    """Pairs about pictures that are files of ``folder``, drawn where they are not there; pixels by the processor."""
    from PIL import Image

    processor = image_processor(geometry)
    examples = []
    for pair in pairs():
        images = {}
        for name in pair.chosen.image_paths:
            path = folder / name
            if not path.exists():
                draw(path, name)
            images[str(path)] = processor(images=Image.open(path), return_tensors="pt")["pixel_values"][0]
        sides = (side._replace(image_paths=tuple(images), images=images) for side in (pair.chosen, pair.rejected))
        examples.append(PreferenceExample(*sides))
    return examples


class DrawnPairs(PreferencePairs):
    """The project's data set of pairs about files, with drawn ids in the place of tokenized texts."""

    def __init__(self, examples: list[PreferenceExample], geometry: Geometry) -> None:
        self.drawn = {f"pair {number}": example for number, example in enumerate(examples)}
        builder = ExampleBuilder(
            tokenizer=None,
            template=None,
            load_image=ImageLoader(image_processor(geometry), None),
            tokens_per_image=geometry.tokens_per_image,
            max_length=None,
            vocab_size=geometry.vocab_size,
        )
        super().__init__([Pair(n, e.chosen.image_paths[0], "", "", "") for n, e in self.drawn.items()], builder)

    def _row(self, pair: Pair, side: str) -> tuple[list[int], list[int]]:
        row = getattr(self.drawn[pair.where], side)
        return row.input_ids, row.labels


def hf_batch(examples: list[Example] | list[PreferenceExample], geometry: Geometry) -> dict[str, torch.Tensor]:
    """Rows with every picture's tokens, padded on the right; every row brings its own pixels.

    Preference pairs become the chosen rows, then the rejected ones.
    """
    rows = [e.chosen if isinstance(e, PreferenceExample) else e for e in examples]
    rows += [e.rejected for e in examples if isinstance(e, PreferenceExample)]
    ids = [torch.tensor(expand_images(row.input_ids, geometry)) for row in rows]
    answers = [sum(label != IGNORE_INDEX for label in row.labels) for row in rows]
    labels = [
        torch.where(torch.arange(len(i)) < len(i) - n, IGNORE_INDEX, i) for i, n in zip(ids, answers, strict=True)
    ]
    lengths = torch.tensor([len(i) for i in ids])
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "pixel_values": torch.stack([row.images[path] for row in rows for path in row.image_paths]),
    }
