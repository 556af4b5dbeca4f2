"""Rows that begin alike -> trees: every shared beginning is computed once.

A chosen and a rejected answer share picture and prompt (some 640 of 720 tokens), and usually their own first words;
questions about one picture share it and what stands before it. Rows of a batch that agree up to and including their
first picture become one tree, and all trees of a batch lie behind each other in one stream without padding:

    [ ... picture, prompt | chosen | rejected ][ ... picture | question, chosen | rejected | question, chosen | ... ]
      trunk                 branches             trunk         branches

Rows may also be told apart by owner: then what an owner's rows are computed from does not depend on the batch.

A token sees its ancestors and itself, and its position counts them, so that every row gets exactly what it would get by
itself (prefix sharing; Hydragen, arXiv:2402.05099; for preference pairs https://github.com/frankxwang/dpo-prefix-sharing).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError

Symbol = Hashable  # a token id, or (IMAGE_TOKEN_INDEX, number of the picture in the batch)


class PackedRows(TypedDict):
    """A batch as one stream of T tokens; S rows, M image tokens, n labels, Q positions that predict one.

    A position whose next token differs between rows (the last one of a prompt) predicts several targets: there are U
    pairs of position and target, and a pair that several rows have in common is one.
    """

    label_counts: torch.Tensor  # (S,) labels of every row
    input_ids: torch.Tensor  # (T,) IMAGE_TOKEN_INDEX at every image token
    position_ids: torch.Tensor  # (T,) number of ancestors
    subtree_end: torch.Tensor  # (T,) token i sees token j of its tree where j <= i < subtree_end[j]
    image_at: torch.Tensor  # (M,) positions of the image tokens
    feature_index: torch.Tensor  # (M,) their rows of features.flatten(0, 1)
    queries: torch.Tensor  # (Q,) positions that predict, in order; one where there are none
    label_at: torch.Tensor  # (U,) which of the queries a pair's position is
    targets: torch.Tensor  # (U,) token that is predicted
    label_index: torch.Tensor  # (n,) which pair a label is
    label_row: torch.Tensor  # (n,) which row a label belongs to
    trees: list[list[int]]  # start, end of the trunk (what all its rows share), end, number of queries


@dataclass
class _Stream:
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    subtree_end: list[int] = field(default_factory=list)
    image_at: list[int] = field(default_factory=list)
    features: list[int] = field(default_factory=list)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As in ``PackedRows``."""
        return {
            "input_ids": torch.tensor(self.ids),
            "position_ids": torch.tensor(self.positions),
            "subtree_end": torch.tensor(self.subtree_end),
            "image_at": torch.tensor(self.image_at, dtype=torch.long),
            "feature_index": torch.tensor(self.features, dtype=torch.long),
        }


def pack(
    rows: Sequence[Sequence[Symbol]],
    labels: Sequence[Sequence[int]],
    tokens_per_image: int,
    max_length: int | None = None,
    owners: Sequence[int] | None = None,
) -> PackedRows:
    """Rows of symbols and their labels -> trees.

    A picture stands for ``tokens_per_image`` tokens; rows are cut to ``max_length`` tokens with pictures expanded, as
    the splice of separate rows does. With ``owners``, a number for every row, each owner's rows are one tree, in order
    of the owners' first rows.
    """
    stream, trees, paths = _plant(rows, tokens_per_image, max_length, owners)
    pairs: dict[tuple[int, int], int] = {}
    label_index, label_row = [], []
    for number, (row, path) in enumerate(zip(labels, (paths[i] for i in range(len(rows))), strict=True)):
        for before, target in zip(path, row[1 : len(path)], strict=False):
            if target not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX):
                label_index.append(pairs.setdefault((before, target), len(pairs)))
                label_row.append(number)
    # A batch without labels still runs every layer, with a query that nothing is asked of (DDP and ZeRO-3 wait for it).
    queries = sorted({at for at, _ in pairs}) or [0]
    place = {at: number for number, at in enumerate(queries)}
    for tree in trees:
        tree.append(bisect_left(queries, tree[2]) - bisect_left(queries, tree[0]))
    row_of_label = torch.tensor(label_row, dtype=torch.long)
    return PackedRows(
        label_counts=torch.bincount(row_of_label, minlength=len(rows)),
        **stream.tensors(),
        queries=torch.tensor(queries),
        label_at=torch.tensor([place[at] for at, _ in pairs], dtype=torch.long),
        targets=torch.tensor([target for _, target in pairs], dtype=torch.long),
        label_index=torch.tensor(label_index, dtype=torch.long),
        label_row=row_of_label,
        trees=trees,
    )


def pack_prompts(rows: Sequence[Sequence[Symbol]], tokens_per_image: int, max_length: int | None) -> dict[str, Any]:
    """Prompts that wait for an answer -> a stream whose queries are their last tokens, in the order of ``rows``.

    Rows about one picture must stand together.
    """
    stream, trees, paths = _plant(rows, tokens_per_image, max_length)
    queries = torch.tensor([paths[number][-1] for number in range(len(rows))])
    counts = [sum(start <= query < end for query in queries.tolist()) for start, _, end in trees]
    return {
        **stream.tensors(),
        "queries": queries,
        "trees": [[*tree, count] for tree, count in zip(trees, counts, strict=True)],
    }


