"""``--cache_hidden DIR``: what a frozen backbone gives to the part that trains, computed once and kept on disk.

    DIR/<key>/key.json                 what decides the numbers, in words
    DIR/<key>/<kind>/<run>.bin         hidden states behind each other, rows of bytes as they are in memory
    DIR/<key>/<kind>/<run>.jsonl       {"key", "offset", "rows"} of every record in it, written when these are on disk
    DIR/<key>/tower, /connector        features of pictures, where the part that trains looks at them

Kinds: "after", what goes into lm_head at the positions that predict; "queries", what goes into the post block there;
"rows", what goes into it at all positions, where it looks at them. Each process of each run has files of its own, so
several may fill a folder at once; a record is named by its tokens, labels and pictures. Later epochs, and other runs of
a sweep, read them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from llava.data.images import picture_hash
from llava.errors import UserError
from llava.files import read_object, whole_lines, write_json
from llava.interruption import Stopped
from llava.model.builder import model_settings
from llava.model.checkpoint import content_hash
from llava.train.caches import (
    Filled,
    datasets_of,
    distinct_pictures,
    each_batch,
    feature_files,
    fill_features,
    rank_0s,
)
from llava.train.reference_cache import record_keys, reference_key

AT_A_TIME = 64 << 20  # bytes that wait to be written to the disk together; a killed run loses no more
SAMPLED = 512  # records whose length is measured to foretell the size of all
HOW_TO_GO_ON = "pass another --cache_hidden, or leave it out"


class Kind(NamedTuple):
    """Which hidden states are kept, and which features of pictures beside them."""

    name: str  # "after" | "queries" | "rows"
    looks_at: str | None  # "tower" | "connector"

    @property
    def argument(self) -> str:
        """What ``forward`` calls them."""
        return "hidden_at_labels" if self.name == "after" else "backbone_hidden"

    def of_records(self, hidden: torch.Tensor, rows: dict[str, Any]) -> Sequence[torch.Tensor]:
        """Hidden states of a batch whose every record is a tree -> each record's."""
        if self.name == "rows":
            return hidden.split([end - start for start, _, end, _ in rows["trees"]])
        if not len(rows["targets"]):  # the one query of a batch without labels is nobody's
            return [hidden[:0]] * len(rows["trees"])
        return hidden.split([queries for *_, queries in rows["trees"]])

    def length(self, rows: dict[str, Any]) -> int:
        """How many hidden states are kept of a batch."""
        return len(rows["input_ids"] if self.name == "rows" else rows["queries"])

    def width(self, config: Any) -> int:
        """Of the pictures' features."""
        return config.mm_hidden_size if self.looks_at == "tower" else config.hidden_size


def kind_for(model: Any, parts: set[str]) -> Kind:
    """What the ``parts`` that train get from the rest of ``model`` (without a wrapper)."""
    if "post_block" not in parts:
        return Kind("after", None)
    return Kind("rows" if model.post_block.needs_rows else "queries", model.post_block.looks_at)


class HiddenCache:
    """The folder of a model's hidden states, whatever their kind; ``key`` is what decides them.

    Raises:
        UserError: the folder holds those of another key; what differs is named.
    """

    def __init__(self, root: str, key: dict[str, str], width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self.key = {**key, "hidden": f"{width} x {dtype}"}
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(root).expanduser() / digest
        file = self.folder / "key.json"
        if not file.exists():
            return
        found = read_object(file)
        differing = [
            f"{name} {found.get(name)} -> {self.key.get(name)}"
            for name in sorted(found.keys() | self.key.keys())
            if found.get(name) != self.key.get(name)
        ]
        if differing:
            raise UserError(f"{file}: hidden states of another model ({'; '.join(differing)}); {HOW_TO_GO_ON}")

    def open(self, kind: Kind) -> None:
        """Make the folder of a kind where there is none."""
        try:
            (self.folder / kind.name).mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "key.json", self.key)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); {HOW_TO_GO_ON}") from None


def hidden_cache(train_args: Any, plan: Any, parts: set[str], version: str) -> HiddenCache | None:
    """``--cache_hidden`` of a run on the model of ``plan``; None where it is not asked for.

    Raises:
        UserError: a part trains that changes what is kept.
    """
    if train_args.cache_hidden is None:
        return None
    moving = ", ".join(sorted(parts - {"post_block", "lm_head"}))
    if moving:
        raise UserError(
            f"--cache_hidden keeps what a frozen backbone gives to lm_head or a post block, but {moving} would train; "
            "leave it out, or choose with --tune"
        )
    later = {"post_block", "lm_head"} if "post_block" in parts else {"lm_head"}
    if getattr(train_args, "reference_from", None) == "base" and (below := plan.chain.changed - later):
        raise UserError(
            f"--reference_from base: deltas changed {', '.join(sorted(below))}, so the base's hidden states are not "
            "those that --cache_hidden keeps; leave one of them out"
        )
    # What comes behind may be any, and a saved config spells out what its base's leaves to the defaults.
    settings = model_settings({**plan.config, **dict.fromkeys(later & {"post_block"})}).to_dict()
    key = reference_key(dataclasses.replace(plan, config=settings), version)
    del key["from"]
    key["model"] = content_hash(plan.chain.files(without=later))
    return HiddenCache(train_args.cache_hidden, key, plan.config["hidden_size"], plan.compute_dtype)


