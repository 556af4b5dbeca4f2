"""Look back at the row, look again at the pictures, think."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llava.errors import UserError
from llava.model.post_block import base


@dataclass
class InteractionOptions(base.Options):
    self_attention: bool = field(default=True, metadata={"help": "causal attention to the row's tokens"})
    cross_attention: bool = field(default=True, metadata={"help": "attention to the row's pictures"})
    keys: str = field(
        default="tower",
        metadata={"help": "what pictures are seen as: raw from the tower, or behind the connector"}
        | {"choices": ("tower", "connector")},
    )
    align: str = field(
        default="none",
        metadata={"help": "what maps a picture's features to the model's width before keys and values are made"}
        | {"choices": ("none", "linear", "mlp")},
    )
    mlp_ratio: float = field(
        default=1.0, metadata={"help": "inner width of the MLP over the model's; 0: no MLP", "least": 0}
    )


class InteractionBlock(base.PostBlock):
    """A decoder layer with a second attention, to the pictures, ``depth`` times; heads are the backbone's."""

    Options = InteractionOptions

    def __init__(self, options: InteractionOptions, config: Any) -> None:
        if not (options.self_attention or options.cross_attention or options.mlp_ratio):
            raise UserError(
                "--post_block_config: self_attention, cross_attention and mlp_ratio are all off, which leaves an empty "
                "block; switch one on"
            )
        super().__init__([Layer(options, config) for _ in range(options.depth)])
        self.needs_rows = options.self_attention
        self.looks_at = options.keys if options.cross_attention else None


class Layer(nn.Module):
    def __init__(self, options: InteractionOptions, config: Any) -> None:
        super().__init__()
        size, gate = config.hidden_size, options.gate
        seen = config.mm_hidden_size if options.keys == "tower" else size
        self.tokens = Attention(size, config, gate) if options.self_attention else None
        self.pictures = (
            Attention(size, config, gate, aligned(seen, size, options.align)) if (options.cross_attention) else None
        )
        width = round(size * options.mlp_ratio)
        self.mlp = base.FeedForward(size, width, gate) if width else None

    def forward(self, x: torch.Tensor, sight: base.LayerSight) -> torch.Tensor:
        """(..., D) -> (asked, D)."""
        asking = sight.asked(x)
        if self.tokens is not None:
            q = self.tokens.queries(asking)
            asking = self.tokens.way(asking, sight.tokens(q, *self.tokens.keys_values(base.norm(x))).flatten(-2))
        if self.pictures is not None:
            seen = sight.pictures(self.pictures.queries(asking), self.pictures.keys_values)
            asking = self.pictures.way(asking, seen.flatten(-2))
        return asking if self.mlp is None else self.mlp(asking)


class Attention(nn.Module):
    """Projections of an attention with the backbone's numbers of heads; who looks at what is for others to say."""

    def __init__(self, size: int, config: Any, gate: str, align: nn.Module | None = None) -> None:
        super().__init__()
        self.head_dim = getattr(config, "head_dim", None) or size // config.num_attention_heads
        self.align = align
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        source = size if align is None else align.width
        inner, shared = self.head_dim * config.num_attention_heads, self.head_dim * heads
        self.q_proj, self.k_proj, self.v_proj = (
            base.linear(size, inner),
            base.linear(source, shared),
            base.linear(source, shared),
        )
        self.way = base.Way(inner, size, gate)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., H, d)."""
        return self._heads(self.q_proj(base.norm(x)))

    def keys_values(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., D) or features (..., T, D') -> twice (..., H', d)."""
        if self.align is not None:
            source = self.align(source.to(self.k_proj.weight.dtype))
        return self._heads(self.k_proj(source)), self._heads(self.v_proj(source))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class Aligned(nn.Sequential):
    """``width``: of what comes out, normed."""

    def __init__(self, width: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.width = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., D') -> (..., width)."""
        return base.norm(super().forward(features))


def aligned(seen: int, size: int, kind: str) -> Aligned:
    """Features of width ``seen`` -> those that keys and values are made of."""
    if kind == "none":
        return Aligned(seen)
    if kind == "linear":
        return Aligned(size, base.linear(seen, size))
    return Aligned(size, base.linear(seen, size), nn.GELU(), base.linear(size, size))
