"""Questions about pictures -> one stream of trees, a tree for every picture, to be answered together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llava.data.packing import Symbol, _groups, _grow, _Stream


def pack_prompts(rows: Sequence[Sequence[Symbol]], tokens_per_image: int, max_length: int | None) -> dict[str, Any]:
    """Rows of symbols -> a stream as ``llava.data.packing.pack`` makes it, with the rows' last tokens as queries.

    Rows about one picture must stand together; they are cut to ``max_length`` tokens, as the splice of separate rows
    does.
    """
    stream, trees = _Stream(), []
    paths: dict[int, list[int]] = {}
    for members in _groups(rows):
        start = len(stream.ids)
        trunk_end = _grow(stream, rows, members, tokens_per_image, max_length, paths)
        trees.append([start, trunk_end, len(stream.ids), len(members)])
    return {
        "input_ids": torch.tensor(stream.ids),
        "position_ids": torch.tensor(stream.positions),
        "subtree_end": torch.tensor(stream.subtree_end),
        "image_at": torch.tensor(stream.image_at, dtype=torch.long),
        "feature_index": torch.tensor(stream.features, dtype=torch.long),
        "queries": torch.tensor([paths[number][-1] for number in range(len(rows))]),
        "trees": trees,
    }
