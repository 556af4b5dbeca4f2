"""Training data from several files, each seen as often as its weight says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llava.data.captions import Captions
from llava.data.collate import Example
from llava.data.examples import ExampleBuilder, SkippingDataset
from llava.errors import UserError
from llava.files import existing, field

SUFFIXES = (".yaml", ".yml")
KEYS = ("json_path", "image_folder", "weight", "sampling_strategy")
STRATEGIES = "all, first:N, end:N or random:N (N a number of records, or a percentage as 10%)"


class Mixture(SkippingDataset[Example]):
    """What a YAML file names: ``datasets``, a list of sources, each a file of records as ``Captions`` reads it.

    Keys of a source: ``json_path``; ``image_folder`` (else the flag's); ``sampling_strategy``, which of its records are
    used: "all", "first:N", "end:N", "random:N", N a number or a percentage, rounded up; ``weight``, how often each of
    these is seen in an epoch: the whole part of the weight, and once more for a drawn share, rounded, as large as the
    rest. What is drawn depends on ``seed`` and the source's place, and is the same in every epoch. Paths are relative
    to the working directory.

    Raises:
        UserError: the file, a source or one of its records cannot be used.
    """

    def __init__(
        self,
        path: str,
        image_folder: str | None,
        builder: ExampleBuilder,
        skip_missing_images: bool = False,
        seed: int = 0,
    ) -> None:
        self.builder = builder
        self.skip_missing_images = skip_missing_images
        self.path = Path(path).expanduser()
        self.sources: list[Captions] = []
        self._table = []
        kinds, rows = [], []
        # Every source's keys are looked at before the first, maybe large, file is read.
        sources = [_checked(f"{self.path}: source {n}", source) for n, source in enumerate(_sources(self.path))]
        for number, source in enumerate(sources):
            where = f"{self.path}: source {number}"
            folder = source.get("image_folder", image_folder)
            captions = Captions(source["json_path"], folder, builder, skip_missing_images)
            draw = np.random.default_rng([seed, number])
            used = _chosen(len(captions), source.get("sampling_strategy", "all"), where, draw)
            seen = _weighted(used, float(source.get("weight", 1)), draw)
            if not len(seen):
                raise UserError(f"{where}: none of its {len(captions)} records is left; raise 'weight', or remove it")
            self.sources.append(captions)
            self._table.append((source["json_path"], len(captions), len(used), source.get("weight", 1), len(seen)))
            kinds.append(np.full(len(seen), number, dtype=np.int32))
            rows.append(seen)
        self._source, self._row = np.concatenate(kinds), np.concatenate(rows)

    def __len__(self) -> int:
        return len(self._row)

    def _at(self, index: int) -> tuple[Captions, int]:
        return self.sources[self._source[index]], int(self._row[index])

    def place(self, index: int) -> str:
        captions, row = self._at(index)
        return captions.place(row)

    def outline(self, index: int) -> Example:
        captions, row = self._at(index)
        return captions.outline(row)._replace(number=index)

    def make(self, index: int) -> Example:
        example, hidden = self._complete(self.place(index), self.outline(index))
        return example._replace(hidden=hidden)

    @property
    def picture_paths(self) -> list[str]:
        """Every seen record's pictures, behind each other."""
        places = map(self._at, range(len(self)))
        return [path for captions, row in places for path in captions.pictures_of(row)]

    @property
    def modality_lengths(self) -> list[int]:
        """Words per record, negative where it has no picture: what upstream groups batches by."""
        lengths = [np.array(captions.modality_lengths) for captions in self.sources]
        return np.concatenate([lengths[n][self._row[self._source == n]] for n in range(len(lengths))]).tolist()

    @property
    def files(self) -> list[Path]:
        """The files that the records come from, and the one that names them."""
        return [self.path, *dict.fromkeys(path for captions in self.sources for path in captions.files)]

    def table(self) -> str:
        """The sources: records, how many of them are used, weight, and how many samples an epoch sees."""
        rows = [("source", "records", "used", "weight", "an epoch")]
        rows += [
            (path, f"{n:,}", f"{used:,}", f"{weight:g}", f"{seen:,}") for path, n, used, weight, seen in self._table
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = []
        for name, *figures in rows:
            cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells]))
        return "\n".join(lines)