class Place(NamedTuple):
    """Where a record's hidden states are."""

    file: str
    offset: int  # bytes
    rows: int


def places_in(folder: Path, row_bytes: int) -> dict[str, Place]:
    """Every record that a folder holds whole; what a killed run left of one is passed over."""
    found: dict[str, Place] = {}
    for index in sorted(folder.glob("*.jsonl")):
        data = index.with_suffix(".bin")
        size = data.stat().st_size if data.exists() else 0
        for line in whole_lines(index):
            place = Place(data.name, line["offset"], line["rows"])
            if place.offset + place.rows * row_bytes <= size:
                found[line["key"]] = place
    return found


class Writer:
    """Appends records to files of its own; ``with`` ends it when the last is on disk."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / f"{uuid.uuid4().hex[:16]}.bin"
        self.written: dict[str, Place] = {}
        self._waiting: list[tuple[str, torch.Tensor]] = []
        self._bytes = self._end = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None or issubclass(kind, Stopped):
            self._flush()

    def add(self, key: str, hidden: torch.Tensor) -> None:
        """A record's hidden states (rows, D)."""
        self._waiting.append((key, hidden.contiguous()))
        self._bytes += hidden.nbytes
        if self._bytes >= AT_A_TIME:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        lines = []
        try:
            with self.data.open("ab") as file:
                for key, hidden in self._waiting:
                    file.write(hidden.flatten().view(torch.uint8).numpy().tobytes())
                    self.written[key] = Place(self.data.name, self._end, len(hidden))
                    lines.append(json.dumps({"key": key, "offset": self._end, "rows": len(hidden)}) + "\n")
                    self._end += hidden.nbytes
                _to_disk(file)
            with self.data.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
                file.writelines(lines)
                _to_disk(file)
        except OSError as error:
            raise UserError(
                f"--cache_hidden: {self.data}: cannot be written ({error.strerror}); {HOW_TO_GO_ON}", everywhere=False
            ) from None
        self._waiting, self._bytes = [], 0


def _to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


class KeptStates:
    """Hidden states of a data set's records by number, read from the files when they are asked for.

    The table of places lies in memory that data workers share; each maps the files for itself.
    """

    def __init__(self, folder: Path, files: list[str], table: torch.Tensor, width: int, dtype: torch.dtype) -> None:
        self.folder, self.files, self.width, self.dtype = folder, files, width, dtype
        self.table = table.share_memory_()  # (records, 3): number of the file or -1, offset, rows
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __call__(self, index: int) -> torch.Tensor | None:
        """(rows, D), or None of a record that could not be computed."""
        file, offset, rows = self.table[index].tolist()
        if file < 0:
            return None
        if not rows:
            return torch.empty(0, self.width, dtype=self.dtype)
        end = offset + rows * self.width * self.dtype.itemsize
        part = np.array(self._map(file)[offset:end])
        if len(part) != end - offset:
            raise self._unreadable(file, "it has become shorter")
        return torch.from_numpy(part).view(self.dtype).view(rows, self.width)

    def _map(self, file: int) -> np.ndarray:
        if file not in self._maps:
            try:
                self._maps[file] = np.memmap(self.folder / self.files[file], mode="r")
            except (OSError, ValueError) as error:
                raise self._unreadable(file, str(error)) from None
        return self._maps[file]

    def _unreadable(self, file: int, reason: str) -> UserError:
        return UserError(
            f"--cache_hidden: {self.folder / self.files[file]}: cannot be read ({reason}); start the run again",
            everywhere=False,
        )


def fill_hidden(trainer: Any, cache: HiddenCache) -> Filled:
    """Compute what ``cache`` does not hold yet and let the data sets give it instead of pictures."""
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    kind = kind_for(model, trainer.parts)
    datasets = datasets_of(trainer)
    folder = cache.folder / kind.name
    pictures = distinct_pictures(datasets)
    hashes = dict(_shared(pictures, lambda path: (path, picture_hash(path)), "pictures", accelerator))
    keys = [
        _shared(range(len(d)), lambda number, d=d: record_keys([d.outline(number)], hashes)[0], "records", accelerator)
        for d in datasets
    ]
    main = accelerator.is_main_process
    held = places_in(folder, cache.width * cache.dtype.itemsize) if main else {}
    missing = rank_0s(_missing(keys, held) if main else None)
    if any(missing):
        refusal = rank_0s(_room(datasets, trainer.data_collator, cache, kind, missing, hashes, model) if main else None)
        if refusal is not None:
            raise UserError(refusal)
        cache.open(kind)
    elif main:
        print(f"hidden states: {sum(map(len, keys))} records from {folder}", flush=True)
    if kind.looks_at is not None:
        _fill_pictures(trainer, cache, kind, model.config, hashes)
    if any(missing):
        with Writer(folder) as writer:
            for dataset, indices, names in zip(datasets, missing, keys, strict=True):
                for name, hidden in _computed(trainer, dataset, indices, names, kind):
                    writer.add(name, hidden.to(cache.dtype))  # accelerate hands out float32 copies of what is coarser
        held.update(gather_object(list(writer.written.items())))
    tables = rank_0s(_tables(keys, held) if main else None)
    for dataset, (files, table) in zip(datasets, tables, strict=True):
        kept = KeptStates(folder, files, table, cache.width, cache.dtype)
        dataset.use_hidden(kept, pictures=kind.looks_at is not None)
    trainer.data_collator.hidden_as = kind.argument
    computed = sum(map(len, missing))
    return Filled("hidden", computed, len(set().union(*keys)) - computed)


