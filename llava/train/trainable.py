"""What trains: the parts of a model, chosen from the flags, switched on, and printed before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from llava.errors import UserError
from llava.model.builder import LORA_EXCLUDED
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

# The order in which they are printed. "backbone" is the decoder with its embeddings, without the head.
PARTS = ("projector", "lora", "backbone", "lm_head", "vision_tower")

BY_TRAIN_TYPE: dict[str, set[str]] = {
    "projector": {"projector"},
    "use_lora": {"projector", "lora"},
    "freeze_vision": {"projector", "backbone", "lm_head"},
    "none": {"projector", "backbone", "lm_head", "vision_tower"},
}


def part_of(name: str) -> str:
    """The part that a parameter's name belongs to."""
    if "lora_" in name:
        return "lora"
    for part, mark in (("vision_tower", "vision_tower."), ("projector", "mm_projector."), ("lm_head", "lm_head.")):
        if mark in name:
            return part
    return "backbone"


def choose_parts(model_args: Any, train_args: Any) -> set[str]:
    """Parts that train, from ``--train_type`` or upstream's flags (which do not mix).

    Raises:
        UserError: flags that contradict each other, or leave nothing to train.
    """
    flags = {
        "--lora_enable": train_args.lora_enable,
        "--tune_mm_mlp_adapter": model_args.tune_mm_mlp_adapter,
        "--freeze_mm_mlp_adapter": model_args.freeze_mm_mlp_adapter,
        "--freeze_backbone": model_args.freeze_backbone,
    }
    given = [flag for flag, on in flags.items() if on]
    train_type = getattr(train_args, "train_type", None)
    if train_type is not None:
        redundant = {"projector": "--tune_mm_mlp_adapter", "use_lora": "--lora_enable"}.get(train_type)
        clash = [flag for flag in given if flag != redundant]
        if clash:
            raise UserError(f"--train_type {train_type} and {', '.join(clash)} both say what trains; pass one of them")
        parts = set(BY_TRAIN_TYPE[train_type])
    elif model_args.tune_mm_mlp_adapter:
        clash = [flag for flag in given if flag in ("--lora_enable", "--freeze_mm_mlp_adapter")]
        if clash:
            raise UserError(f"--tune_mm_mlp_adapter trains the connector only; it contradicts {', '.join(clash)}")
        parts = {"projector"}
    else:
        parts = {"projector", "lora"} if train_args.lora_enable else {"projector", "backbone", "lm_head"}
        if model_args.freeze_backbone:
            parts -= {"backbone"}
        if model_args.freeze_mm_mlp_adapter:
            parts -= {"projector"}
    if train_args.mm_projector_lr == 0:
        parts -= {"projector"}
    if not parts:
        raise UserError("nothing is left to train: the connector is frozen and nothing else is chosen")
    return parts


def add_lora(model: nn.Module, train_args: Any) -> nn.Module:
    """A new LoRA on every linear layer of the decoder; never on the tower, the connector or the head."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(train_args.seed)  # the same start however much loading has drawn before (ZeRO-3 draws more)
    decoder = model.get_model().layers
    leaves = sorted({name.split(".")[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)})
    config = LoraConfig(
        r=train_args.lora_r,
        lora_alpha=train_args.lora_alpha,
        lora_dropout=train_args.lora_dropout,
        target_modules=leaves,
        exclude_modules=LORA_EXCLUDED,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def switch_on(model: nn.Module, parts: Iterable[str]) -> None:
    """Let exactly ``parts`` train.

    Raises:
        UserError: a part has no parameters to train (an identity connector).
    """
    parts = set(parts)
    # The tower's layers behind the chosen one never run; DDP would wait for their gradients.
    idle = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, CLIPVisionTower)
        for name in module.idle_parameters()
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts and name not in idle)
        # Optimizer states and updates are float32 also where the frozen rest is half precision.
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()
    present = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    if not present:
        raise UserError(f"nothing to train: {', '.join(sorted(parts))} has no parameters in this model")


def table(model: nn.Module, learning_rate: float, mm_projector_lr: float | None) -> str:
    """Markdown: part, parameters, trained parameters, learning rate."""
    total: dict[str, int] = dict.fromkeys(PARTS, 0)
    trained: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total[part_of(name)] += size
        trained[part_of(name)] += size if parameter.requires_grad else 0
    lines = ["| part | parameters | trained | learning rate |", "|---|---:|---:|---:|"]
    for part in PARTS:
        if total[part]:
            rate = mm_projector_lr if part == "projector" and mm_projector_lr else learning_rate
            lines.append(f"| {part} | {total[part]:,} | {trained[part]:,} | {f'{rate:g}' if trained[part] else '-'} |")
    lines.append(f"| all | {sum(total.values()):,} | {sum(trained.values()):,} | |")
    return "\n".join(lines)