def _plant(
    rows: Sequence[Sequence[Symbol]],
    tokens_per_image: int,
    max_length: int | None,
    owners: Sequence[int] | None = None,
) -> tuple[_Stream, list[list[int]], dict[int, list[int]]]:
    """All trees: the stream, of each tree its start, its trunk's end and its end, and of each row its path.

    A path holds the stream position of every symbol of the row (of a picture, its last token).
    """
    stream, trees = _Stream(), []
    paths: dict[int, list[int]] = {}
    for members in _groups(rows, owners):
        start = len(stream.ids)
        trunk_end = _grow(stream, rows, members, tokens_per_image, max_length, paths)
        trees.append([start, trunk_end, len(stream.ids)])
    return stream, trees, paths


def _groups(rows: Sequence[Sequence[Symbol]], owners: Sequence[int] | None) -> list[list[int]]:
    """Rows that share a tree: those with the same beginning up to their first picture; text alone shares none.

    A template's few words before different pictures would not be worth the attention between them. Where rows have
    ``owners``, those of one owner share.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        first = next((i for i, symbol in enumerate(row) if isinstance(symbol, tuple)), None)
        key = number if first is None else tuple(row[: first + 1])
        groups.setdefault(key if owners is None else owners[number], []).append(number)
    return list(groups.values())


def _grow(
    stream: _Stream,
    rows: Sequence[Sequence[Symbol]],
    members: list[int],
    tokens_per_image: int,
    max_length: int | None,
    paths: dict[int, list[int]],
) -> int:
    """Write one tree, branch by branch, depth first; returns where its trunk ends."""
    trunk_end = None
    # A branch to write: its rows, symbols read, tokens above, their positions. A range: tokens whose subtree ends here.
    pending: list[tuple[list[int], int, int, list[int]] | range] = [(members, 0, 0, [])]
    while pending:
        node = pending.pop()
        if isinstance(node, range):  # every branch below these tokens is written
            stream.subtree_end[node.start : node.stop] = [len(stream.ids)] * len(node)
            continue
        together, read, depth, path = node
        path, begin = list(path), len(stream.ids)
        while (symbol := _common(rows, together, read)) is not None:
            is_image = isinstance(symbol, tuple)
            count = tokens_per_image if is_image else 1
            if max_length is not None:
                count = min(count, max_length - depth)
            if count <= 0:
                break
            if is_image:
                first = symbol[1] * tokens_per_image
                stream.image_at += range(len(stream.ids), len(stream.ids) + count)
                stream.features += range(first, first + count)
            stream.ids += [IMAGE_TOKEN_INDEX if is_image else symbol] * count
            stream.positions += range(depth, depth + count)
            depth, read = depth + count, read + 1
            path.append(len(stream.ids) - 1)
        stream.subtree_end += [0] * (len(stream.ids) - begin)
        pending.append(range(begin, len(stream.ids)))
        trunk_end = len(stream.ids) if trunk_end is None else trunk_end
        branches: dict[Symbol, list[int]] = {}
        for row in together:
            if read < len(rows[row]) and (max_length is None or depth < max_length):
                branches.setdefault(rows[row][read], []).append(row)
            else:
                paths[row] = path
        pending += [(branch, read, depth, path) for branch in reversed(branches.values())]
    return trunk_end


def _common(rows: Sequence[Sequence[Symbol]], together: list[int], read: int) -> Symbol | None:
    """The next symbol, where all rows have the same."""
    first = rows[together[0]]
    if read >= len(first):
        return None
    symbol = first[read]
    return symbol if all(read < len(rows[i]) and rows[i][read] == symbol for i in together[1:]) else None


def pack_batch(
    batch: dict[str, torch.Tensor],
    tokens_per_image: int,
    max_length: int | None,
    owners: Sequence[int] | None = None,
) -> PackedRows:
    """The padded batch of ``llava.data.collate`` as trees; ``owners`` as in ``pack``."""
    rows: list[list[Symbol]] = []
    labels = []
    for ids, mask, targets, slots in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], batch["image_index"].tolist(), strict=True
    ):
        row = ids[mask].tolist()
        pictures = [slot for slot in slots if slot >= 0]
        if (marks := row.count(IMAGE_TOKEN_INDEX)) > len(pictures):
            raise UserError(
                f"row {len(rows)} of the batch: {marks} <image> in the text for {len(pictures)} image(s); "
                "write one <image> for every image",
                everywhere=False,
            )
        shown = iter(pictures)
        rows.append([(i, next(shown)) if i == IMAGE_TOKEN_INDEX else i for i in row])
        labels.append(targets[mask].tolist())
    return pack(rows, labels, tokens_per_image, max_length, owners)
