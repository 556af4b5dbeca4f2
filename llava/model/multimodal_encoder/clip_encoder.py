"""CLIP's vision transformer as LLaVA's eye."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.errors import UserError

FEATURES = {"patch": slice(1, None), "cls_patch": slice(None)}  # position 0 is the class token


class CLIPVisionTower(nn.Module):
    """Pictures -> hidden states of one layer.

    ``select_layer`` counts as ``hidden_states[select_layer]`` does: 0 is the embedding, -1 the last layer, -2 (LLaVA's)
    the one before. Layers behind it are not run.
    """

    def __init__(self, config: CLIPVisionConfig, select_layer: int = -2, select_feature: str = "patch") -> None:
        super().__init__()
        if select_feature not in FEATURES:
            raise UserError(f"mm_vision_select_feature {select_feature}: expected one of {', '.join(FEATURES)}")
        depth = config.num_hidden_layers
        if not -depth - 1 <= select_layer <= depth:
            raise UserError(f"mm_vision_select_layer {select_layer}: the tower has {depth} layers")
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.vision_tower = CLIPVisionModel(config)

    is_loaded = True  # upstream's loads late and is asked before use
    image_processor: Any = None  # set by load_pretrained_model

    def load_model(self) -> None:
        """Nothing is left to load: weights came in with the model's."""

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches(self) -> int:
        return (self.config.image_size // self.config.patch_size) ** 2

    @property
    def num_features(self) -> int:
        """Features per picture, 576 for CLIP-L/14 at 336 with ``patch``."""
        return self.num_patches + (self.select_feature == "cls_patch")

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.embeddings.class_embedding.dtype

    @property
    def num_layers(self) -> int:
        """How many layers run."""
        return self.select_layer % (self.config.num_hidden_layers + 1)

    def idle_parameters(self) -> list[str]:
        """Names of the parameters that no forward touches: layers behind the chosen one, and the last norm."""
        behind = range(self.num_layers, self.config.num_hidden_layers)
        idle = ("vision_tower.post_layernorm.", *(f"vision_tower.encoder.layers.{i}." for i in behind))
        return [n for n, _ in self.named_parameters() if n.startswith(idle)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, num_features, hidden_size). No graph is kept unless the tower itself trains."""
        trains = any(p.requires_grad for p in self.vision_tower.parameters())
        with contextlib.nullcontext() if trains else torch.no_grad():
            tower = self.vision_tower
            hidden = tower.pre_layrnorm(tower.embeddings(images.to(self.dtype)))
            for layer in tower.encoder.layers[: self.num_layers]:
                hidden = layer(hidden, attention_mask=None)
        return hidden[:, FEATURES[self.select_feature]]
