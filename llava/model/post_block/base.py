"""What every post block is, and the pieces that several are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class LayerSight(NamedTuple):
    """What one layer of a block may look at; ``llava.model.post_block.sight`` makes it, for rows and for trees.

    ``x`` is (..., D): the hidden states of all tokens, or of the next ones of a generation.
    """

    # (..., D) -> the positions whose outcome is wanted: all, but in the last layer of training only those that predict.
    asked: Callable[[torch.Tensor], torch.Tensor]
    # q (asked, H, d), k and v (..., H', d) -> (asked, H, d): causal attention to the row, positions turned in as in the
    # backbone, earlier tokens of a generation included.
    tokens: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    # q (asked, H, d) and a function, features (..., T, D') -> keys and values (..., T, H', d)  ->  (asked, H, d):
    # attention to the pictures that begin at or before each token; zero where there are none.
    pictures: Callable[[torch.Tensor, Callable], torch.Tensor]


@dataclass
class Options:
    """Options that every block has; a block's own class adds to them."""

    depth: int = field(default=1, metadata={"help": "layers", "least": 1})
    gate: str = field(
        default="none",
        metadata={
            "help": "none: output projections start at zero | scalar, channel: they do not, a gate (one, one a "
            "channel) does",
            "choices": ("none", "scalar", "channel"),
        },
    )


class PostBlock(nn.Module):
    """A module between the backbone's last norm and ``lm_head``: hidden states -> hidden states.

    A subclass names its ``Options``, makes layers that are called ``layer(x, sight)`` and return the outcome for
    ``sight.asked(x)``, and says what they look at. A fresh one must change no hidden state and still learn: end every
    branch in a ``Way``.
    """

    Options: ClassVar[type[Options]] = Options
    needs_rows = False  # whether it looks at other tokens of a row
    looks_at: str | None = None  # "tower" (N, T, D_vision) or "connector" (N, T, D)

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, sight: Any) -> torch.Tensor:
        """(..., D) -> (asked, D)."""
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x, sight.layer(number, is_last=number == last))
        return x


class Way(nn.Module):
    """The way back to the residual stream: a linear layer that starts at zero, or one behind a gate that does.

    (Zero-initialised output: ReZero, arXiv:2003.04887; gate per channel: LayerScale, arXiv:2103.17239; tanh gate:
    Flamingo, arXiv:2204.14198.) Both at once would stay at zero for ever: the gradient of each holds the other.
    """

    def __init__(self, width: int, hidden_size: int, gate: str) -> None:
        super().__init__()
        self.proj = linear(width, hidden_size, zero=gate == "none")
        self.gate = None if gate == "none" else nn.Parameter(torch.zeros(hidden_size if gate == "channel" else 1))

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """x (..., D), branch (..., width) -> x + gated branch (..., D), in the dtype of x."""
        branch = self.proj(branch)
        if self.gate is not None:
            branch = branch * torch.tanh(self.gate)
        return x + branch.to(x.dtype)


class FeedForward(nn.Module):
    """``x + way(silu(up(norm(x))))``, every token for itself."""

    def __init__(self, hidden_size: int, width: int, gate: str) -> None:
        super().__init__()
        self.up = linear(hidden_size, width)
        self.way = Way(width, hidden_size, gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return self.way(x, F.silu(self.up(norm(x))))


def linear(inside: int, outside: int, zero: bool = False) -> nn.Linear:
    """Without bias; outputs of unit size for inputs of unit size, or zero."""
    layer = nn.Linear(inside, outside, bias=False)
    nn.init.zeros_(layer.weight) if zero else nn.init.normal_(layer.weight, std=inside**-0.5)
    return layer


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS 1 in the last dimension (arXiv:1910.07467); the layer behind it scales."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)
