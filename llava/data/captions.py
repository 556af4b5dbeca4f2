"""LLaVA's conversation data: LLaVA-CC3M-Pretrain-595K, blip_laion_cc_sbu_558k, llava_v1_5_mix665k and their like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llava.conversation import SeparatorStyle
from llava.data.collate import Example
from llava.data.examples import ExampleBuilder, SkippingDataset
from llava.data.images import drop_missing, join
from llava.data.records import CONVERSATION, PAIR, RecordFile, missing_pictures
from llava.errors import UserError
from llava.files import field


class Captions(SkippingDataset[Example]):
    """Records ``{"id", "image"?: path or list of paths, "conversations": [{"from", "value"}, ...]}``.

    Paths are relative to ``image_folder``. A record without ``image`` is text only. Every picture is looked for, and
    every record's turns are checked, before the first is trained on.

    Raises:
        UserError: the file, a record or a picture cannot be used.
    """

    def __init__(
        self,
        data_path: str,
        image_folder: str | None,
        builder: ExampleBuilder,
        skip_missing_images: bool = False,
    ) -> None:
        self.builder = builder
        self.skip_missing_images = skip_missing_images
        self.image_folder = image_folder
        self.file = RecordFile(data_path)
        self._check()
        self._rows = self._with_pictures()  # of the file

    def _check(self) -> None:
        """Every record's turns; those that are obviously good only by what the index says of them."""
        plain = self.builder.template.sep_style is SeparatorStyle.PLAIN
        for row in np.flatnonzero(self.file.shapes < (PAIR if plain else CONVERSATION)).tolist():
            where, record = self.file.where(row), self.file[row]
            turns = field(where, record, "conversations", list)
            self.builder.fill(where, turns, len(self._paths(record, where)))

    def _with_pictures(self) -> np.ndarray:
        """The rows of the file whose pictures are all there."""
        everything = np.arange(len(self.file))
        if not missing_pictures(self.file, self.image_folder):
            return everything
        named = [(self.file.where(row), row) for row in everything.tolist()]
        kept = drop_missing(named, self._row_paths, self.skip_missing_images)
        return np.array([row for _, row in kept], dtype=np.int64)

    def _paths(self, record: dict[str, Any], where: str = "") -> list[str]:
        names = record.get("image") or []
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(name, str) for name in names):
            other = next(name for name in names if not isinstance(name, str))
            raise UserError(f"{where}: key 'image' must be a path or a list of paths, found {other!r}")
        return [join(self.image_folder, name) for name in names]

    def _row_paths(self, row: int) -> list[str]:
        return [join(self.image_folder, name) for name in self.file.names_of(row)]

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        return self.file.where(int(self._rows[index]))

    def outline(self, index: int) -> Example:
        where, record = self.place(index), self.file[int(self._rows[index])]
        paths = self._paths(record, where)
        ids, labels = self.builder.tokenize(where, record["conversations"], len(paths))
        return Example(ids, labels, tuple(paths), None, index)

    def make(self, index: int) -> Example:
        example, hidden = self._complete(self.place(index), self.outline(index))
        return example._replace(hidden=hidden)

    def pictures_of(self, index: int) -> list[str]:
        """Paths of a record's pictures."""
        return self._row_paths(int(self._rows[index]))

    @property
    def picture_paths(self) -> list[str]:
        """Every record's pictures, behind each other."""
        if len(self._rows) == len(self.file):
            return list(self.file.paths(self.image_folder))
        return [path for row in self._rows.tolist() for path in self._row_paths(row)]

    @property
    def modality_lengths(self) -> list[int]:
        """Words per record, negative where it has no picture: what upstream groups batches by."""
        words = np.maximum(self.file.words[self._rows], 1)
        return np.where(self.file.pictures[self._rows] > 0, words, -words).tolist()

    @property
    def files(self) -> list[Path]:
        """The files that the records come from."""
        return [self.file.path]