def _shared(items: Sequence[Any], work: Callable[[Any], Any], title: str, accelerator: Any) -> list[Any]:
    """``[work(item) for item in items]``, shared out over the ranks."""
    mine = range(accelerator.process_index, len(items), accelerator.num_processes)
    mine = tqdm(mine, desc=title, disable=not accelerator.is_main_process, mininterval=5, delay=5)
    found = dict(gather_object([(place, work(items[place])) for place in mine]))
    return [found[place] for place in range(len(items))]


def _missing(keys: list[list[str]], held: dict[str, Place]) -> list[list[int]]:
    """Of every data set the records to compute; one that comes several times, once."""
    seen, missing = set(held), []
    for names in keys:
        missing.append([])
        for number, name in enumerate(names):
            if name not in seen:
                seen.add(name)
                missing[-1].append(number)
    return missing


def _tables(keys: list[list[str]], held: dict[str, Place]) -> list[tuple[list[str], torch.Tensor]]:
    """Of every data set the files, and each record's place in them."""
    files = sorted({place.file for place in held.values()})
    numbers = {file: number for number, file in enumerate(files)}
    places = {key: (numbers[place.file], place.offset, place.rows) for key, place in held.items()}
    return [(files, torch.tensor([places.get(name, (-1, 0, 0)) for name in names]).view(-1, 3)) for names in keys]


def _room(
    datasets: list[Any],
    collate: Any,
    cache: HiddenCache,
    kind: Kind,
    missing: list[list[int]],
    hashes: dict[str, str],
    model: Any,
) -> str | None:
    """Say how much the disk is to take; what to say where it cannot, else None."""
    records = [(dataset, number) for dataset, numbers in zip(datasets, missing, strict=True) for number in numbers]
    sample = records[:: -(-len(records) // SAMPLED)]
    rows = sum(kind.length(collate([dataset.outline(number)])["rows"]) for dataset, number in sample)
    needed = rows * len(records) // len(sample) * cache.width * cache.dtype.itemsize
    if kind.looks_at is not None:
        absent = sum(not file.exists() for file in feature_files(cache.folder / kind.looks_at, hashes).values())
        needed += absent * collate.tokens_per_image * kind.width(model.config) * cache.dtype.itemsize
    place = next(folder for folder in (cache.folder, *cache.folder.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    told = f"{len(records)} records need about {_size(needed)} in {cache.folder}, where {_size(free)} are free"
    if needed > free:
        return f"--cache_hidden: {told}; {HOW_TO_GO_ON}"
    print(f"hidden states: {told}", flush=True)
    return None


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _fill_pictures(trainer: Any, cache: HiddenCache, kind: Kind, config: Any, hashes: dict[str, str]) -> None:
    """What the post block sees of pictures: from the folder, for this fill and for the training."""

    def see(model: Any, pictures: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            seen = pictures if pictures.ndim == 3 else model.see(pictures, levels)  # kept by --feature_cache
            return seen if kind.looks_at == "tower" else model.connect(seen)

    blank = torch.zeros(trainer.data_collator.tokens_per_image, kind.width(config), dtype=cache.dtype)
    fill_features(trainer, cache.folder / kind.looks_at, "--cache_hidden", see, blank, hashes)
    trainer.data_collator.features_as = "vision_features" if kind.looks_at == "tower" else "image_features"


def _computed(
    trainer: Any, dataset: Any, indices: list[int], names: list[str], kind: Kind
) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's records among ``indices``, each once, with their hidden states."""
    wanted = {names[number] for number in indices}
    for numbers, inputs in each_batch(trainer, dataset, indices, "hidden states"):
        with torch.no_grad(), trainer.compute_loss_context_manager():
            scores = trainer.model_wrapped(**inputs, score_labels=True, use_cache=False).scores
        hidden = (scores.hidden if kind.name == "after" else scores.backbone).cpu()
        for number, part in zip(numbers, kind.of_records(hidden, inputs["rows"]), strict=True):
            if names[number] in wanted:  # not what took a broken picture's place
                wanted.discard(names[number])
                yield names[number], part
