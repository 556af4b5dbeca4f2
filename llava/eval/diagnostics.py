"""What ``llava.eval.diagnose`` has written of a tuned model beside its base, as arrays.

diagnostics_adversarial.jsonl   a question a line: KL, gaps, change by depth, attention to the picture by layer
diagnostics_adversarial.npz     maps of the attention to the picture's tokens, float16
diagnostics_adversarial.json    which models, how they were asked, names of depths; written last, removed first

This module and everything it imports stay free of torch.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava.errors import UserError
from llava.eval.pope import SETS
from llava.files import field, read_jsonl, read_object

FORMAT = 1
AGAIN = "run python -m llava.eval.diagnose again"


class Files(NamedTuple):
    """The three files of one set."""

    rows: Path
    maps: Path
    card: Path


def files_of(folder: Path, set_name: str) -> Files:
    return Files(*(folder / f"diagnostics_{set_name}.{suffix}" for suffix in ("jsonl", "npz", "json")))


@dataclass(frozen=True)
class Diagnostics:
    """A tuned model beside its base on the Q questions of one set, in the order of the label file.

    Everything is of one position: the last token of the prompt, which predicts the first token of the answer.
    """

    set_name: str
    ids: np.ndarray  # (Q,) int64: question ids
    kl: np.ndarray  # (Q,) KL(base || tuned) of the next token, nats
    base_gap: np.ndarray  # (Q,) logit of yes less that of no (logsumexp over the first tokens of Yes/yes and No/no)
    tuned_gap: np.ndarray  # (Q,)
    hidden_change: np.ndarray  # (Q, D) ||tuned - base|| / ||base|| of the hidden state at each depth
    depth_names: list[str]  # D: "embedding", "layer 1", ..., "norm", and "post block" where one of the two has a block
    attention_base: np.ndarray  # (Q, L) share of the attention that goes to the picture's tokens, mean over heads
    attention_tuned: np.ndarray  # (Q, L)
    attention_block: np.ndarray | None  # (Q, B) the same of the self attention in the tuned model's post block
    maps_base: np.ndarray | None  # (Q, g, g) float16: attention to each token, mean over heads and layers
    maps_tuned: np.ndarray | None  # (Q, g, g)
    map_block: np.ndarray | None  # (Q, g, g) the same of the block's own attention to the picture, which sums to 1
    grid: int  # g
    meta: dict[str, Any]  # diagnostics_SET.json


def read_diagnostics(folder: Path) -> dict[str, Diagnostics]:
    """Diagnostics in ``folder`` by set (random, popular, adversarial, others); {} where there are none.

    Raises:
        UserError: a file is missing or broken, or two of them do not belong together.
    """
    names = [file.stem.removeprefix("diagnostics_") for file in folder.glob("diagnostics_*.json")]
    names.sort(key=lambda name: (SETS.index(name) if name in SETS else len(SETS), name))
    return {name: _read(folder, name) for name in names}


def _read(folder: Path, name: str) -> Diagnostics:
    rows_file, maps_file, card_file = files = files_of(folder, name)
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, but {card_file.name} is there; {AGAIN}")
    card = read_object(card_file)
    if card.get("format") != FORMAT:
        raise UserError(f"{card_file}: format {card.get('format')!r}, expected {FORMAT}; {AGAIN}")
    depths, layers, grid, block_layers = (
        field(str(card_file), card, key, kind, AGAIN)
        for key, kind in (("depth_names", list), ("layers", int), ("grid", int), ("block_layers", int))
    )
    rows = [(f"{rows_file}: line {line}", row) for line, row in read_jsonl(rows_file)]
    if len(rows) != card.get("questions"):
        raise UserError(f"{rows_file}: {len(rows)} lines, but {card_file.name} says {card.get('questions')}; {AGAIN}")
    ids = np.array([field(where, row, "question_id", int) for where, row in rows], dtype=np.int64)
    maps = _read_maps(maps_file, ids, grid)
    return Diagnostics(
        set_name=name,
        ids=ids,
        kl=_numbers(rows, "kl"),
        base_gap=_numbers(rows, "base_gap"),
        tuned_gap=_numbers(rows, "tuned_gap"),
        hidden_change=_numbers(rows, "hidden_change", len(depths)),
        depth_names=depths,
        attention_base=_numbers(rows, "attention_base", layers),
        attention_tuned=_numbers(rows, "attention_tuned", layers),
        attention_block=_numbers(rows, "attention_block", block_layers) if block_layers else None,
        maps_base=maps.get("maps_base"),
        maps_tuned=maps.get("maps_tuned"),
        map_block=maps.get("map_block"),
        grid=grid,
        meta=card,
    )


def _numbers(rows: list[tuple[str, dict[str, Any]]], key: str, width: int | None = None) -> np.ndarray:
    """(Q,), or with ``width`` (Q, width) float64."""
    values = np.zeros((len(rows), *([] if width is None else [width])))
    for number, (where, row) in enumerate(rows):
        value = field(where, row, key, (int, float) if width is None else list, AGAIN)
        if width is not None and len(value) != width:
            raise UserError(f"{where}: key '{key}' has {len(value)} numbers, expected {width}; {AGAIN}")
        for one in [value] if width is None else value:
            if isinstance(one, bool) or not isinstance(one, (int, float)) or not math.isfinite(one):
                raise UserError(f"{where}: key '{key}' holds {one!r}, expected a number; {AGAIN}")
        values[number] = value
    return values


def _read_maps(file: Path, ids: np.ndarray, grid: int) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            maps = {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: cannot be read as arrays ({' '.join(str(error).split())}); {AGAIN}") from None
    if not np.array_equal(maps.pop("ids", None), ids):
        raise UserError(f"{file}: key 'ids' is not the question ids of the .jsonl beside it; {AGAIN}")
    for key, values in maps.items():
        if values.shape != (len(ids), grid, grid):
            raise UserError(f"{file}: {key} has shape {values.shape}, expected {(len(ids), grid, grid)}; {AGAIN}")
    return maps
