"""The connector: vision features (mm_hidden_size) -> language model embeddings (hidden_size)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from llava.errors import UserError


def _linear(mm_hidden_size: int, hidden_size: int) -> nn.Module:
    return nn.Linear(mm_hidden_size, hidden_size)


def _identity(mm_hidden_size: int, hidden_size: int) -> nn.Module:
    if mm_hidden_size != hidden_size:
        raise UserError(
            f"mm_projector_type identity: the tower's width {mm_hidden_size} is not the language model's {hidden_size}"
        )
    return nn.Identity()


PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {"linear": _linear, "identity": _identity}


def _mlp(depth: int, mm_hidden_size: int, hidden_size: int) -> nn.Sequential:
    # Index of the i-th Linear is 2i: the keys mm_projector.{0,2,4,...} of the original checkpoints.
    layers: list[nn.Module] = [nn.Linear(mm_hidden_size, hidden_size)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)


def build_vision_projector(config: Any) -> nn.Module:
    """The connector that ``config.mm_projector_type`` names: linear | mlp<N>x_gelu | identity.

    Raises:
        UserError: any other name.
    """
    kind = getattr(config, "mm_projector_type", None) or "linear"
    sizes = (config.mm_hidden_size, config.hidden_size)
    if kind in PROJECTORS:
        return PROJECTORS[kind](*sizes)
    mlp = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if mlp is None:
        raise UserError(
            f"mm_projector_type {kind}: unknown projector; known: linear, mlp<N>x_gelu (mlp2x_gelu), identity"
        )
    return _mlp(int(mlp[1]), *sizes)
