"""LLaVA's conversation data: LLaVA-CC3M-Pretrain-595K, blip_laion_cc_sbu_558k, llava_v1_5_mix665k and their like."""

from __future__ import annotations

from typing import Any

from llava.data.collate import Example
from llava.data.examples import ExampleBuilder, SkippingDataset
from llava.data.images import drop_missing, join
from llava.errors import UserError
from llava.files import field, read_records


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
        records = read_records(data_path)
        for where, record in records:
            turns = field(where, record, "conversations", list)
            builder.fill(where, turns, len(self._paths(record, where)))
        self.records = drop_missing(records, self._paths, skip_missing_images)

    def _paths(self, record: dict[str, Any], where: str = "") -> list[str]:
        names = record.get("image") or []
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(name, str) for name in names):
            other = next(name for name in names if not isinstance(name, str))
            raise UserError(f"{where}: key 'image' must be a path or a list of paths, found {other!r}")
        return [join(self.image_folder, name) for name in names]

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> str:
        return self.records[index][0]

    def outline(self, index: int) -> Example:
        where, record = self.records[index]
        paths = self._paths(record)
        ids, labels = self.builder.tokenize(where, record["conversations"], len(paths))
        return Example(ids, labels, tuple(paths), None, index)

    def make(self, index: int) -> Example:
        example, hidden = self._complete(self.records[index][0], self.outline(index))
        return example._replace(hidden=hidden)

    @property
    def picture_paths(self) -> list[str]:
        """Every record's pictures, behind each other."""
        return [path for _, record in self.records for path in self._paths(record)]

    @property
    def modality_lengths(self) -> list[int]:
        """Words per record, negative where it has no picture: what upstream groups batches by."""
        lengths = []
        for _, record in self.records:
            words = sum(len(turn["value"].split()) for turn in record["conversations"])
            lengths.append(max(words, 1) if self._paths(record) else -max(words, 1))
        return lengths
