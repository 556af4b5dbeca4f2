"""What a post block sees, wherever its tokens are: in padded rows, in trees, or next in a generation.

A token sees itself, the earlier tokens of its row (its ancestors in a tree), and every picture that begins at or before
it. So what a block gives for a token does not depend on what comes behind: prefixes can be shared, and keys and values
of a generation kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

from llava.model.decoder import Attention, Rope, attend, full_attention, label_attention
from llava.model.post_block.base import LayerSight

NEVER = 2**62  # where a picture begins that is not there

Project = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def look_at(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q (B, n, H, d) on k and v (B, m, H', d) through ``mask`` (B, n, m) -> (B, n, H, d); zero where all is hidden."""
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    any_seen = mask.any(-1)  # (B, n); a query without keys would come out as NaN
    heads_first = (x.transpose(1, 2) for x in (q, k.to(q.dtype), v.to(q.dtype)))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=(mask | ~any_seen[..., None])[:, None])
    return out.transpose(1, 2) * any_seen[..., None, None].to(out.dtype)


# ---- padded rows ----


class RowSight:
    """Padded rows of L tokens, behind P that a cache holds.

    ``mask`` (B, P + L) marks real tokens, or None. ``pictures`` (B, K, T, D') with ``seen_from`` (B, K), the place of
    their first tokens in the padded row. With a ``cache`` (transformers') the block's keys and values are layers of it
    behind the backbone's ``first_layer``, so that they are repeated, reordered and cut with them.
    """

    def __init__(
        self,
        rope: Rope,
        mask: torch.Tensor | None,
        past: int,
        pictures: torch.Tensor | None = None,
        seen_from: torch.Tensor | None = None,
        cache: Any = None,
        first_layer: int = 0,
    ) -> None:
        self.rope, self.past = rope, past
        length = rope.cos.shape[1]
        places = torch.arange(past + length, device=rope.cos.device)
        self.places = places[past:]
        causal = places <= self.places[:, None]  # (L, P + L)
        real = causal[None] if mask is None else causal & mask.bool()[:, None]
        self.mask = real | (places == self.places[:, None])  # padding sees itself, for want of anything else
        self.pictures, self.cache, self.first_layer = pictures, cache, first_layer
        if pictures is not None:
            self.seen_from = seen_from.repeat_interleave(pictures.shape[2], dim=1)  # (B, K T)
        if cache is not None:
            self._keep_seen_from()

    def layer(self, number: int, is_last: bool) -> LayerSight:
        return LayerSight(_all, partial(self._tokens, 1 + 2 * number), partial(self._pictures, 2 + 2 * number))

    def _tokens(self, slot: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = self.rope.turn(k)
        if self.cache is not None:
            k, v = (x.transpose(1, 2) for x in self._slot(slot).update(k.transpose(1, 2), v.transpose(1, 2)))
        return look_at(self.rope.turn(q), k, v, self.mask.expand(len(q), -1, -1))

    def _pictures(self, slot: int, q: torch.Tensor, project: Project) -> torch.Tensor:
        kept = None if self.cache is None else self._slot(slot, PictureLayer)
        if self.pictures is not None:
            k, v = (x.flatten(1, 2) for x in project(self.pictures))  # (B, K T, H', d)
            if kept is not None:
                k, v = (x.transpose(1, 2) for x in kept.update(k.transpose(1, 2), v.transpose(1, 2)))
        elif kept is not None and kept.is_initialized:
            k, v = kept.keys.transpose(1, 2), kept.values.transpose(1, 2)
        else:
            return torch.zeros_like(q)
        return look_at(q, k, v, self.seen_from[:, None] <= self.places[:, None])

    def _keep_seen_from(self) -> None:
        kept = self._slot(0, PictureLayer)
        if self.pictures is not None:
            begins = self.seen_from[:, None, :, None]  # as keys (B, 1, K T, 1)
            kept.update(begins, begins)
        if kept.is_initialized:
            self.seen_from = kept.keys[:, 0, :, 0]

    def _slot(self, number: int, kind: type[DynamicLayer] = DynamicLayer) -> DynamicLayer:
        """The cache's layer for one thing the block keeps."""
        layers, place = self.cache.layers, self.first_layer + number
        while len(layers) <= place:
            layers.append(DynamicLayer())
        if not isinstance(layers[place], kind):
            layers[place] = kind()
        return layers[place]


class PictureLayer(DynamicLayer):
    """Pictures do not end with the row: cutting tokens off its end leaves them where they are."""

    def crop(self, tokens_to_remove: int) -> None:
        return


# ---- trees ----


class TreeSight:
    """A stream of trees (``llava.data.packing``).

    ``rope`` is that of all tokens. ``whole``: the block is given all T tokens, and not the Q that predict. ``pictures``
    (N, T', D') are those that the stream's ``feature_index`` numbers. ``looks`` stand in for ``attend``, layer by
    layer, where a generation keeps the keys and values that pass.
    """

    def __init__(
        self,
        rows: dict[str, Any],
        rope: Rope,
        whole: bool,
        pictures: torch.Tensor | None,
        looks: Sequence[Callable[..., torch.Tensor]] | None = None,
    ) -> None:
        self.queries, self.whole, self.pictures, self.looks = rows["queries"], whole, pictures, looks
        self.rope = rope
        counts = [tree[3] for tree in rows["trees"]]
        self.asked_of_trees = self.queries.split(counts)
        if whole:
            self.attention = {False: full_attention(rows), True: label_attention(rows)}
            spans = [(start, end) for start, _, end, _ in rows["trees"]]
            places = torch.arange(len(rope.cos), device=rope.cos.device)
            self.all_of_trees = [places[start:end] for start, end in spans]
        if pictures is not None:
            self.shown = _shown(rows, pictures.shape[1])
            self.subtree_end = rows["subtree_end"]
        self.kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # keys and values of each tree's pictures

    def layer(self, number: int, is_last: bool) -> LayerSight:
        trimmed = self.whole and is_last
        tokens = partial(self._tokens, number, trimmed)
        pictures = partial(self._pictures, number, trimmed or not self.whole)
        return LayerSight(self._at_queries if trimmed else _all, tokens, pictures)

    def seen_by_questions(self) -> list[torch.Tensor]:
        """For every tree (q, P): which of its pictures each of its questions sees."""
        if self.pictures is None:
            return [at.new_zeros(len(at), 0, dtype=torch.bool) for at in self.asked_of_trees]
        return [self.seen(tree, at) for tree, at in enumerate(self.asked_of_trees)]

    def seen(self, tree: int, at: torch.Tensor) -> torch.Tensor:
        """(n, P): which of a tree's pictures the tokens at ``at`` (n,) see."""
        begins = self.shown[tree][1]
        return (begins <= at[:, None]) & (at[:, None] < self.subtree_end[begins])

    def _at_queries(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.queries]

    def _tokens(self, number: int, trimmed: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asking = self.rope.at(self.queries) if trimmed else self.rope
        look = attend if self.looks is None else self.looks[number]
        return look(asking.turn(q), self.rope.turn(k), v, self.attention[trimmed], 0.0)

    def _pictures(self, number: int, at_queries: bool, q: torch.Tensor, project: Project) -> torch.Tensor:
        k, v = project(self.pictures)  # (N, T', H', d)
        places = self.asked_of_trees if at_queries else self.all_of_trees
        self.kept[number] = [(k[shown].flatten(0, 1), v[shown].flatten(0, 1)) for shown, _ in self.shown]
        seen = [
            _look_at_pictures(asking, *kept, self.seen(tree, at))
            for tree, (asking, at, kept) in enumerate(
                zip(q.split([len(at) for at in places]), places, self.kept[number], strict=True)
            )
        ]
        # The empty slices tie a batch of text to the block's weights, so that they get a (zero) gradient on every rank.
        return torch.cat([*seen, *(x[0, :0].reshape(0, *q.shape[1:]).to(q) for x in (k, v))])


class StepSight:
    """The next tokens of some questions of a generation, in the trees of ``before``, which was there for the prompt.

    ``asking`` names, for every tree that goes on, its number and (n, P) which of its pictures each token sees.
    """

    def __init__(
        self,
        before: TreeSight,
        rope: Rope,
        asking: Sequence[tuple[int, torch.Tensor]],
        looks: Sequence[Callable[..., torch.Tensor]],
    ) -> None:
        self.before, self.rope, self.asking, self.looks = before, rope, asking, looks

    def layer(self, number: int, is_last: bool) -> LayerSight:
        return LayerSight(_all, partial(self._tokens, number), partial(self._pictures, number))

    def _tokens(self, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.looks[number](self.rope.turn(q), self.rope.turn(k), v, Attention([], []), 0.0)

    def _pictures(self, number: int, q: torch.Tensor, project: Project) -> torch.Tensor:
        parts = q.split([len(seen) for _, seen in self.asking])
        return torch.cat(
            [
                _look_at_pictures(part, *self.before.kept[number][tree], seen)
                for part, (tree, seen) in zip(parts, self.asking, strict=True)
            ]
        )


def _all(x: torch.Tensor) -> torch.Tensor:
    return x


def _look_at_pictures(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """One tree: q (n, H, d), k and v (P T', H', d), seen (n, P) -> (n, H, d)."""
    if not len(k) or not len(q):
        return q * 0  # and not new zeros: what made q gets its gradient on every rank
    mask = seen.repeat_interleave(len(k) // seen.shape[1], dim=1)
    return look_at(q[None], k[None], v[None], mask[None])[0]


def _shown(rows: dict[str, Any], tokens_per_image: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For every tree the numbers of its pictures (P,) and their first tokens (P,)."""
    first = rows["feature_index"] % tokens_per_image == 0
    numbers, begins = rows["feature_index"][first] // tokens_per_image, rows["image_at"][first]
    ends = torch.tensor([tree[2] for tree in rows["trees"]], device=begins.device)
    counts = torch.bincount(torch.bucketize(begins, ends, right=True), minlength=len(ends)).tolist()
    return list(zip(numbers.split(counts), begins.split(counts), strict=True))
