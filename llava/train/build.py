"""Flags -> what a training script needs: first what is cheap (config, tokenizer, data), then the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llava.conversation import template
from llava.data.collate import Collator, PackingCollator
from llava.data.examples import ExampleBuilder
from llava.data.images import ImageLoader
from llava.errors import UserError, note
from llava.files import existing, read_object
from llava.model.builder import (
    FAMILIES,
    LANGUAGE_MODELS,
    assemble,
    blank_config,
    fresh_connector,
    load_image_processor,
    local_folder,
    read_config,
    tower_shape,
    with_tower,
)
from llava.model.checkpoint import read_connector, read_model_weights
from llava.model.decoder import why_not
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.tokenization import load_tokenizer


@dataclass
class ModelPlan:
    """A model that is known but not loaded: everything the data needs, and ``load`` for the weights."""

    folder: Path
    tower: Path | None
    config: dict[str, Any]
    blank: bool  # a language model that gets a tower and a new connector
    connector: str | None  # --pretrain_mm_mlp_adapter
    dtype: torch.dtype  # of the weights
    compute_dtype: torch.dtype
    attn_implementation: str | None
    seed: int
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any

    def load(self) -> Any:
        """The model with its weights; a second call gives the same model again."""
        state = read_model_weights(self.folder)
        if self.connector is not None:
            state = {**state, **read_connector(existing(self.connector, "--pretrain_mm_mlp_adapter"))}
        elif self.blank:
            state = {**state, **fresh_connector(self.config, self.seed)}
        options = {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}
        return assemble(self.config, state, self.folder, self.dtype, self.tower, **options)


def plan_model(model_args: Any, data_args: Any, train_args: Any, parts: set[str]) -> ModelPlan:
    """Read config, tokenizer and image processor of ``--model_name_or_path``: a LLaVA, or an LLM to build one on.

    Raises:
        UserError: a model that cannot be trained, or flags that do not fit it.
    """
    name, cache = model_args.model_name_or_path, train_args.cache_dir
    folder = local_folder(name, "--model_name_or_path", cache_dir=cache)
    kind = read_object(existing(folder / "config.json", "--model_name_or_path")).get("model_type")
    blank = kind in LANGUAGE_MODELS
    if blank:
        if not model_args.vision_tower:
            raise UserError(
                f"--model_name_or_path {name} is a language model; pass --vision_tower to make a LLaVA of it"
            )
        config, tower = blank_config(folder, model_args, cache)
    elif kind in FAMILIES:
        config, tower = _existing_config(folder, model_args, cache)
    else:
        read_config(folder, "--model_name_or_path")  # says what it is
        raise AssertionError("read_config refuses every other kind")

    aspect = data_args.image_aspect_ratio or config.get("image_aspect_ratio") or "square"
    config.update(
        image_aspect_ratio=aspect,
        tokenizer_model_max_length=train_args.model_max_length,
        tokenizer_padding_side="right",
        tune_mm_mlp_adapter=parts == {"projector"},
        freeze_mm_mlp_adapter="projector" not in parts,
        mm_projector_lr=train_args.mm_projector_lr,
    )
    tokenizer = load_tokenizer(folder, model_max_length=train_args.model_max_length, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    # Weights that do not train may be as coarse as the arithmetic; DeepSpeed keeps float32 masters of its own.
    coarse = "backbone" not in parts or train_args.deepspeed
    return ModelPlan(
        folder=folder,
        tower=tower,
        config=config,
        blank=blank,
        connector=model_args.pretrain_mm_mlp_adapter,
        dtype=train_args.compute_dtype if coarse else torch.float32,
        compute_dtype=train_args.compute_dtype,
        attn_implementation=model_args.attn_implementation,
        seed=train_args.seed,
        tokenizer=tokenizer,
        image_processor=load_image_processor(folder, tower),
    )


def _existing_config(folder: Path, model_args: Any, cache: str | None) -> tuple[dict[str, Any], Path | None]:
    """A LLaVA's config with what the flags may change: the tower's place, the layer its features come from."""
    config = read_config(folder, "--model_name_or_path")
    if model_args.vision_tower:
        tower = local_folder(model_args.vision_tower, "--vision_tower", cache_dir=cache)
        shape = tower_shape(tower)
        if shape["hidden_size"] != config["mm_hidden_size"]:
            raise UserError(
                f"--vision_tower {model_args.vision_tower}: width {shape['hidden_size']}, but the connector of "
                f"{folder} takes {config['mm_hidden_size']}"
            )
        config.update(mm_vision_tower=model_args.vision_tower, mm_vision_config=shape)
    else:
        config, tower = with_tower(config, folder, cache_dir=cache)
    own_type = config.get("mm_projector_type") or "linear"
    if model_args.mm_projector_type not in (None, own_type):
        raise UserError(
            f"--mm_projector_type {model_args.mm_projector_type}: {folder} has a connector of type {own_type}"
        )
    for key in ("mm_vision_select_layer", "mm_vision_select_feature"):
        if getattr(model_args, key) is not None:
            config[key] = getattr(model_args, key)
    return config, tower


def example_builder(plan: ModelPlan, version: str) -> ExampleBuilder:
    """Records -> examples, for this model and template."""
    return ExampleBuilder(
        tokenizer=plan.tokenizer,
        template=template(version),
        load_image=ImageLoader(plan.image_processor, plan.config["image_aspect_ratio"]),
        tokens_per_image=_tokens_per_image(PretrainedConfig(**plan.config)),
        max_length=plan.config["tokenizer_model_max_length"],
        vocab_size=plan.config.get("vocab_size", 32000),
    )


def _tokens_per_image(config: Any) -> int:
    with torch.device("meta"):
        return build_vision_tower(config).num_features


def collator(plan: ModelPlan, builder: ExampleBuilder, train_args: Any) -> Collator:
    """Examples -> batches, for this model: rows share their beginnings unless the flags or the model forbid it."""
    loader = builder.load_image
    settings = (plan.tokenizer.pad_token_id, plan.config["tokenizer_model_max_length"], loader.blank, loader.levels())
    reason = None if train_args.prefix_sharing else "--prefix_sharing False"
    reason = reason or why_not(PretrainedConfig(**plan.config), plan.attn_implementation)
    if reason is None:
        return PackingCollator(*settings, tokens_per_image=builder.tokens_per_image)
    if train_args.process_index == 0:
        note(f"rows are computed one by one: {reason}")
    return Collator(*settings)


def check_resumed(checkpoint: str | None, arguments: dict[str, Any]) -> None:
    """A run is gone on with only with the arguments it was started with.

    Raises:
        UserError: they differ; those that do are named.
    """
    card = Path(checkpoint).parent / "run.json" if checkpoint else None
    if card is None or not card.is_file():
        return
    before = read_object(card).get("arguments", {})
    differing = [
        f"{key} {before[key]!r} -> {value!r}"
        for key, value in arguments.items()
        if key not in FREE_ON_RESUME and key in before and before[key] != value
    ]
    if differing:
        raise UserError(
            f"{checkpoint} belongs to a run with other arguments ({'; '.join(differing[:5])}); choose another "
            "--output_dir, or pass --resume_from_checkpoint False to start afresh"
        )


# What may change between a run and its continuation without changing what is computed.
FREE_ON_RESUME = {
    "local_rank",
    "output_dir",
    "logging_dir",
    "logging_steps",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "cache_dir",
    "reference_cache",
    "feature_cache",
}
