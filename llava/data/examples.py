"""One record -> one ``Example``: template, ids, labels, pictures, and the checks that belong to a single row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.data.collate import Example
from llava.data.supervision import fill_template, tokenize_pieces
from llava.errors import BrokenImage, UserError, warn

E = TypeVar("E")


@dataclass
class ExampleBuilder:
    """What turns a record into ids, labels and pixels.

    ``tokens_per_image`` (576 for CLIP-L/14 at 336) and ``max_length`` tell how much of a row survives the cut behind
    the splice; ``vocab_size`` is the number of embedding rows.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Conversation
    load_image: Callable[[str, str], torch.Tensor]  # (path, where) -> a picture
    tokens_per_image: int
    max_length: int | None
    vocab_size: int
    use_im_start_end: bool = False

    def fill(self, where: str, turns: list[dict[str, Any]], n_images: int) -> Conversation:
        """The record's turns in the template; refuses what cannot be used (see ``fill_template``), cheaply."""
        conversation = fill_template(where, turns, self.template, n_images, self.use_im_start_end)
        if not any(piece.supervised and piece.text for piece in conversation.training_pieces()):
            raise UserError(f"{where}: no answer of 'gpt' with any text: nothing to learn; remove the record")
        return conversation

    def tokenize(
        self, where: str, turns: list[dict[str, Any]], n_images: int, cut: Callable[[str], None] | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of a record's turns; ``cut(message)`` is called when none of its labels survives truncation.

        Raises:
            UserError: turns that cannot be used (see ``fill_template``), or ids the model has no embedding for.
        """
        ids, labels = tokenize_pieces(self.fill(where, turns, n_images).training_pieces(), self.tokenizer)
        if all(label == IGNORE_INDEX for label in labels):
            raise UserError(f"{where}: no answer of 'gpt' with any text: nothing to learn; remove the record")
        if max(ids) >= self.vocab_size:
            raise UserError(
                f"{where}: token id {max(ids)} ({self.tokenizer.convert_ids_to_tokens(max(ids))!r}) is outside the "
                f"model's vocabulary of {self.vocab_size}; the tokenizer belongs to another model",
                everywhere=False,
            )
        if not self.surviving_labels(ids, labels):
            need = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
            need += n_images * (self.tokens_per_image - 1)
            (cut or _warn_here)(
                f"{where}: the cut to {self.max_length} tokens leaves nothing to learn (the answer begins at token "
                f"{need}); raise --model_max_length"
            )
        return ids, labels

    def surviving_labels(self, ids: Sequence[int], labels: Sequence[int]) -> int:
        """How many labels are left when the row, images expanded, is cut to ``max_length``."""
        position = kept = 0
        for token, label in zip(ids, labels, strict=True):
            is_image = token == IMAGE_TOKEN_INDEX
            position += self.tokens_per_image if is_image else 1
            if self.max_length and position > self.max_length:
                break
            kept += label != IGNORE_INDEX and not is_image
        return kept

    def illustrate(self, where: str, example: Example) -> Example:
        """An example with its pictures loaded."""
        images = {path: self.load_image(path, where) for path in dict.fromkeys(example.image_paths)}
        return example._replace(images=images)


def _warn_here(message: str) -> None:
    # A record belongs to one rank: the others have nothing to say about it.
    warn(message, everywhere=False)


class SkippingDataset(Dataset[E]):
    """A dataset that can go on without pictures that turn out broken when they are opened.

    With ``skip_missing_images`` a record whose picture cannot be decoded is replaced by the next one that can, and
    named once; without it the error ends the run.
    """

    skip_missing_images: bool = False
    builder: ExampleBuilder
    _hidden: Callable[[int], torch.Tensor | None] | None = None  # of a record, where they are kept
    _shows: bool = True  # pictures are loaded

    def __len__(self) -> int:
        raise TypeError("a subclass says how many records there are")

    def outline(self, index: int) -> E:
        """The example at ``index`` without its pictures."""
        raise TypeError("a subclass makes examples")

    def make(self, index: int) -> E:
        """The example at ``index``; raises UserError when its picture cannot be opened."""
        raise TypeError("a subclass makes examples")

    def place(self, index: int) -> str:
        """File and record that the example at ``index`` is made from."""
        raise TypeError("a subclass knows its files")

    def alone(self) -> SkippingDataset[E]:
        """The same records without what they bring from another data set."""
        return self

    def use_hidden(self, hidden: Callable[[int], torch.Tensor | None], pictures: bool) -> None:
        """From now on give records with ``hidden(index)``, and with their pictures only where ``pictures`` says so."""
        self._hidden, self._shows = hidden, pictures

    def _complete(self, where: str, example: Example) -> tuple[Example, torch.Tensor | None]:
        """An outline with its pictures, and its record's hidden states where they are kept."""
        hidden = None
        if self._hidden is not None:
            hidden = self._hidden(example.number)
            if hidden is None:
                raise BrokenImage(
                    f"{where}: a picture of it could not be opened when the hidden states were computed",
                    everywhere=False,
                )
        return self.builder.illustrate(where, example) if self._shows else example, hidden

    def __getitem__(self, index: int) -> E:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if not self.skip_missing_images:
            return self.make(index)
        for step in range(len(self)):
            number = (index + step) % len(self)
            try:
                return self.make(number)
            except BrokenImage as error:
                named = self.__dict__.setdefault("_named", set())
                if number not in named:
                    named.add(number)
                    _warn_here(f"{error}; the next record takes its place")
        raise UserError("no picture of the data set can be opened", everywhere=False)
