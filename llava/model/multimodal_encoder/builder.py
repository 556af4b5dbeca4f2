"""The vision tower that a model's config names."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, CLIPVisionConfig

from llava.errors import UserError
from llava.files import existing
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


def vision_config(name_or_path: str, flag: str = "--vision_tower", cache_dir: str | None = None) -> CLIPVisionConfig:
    """The tower's own configuration, from a folder or hub id of a CLIP model (whole or vision part only).

    Raises:
        UserError: nothing there, or not a CLIP.
    """
    if name_or_path.startswith((".", "/", "~")):
        existing(name_or_path, flag, directory=True)
    try:
        config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{flag} {name_or_path}: no CLIP vision tower can be read there ({str(error).splitlines()[0]}); "
            "pass the folder or hub id of e.g. openai/clip-vit-large-patch14-336"
        ) from None
    if config.model_type == "clip":  # of a whole LLaVA transformers may have made the vision part up
        config = config.vision_config
    if not isinstance(config, CLIPVisionConfig):
        raise UserError(f"{flag} {name_or_path}: model type '{config.model_type}' is not a CLIP vision tower")
    return config


def build_vision_tower(config: Any) -> CLIPVisionTower:
    """An empty tower of ``config.mm_vision_config``'s shape; its weights enter with the model's."""
    return CLIPVisionTower(
        CLIPVisionConfig(**config.mm_vision_config),
        select_layer=config.mm_vision_select_layer,
        select_feature=getattr(config, "mm_vision_select_feature", "patch"),
    )
