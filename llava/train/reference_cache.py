"""The reference's log-probabilities on disk: they never change, so they are computed once.

One file of JSON lines for every reference: first what it was (model, template, dtype, ...), then a line a pair, named
by what decides its numbers (tokens, labels, picture). It grows by whole lines, so a run that is killed while filling it
goes on there; later epochs, duplicates, and other runs of a sweep on the same model read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava.data.collate import Example, PreferenceExample
from llava.data.images import picture_hash
from llava.errors import UserError
from llava.files import atomic_write
from llava.model.checkpoint import content_hash

# What of a model's configuration decides its log-probabilities, besides its weights.
DECIDING = (
    "model_type",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "mm_vision_config",
    "rms_norm_eps",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_projector_type",
    "post_block",
    "image_aspect_ratio",
    "tokenizer_model_max_length",
)


def reference_key(plan: Any, version: str, kind: str = "start") -> dict[str, str]:
    """What a reference is, in words that a message can name; weights by content, wherever they lie.

    ``kind`` is ``--reference_from``: the model as the run loads it, without an adapter that trains on (start), or the
    root of its deltas (base).
    """
    from_base = kind == "base"
    chain = plan.chain.root() if from_base else plan.chain
    settings = plan.base_config() if from_base else plan.start_config()
    config = {name: settings.get(name) for name in DECIDING}
    if plan.new_block:
        config["post_block"] = None  # it changes nothing yet
    pictures = plan.image_processor.to_dict()
    return {
        "from": kind,
        "model": content_hash(chain.files()),
        "config": _digest(config),
        "image_processor": _digest({k: v for k, v in pictures.items() if not k.startswith("_")}),
        "template": version,
        "dtype": f"{plan.compute_dtype}, weights {plan.quantization.label if plan.quantization else plan.dtype}",
        "seed": str(plan.seed) if plan.blank and not plan.connector and not from_base else "-",  # of a new connector
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def chosen_cache(train_args: Any, plan: Any, version: str) -> ReferenceCache | None:
    """What ``--reference cache`` keeps, by default beside ``--output_dir``."""
    if train_args.reference != "cache":
        return None
    folder = Path(train_args.output_dir).absolute().parent / "reference_cache"
    key = reference_key(plan, version, train_args.reference_from)
    return ReferenceCache(train_args.reference_cache, folder, key)


class ReferenceCache:
    """Pairs' reference log-probabilities by key: ``(chosen, rejected)``.

    ``path`` None puts the file under its key's name into ``default_folder``.

    Raises:
        UserError: the file belongs to another reference; what differs is named.
    """

    def __init__(self, path: str | None, default_folder: Path, key: dict[str, str]) -> None:
        self.key = key
        self.path = Path(path).expanduser() if path else default_folder / f"{_digest(key)}.jsonl"
        self.values: dict[str, tuple[float, float]] = {}
        if not self.path.exists():
            return
        if self.path.is_dir():
            raise UserError(f"--reference_cache {path}: a folder; expected a file (it is made where there is none)")
        rows = list(_lines(self.path))
        found = rows[0] if rows else None
        if not isinstance(found, dict) or found.keys() != key.keys():
            raise UserError(f"{self.path}: not a file of reference log-probabilities; pass another --reference_cache")
        differing = [f"{name} {found[name]} -> {key[name]}" for name in key if found[name] != key[name]]
        if differing:
            raise UserError(
                f"{self.path}: made with another reference ({'; '.join(differing)}); pass another --reference_cache"
            )
        self.values = {row["pair"]: (row["chosen"], row["rejected"]) for row in rows[1:] if "pair" in row}

    def open(self) -> None:
        """Make the file ready to grow (one process calls it): half a line of a killed run is taken off."""
        if self.path.exists() and self.path.read_bytes().endswith(b"\n"):
            return  # another run may be growing it
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps(self.key) + "\n")
                file.writelines(self._line(pair, *values) for pair, values in self.values.items())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); pass --reference_cache") from None

    def add(self, rows: Iterable[tuple[str, float, float]], write: bool) -> None:
        """Take over new values; with ``write`` they are in the file when this returns."""
        rows = list(rows)
        self.values.update({pair: (chosen, rejected) for pair, chosen, rejected in rows})
        if write:
            try:
                with self.path.open("ab", buffering=0) as file:  # at once: another run may be adding lines too
                    file.write("".join(self._line(*row) for row in rows).encode())
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror}); pass --reference_cache") from None

    @staticmethod
    def _line(pair: str, chosen: float, rejected: float) -> str:
        return json.dumps({"pair": pair, "chosen": chosen, "rejected": rejected}) + "\n"


def _lines(path: Path) -> Iterator[Any]:
    """Lines that can be read; what a killed run left of one is passed over."""
    for line in path.read_bytes().decode(errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def record_keys(outlines: Iterable[Example | PreferenceExample], pictures: dict[str, str] | None = None) -> list[str]:
    """Names of records, from the ids and labels of their rows (a pair has two) and the content of their pictures.

    ``pictures`` are SHA-256 of files that are known already; another picture is read, once.
    """
    pictures = {} if pictures is None else pictures
    keys = []
    for outline in outlines:
        rows = (outline.chosen, outline.rejected) if isinstance(outline, PreferenceExample) else (outline,)
        content: list[Any] = [(row.input_ids, row.labels) for row in rows]
        for path in rows[0].image_paths:
            if path not in pictures:
                pictures[path] = picture_hash(path)
            content.append(pictures[path])
        keys.append(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32])
    return keys