def open_records(
    path: str, image_folder: str | None, builder: ExampleBuilder, skip_missing_images: bool = False, seed: int = 0
) -> Captions | Mixture:
    """The data set of ``--data_path``: a mixture where the file is YAML, else the file's own records."""
    if Path(path).suffix.lower() in SUFFIXES:
        return Mixture(path, image_folder, builder, skip_missing_images, seed)
    return Captions(path, image_folder, builder, skip_missing_images)


def sources_of(path: str, image_folder: str | None) -> list[tuple[str, str | None]]:
    """The files of records that ``--data_path`` names, each with the folder of its pictures.

    Raises:
        UserError: a mixture that cannot be used.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        return [(path, image_folder)]
    file = Path(path).expanduser()
    sources = [_checked(f"{file}: source {n}", source) for n, source in enumerate(_sources(file))]
    return [(source["json_path"], source.get("image_folder", image_folder)) for source in sources]


def _checked(where: str, source: Any) -> dict[str, Any]:
    field(where, source, "json_path", str)
    for key in source:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key '{key}'; known keys: {', '.join(KEYS)}")
    existing(source["json_path"], f"{where}: json_path")
    if "image_folder" in source:
        field(where, source, "image_folder", str)
    if "weight" in source:
        weight = field(where, source, "weight", (int, float))
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"{where}: weight {weight}: expected a positive number")
    if "sampling_strategy" in source:
        _strategy(field(where, source, "sampling_strategy", str), where)
    return source


def _sources(path: Path) -> list[Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        at = getattr(error, "problem_mark", None)
        line = f" at line {at.line + 1}" if at else ""
        raise UserError(f"{path}: broken YAML{line}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected the key 'datasets' with a list of sources, found {type(content).__name__}")
    sources = field(str(path), content, "datasets", list)
    for key in content:
        if key != "datasets":
            raise UserError(f"{path}: unknown key '{key}'; the only one known is 'datasets'")
    if not sources:
        raise UserError(f"{path}: 'datasets' is empty; expected at least one source")
    return sources


def _strategy(text: str, where: str) -> tuple[str, float, bool]:
    """What to take, how much of it, and whether that is a share (of 1)."""
    if text == "all":
        return "all", 1.0, True
    kind, _, amount = text.partition(":")
    number = amount.removesuffix("%")
    share = amount.endswith("%")
    known = kind in ("first", "end", "random") and number.replace(".", "", 1 if share else 0).isdecimal()
    if not known or not float(number) > 0 or (share and float(number) > 100):
        raise UserError(f"{where}: sampling_strategy '{text}': expected {STRATEGIES}")
    return kind, float(number) / 100 if share else float(number), share


def _chosen(count: int, strategy: str, where: str, draw: np.random.Generator) -> np.ndarray:
    """Which of ``count`` records are used, in their order in the file."""
    kind, amount, share = _strategy(strategy, where)
    wanted = min(count, math.ceil(round(count * amount, 6)) if share else int(amount))
    if kind == "random":
        return np.sort(draw.permutation(count)[:wanted])
    return np.arange(count - wanted, count) if kind == "end" else np.arange(wanted)


def _weighted(rows: np.ndarray, weight: float, draw: np.random.Generator) -> np.ndarray:
    """``rows`` as often as ``weight`` says: copies of all, and a drawn share of them for what is left of it."""
    whole = int(weight)
    drawn = rows[np.sort(draw.permutation(len(rows))[: round(len(rows) * (weight - whole))])]
    return np.concatenate([np.tile(rows, whole), drawn])
