"""Every token for itself: the smallest change that is not linear."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llava.model.post_block import base


@dataclass
class MLPOptions(base.Options):
    ratio: float = field(default=1.0, metadata={"help": "inner width over the model's", "above": 0})


class MLPBlock(base.PostBlock):
    """``x -> x + way(silu(up(norm(x))))``, ``depth`` times."""

    Options = MLPOptions

    def __init__(self, options: MLPOptions, config: Any) -> None:
        width = max(1, round(config.hidden_size * options.ratio))
        super().__init__([Layer(config.hidden_size, width, options.gate) for _ in range(options.depth)])


class Layer(nn.Module):
    def __init__(self, hidden_size: int, width: int, gate: str) -> None:
        super().__init__()
        self.mlp = base.FeedForward(hidden_size, width, gate)

    def forward(self, x: torch.Tensor, sight: base.LayerSight) -> torch.Tensor:
        """(..., D) -> (asked, D)."""
        return self.mlp(sight.asked(x))
