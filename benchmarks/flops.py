"""Useful operations of a step: what has to be computed once for its result, two operations a multiply-add.

Counted: the decoder's linear layers with their LoRA, attention where the mask lets through (scores and weighted sum),
the head at positions that predict a label, the tower's layers that are used and the connector, each once a picture; and
the products of the backward pass that what trains needs. A frozen weight has no gradient of its own, and what lies
below the first trained weight needs none at all. In the last layer only positions that predict a label need queries,
output projection and MLP. Nothing is counted twice because it is recomputed; element-wise work is not counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.models import Geometry
from llava.data.packing import PackedRows


class Amount(NamedTuple):
    """What a batch asks of the decoder, shared beginnings counted once."""

    images: int
    tokens: int
    attended: int  # (query, key) pairs that the mask lets through
    queries: int  # positions that predict a label
    queries_attended: int  # pairs with such a position as the query
    queries_looking: int = 0  # pairs of such a position and an image token that it sees; for a post block

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Amount:
        """Of a packed batch (``llava.data.collate.PackingCollator``)."""
        rows: PackedRows = batch["rows"]
        seen = rows["position_ids"] + 1  # ancestors and itself
        at, shown = rows["queries"], rows["image_at"][:, None]
        looking = (shown <= at) & (at < rows["subtree_end"][shown])  # (M, Q)
        return cls(len(batch["images"]), len(seen), int(seen.sum()), len(at), int(seen[at].sum()), int(looking.sum()))


def pictures(geometry: Geometry, images: int) -> float:
    """Tower (the layers that are used) and connector."""
    g, width = geometry, geometry.tower_hidden_size
    patches, layers = g.tokens_per_image + 1, g.select_layer % (g.tower_layers + 1)
    layer = patches * width * (4 * width + 2 * g.tower_intermediate_size) + 2 * patches**2 * width
    embedding = g.tokens_per_image * 3 * g.patch_size**2 * width
    return 2.0 * images * (embedding + layers * layer + _connector(g))


def _connector(geometry: Geometry) -> int:
    """Multiply-adds a picture."""
    return geometry.tokens_per_image * geometry.hidden_size * (geometry.tower_hidden_size + geometry.hidden_size)


def decoder(geometry: Geometry, amount: Amount, lora_r: int = 0) -> float:
    """Forward of decoder and head."""
    g, d, t, q = geometry, geometry.hidden_size, amount.tokens, amount.queries
    of_inputs = 2 * (d * d + lora_r * 2 * d)  # k, v: at every token in every layer
    of_queries = 2 * (d * d + lora_r * 2 * d) + 3 * (d * g.intermediate_size + lora_r * (d + g.intermediate_size))
    linear = g.layers * t * of_inputs + ((g.layers - 1) * t + q) * of_queries
    attention = 2 * d * ((g.layers - 1) * amount.attended + amount.queries_attended)
    return 2.0 * (linear + attention) + head(g, amount)


def head(geometry: Geometry, amount: Amount) -> float:
    """Forward of lm_head."""
    return 2.0 * amount.queries * geometry.hidden_size * geometry.vocab_size


def lora_backward(geometry: Geometry, amount: Amount, lora_r: int) -> float:
    """Gradients of A and B in every layer, and of what lies between them."""
    # Every product of activation and weight has one for the activation's gradient, every product of activations two.
    g, d, t = geometry, geometry.hidden_size, amount.tokens
    plain, adapted = decoder(g, amount), decoder(g, amount, lora_r)
    attention = 4.0 * d * ((g.layers - 1) * amount.attended + amount.queries_attended)
    weights = adapted - plain  # A's and B's own gradients: as large as their forward products
    # Below the first layer's projections nothing trains.
    unneeded = 2.0 * 3 * t * (d * d + lora_r * d)
    return adapted + attention + weights - unneeded


def dpo(geometry: Geometry, amount: Amount, lora_r: int, cached: bool) -> float:
    """One step of DPO with LoRA; the reference is a forward without LoRA, or known already."""
    reference = 0.0 if cached else decoder(geometry, amount)
    policy = decoder(geometry, amount, lora_r) + lora_backward(geometry, amount, lora_r)
    return pictures(geometry, amount.images) + policy + reference


def frozen_dpo(geometry: Geometry, amount: Amount, part: str, kept: bool) -> float:
    """One step of DPO of lm_head or of a post block (interaction, its defaults) alone; the backbone's forward once."""
    g, d, q = geometry, geometry.hidden_size, amount.queries
    wanted = amount
    if part == "post_block":  # it looks at whole rows, so the last layer is wanted at every token
        wanted = amount._replace(queries=amount.tokens, queries_attended=amount.attended)
    backbone = 0.0 if kept else pictures(g, amount.images) + decoder(g, wanted) - head(g, wanted)
    if part == "lm_head":
        return backbone + 3 * head(g, amount)  # policy, reference, the weight's gradient
    # What frozen tensors go into (keys and values of tokens and pictures, queries of tokens) hands no gradient on.
    entering = 2 * amount.tokens * d * d + q * d * d
    entering += 2 * amount.images * g.tokens_per_image * g.tower_hidden_size * d
    inside = q * 5 * d * d  # the tokens' way back, the pictures' queries and theirs, the MLP's two
    attention = 2 * d * (amount.queries_attended + amount.queries_looking)
    forward = 2.0 * (entering + inside + attention)
    backward = 2.0 * (entering + 2 * inside + 2 * attention)
    return backbone + 2 * (forward + head(g, amount)) + backward + head(g, amount)


def pretrain(geometry: Geometry, amount: Amount) -> float:
    """One step of training the connector alone: gradients flow through the whole decoder."""
    g = geometry
    attention = 4.0 * g.hidden_size * ((g.layers - 1) * amount.attended + amount.queries_attended)
    # The connector's two weights and its inner activation.
    second = g.tokens_per_image * g.hidden_size**2
    connector = 2.0 * amount.images * (_connector(g) + second)
    return pictures(g, amount.images) + 2 * decoder(g, amount) + attention + connector
