"""What trains: the parts of a model, chosen from the flags, switched on, and printed before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from llava.errors import UserError, note
from llava.model.adapter import LORA_EXCLUDED, load_adapter
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.quantization import full_size

# The order in which they are printed. "backbone" is the decoder with its embeddings, without the head.
PARTS = ("projector", "lora", "backbone", "post_block", "lm_head", "vision_tower")

BY_TRAIN_TYPE: dict[str, set[str]] = {
    "projector": {"projector"},
    "use_lora": {"projector", "lora"},
    "freeze_vision": {"projector", "backbone", "lm_head"},
    "none": {"projector", "backbone", "lm_head", "vision_tower"},
}

# Upstream's flags that name one part each; alone or together they train exactly what they name.
TUNE_FLAGS = {
    "tune_mm_mlp_adapter": "projector",
    "tune_lm_head": "lm_head",
    "tune_post_decoder": "post_block",
    "tune_post_interaction_block": "post_block",
}

RATE_FLAGS = {"projector": "mm_projector_lr", "post_block": "post_block_lr", "lm_head": "lm_head_lr"}

# A gate starts at zero and multiplies everything behind it: at the block's own rate it would hardly open in the 40 to
# 400 steps of a run (40 steps at 1e-4 move it to 0.004).
GATE_RATE = 100


def part_of(name: str) -> str:
    """The part that a parameter's name belongs to."""
    if "lora_" in name:
        return "lora"
    for part, mark in (
        ("vision_tower", "vision_tower."),
        ("projector", "mm_projector."),
        ("post_block", "post_block."),
        ("lm_head", "lm_head."),
    ):
        if mark in name:
            return part
    return "backbone"


def rate_of(name: str, train_args: Any) -> float:
    """The peak learning rate of a parameter: its part's own where a flag gives one; a gate's is higher."""
    part = part_of(name)
    rate = _own_rates(train_args).get(part) or train_args.learning_rate
    return rate * GATE_RATE if part == "post_block" and name.endswith("gate") else rate


def _own_rates(train_args: Any) -> dict[str, float | None]:
    return {part: getattr(train_args, flag) for part, flag in RATE_FLAGS.items()}


def choose_parts(model_args: Any, train_args: Any) -> set[str]:
    """Parts that train: from ``--tune``, ``--train_type`` or upstream's flags (which do not mix).

    Raises:
        UserError: flags that contradict each other, name a part twice, or leave nothing to train.
    """
    flags = {
        "--lora_enable": train_args.lora_enable,
        "--freeze_mm_mlp_adapter": model_args.freeze_mm_mlp_adapter,
        "--freeze_backbone": model_args.freeze_backbone,
        **{f"--{flag}": getattr(model_args, flag) for flag in TUNE_FLAGS},
    }
    given = [flag for flag, on in flags.items() if on]
    train_type = getattr(train_args, "train_type", None)
    named = [flag for flag in TUNE_FLAGS if f"--{flag}" in given]
    if model_args.tune is not None:
        clash = given + ([f"--train_type {train_type}"] if train_type else [])
        if clash:
            raise UserError(f"--tune and {', '.join(clash)} both say what trains; pass one of them")
        parts = _listed(model_args.tune)
    elif train_type is not None:
        redundant = {"projector": "--tune_mm_mlp_adapter", "use_lora": "--lora_enable"}.get(train_type)
        clash = [flag for flag in given if flag != redundant]
        if clash:
            raise UserError(f"--train_type {train_type} and {', '.join(clash)} both say what trains; pass one of them")
        parts = set(BY_TRAIN_TYPE[train_type])
    elif named:
        parts = {TUNE_FLAGS[flag] for flag in named}
        if len(parts) < len(named):
            raise UserError(
                "--tune_post_decoder and --tune_post_interaction_block name one part twice; pass one of them"
            )
        clash = [flag for flag in given if flag == "--lora_enable"]
        clash += [flag for flag in given if flag == "--freeze_mm_mlp_adapter" and "projector" in parts]
        if clash:
            flags = " and ".join(f"--{flag}" for flag in named)
            raise UserError(
                f"{flags}: nothing else trains, which contradicts {', '.join(clash)}; --tune takes any mixture"
            )
    else:
        parts = {"projector", "lora"} if train_args.lora_enable else {"projector", "backbone", "lm_head"}
        if model_args.freeze_backbone:
            parts -= {"backbone"}
        if model_args.freeze_mm_mlp_adapter:
            parts -= {"projector"}
    if "lora" in parts and "backbone" in parts:
        raise UserError("--tune: lora keeps the backbone frozen; name one of the two")
    for part, rate in _own_rates(train_args).items():
        default = type(train_args).__dataclass_fields__[RATE_FLAGS[part]].default
        if part not in parts and rate not in (default, 0):
            note(f"--{RATE_FLAGS[part]} has nothing to do here: {part} does not train")
    parts -= {part for part, rate in _own_rates(train_args).items() if rate == 0}
    default = type(train_args).__dataclass_fields__["learning_rate"].default
    if train_args.learning_rate != default and all(_own_rates(train_args).get(part) for part in parts):
        own = ", ".join(f"--{RATE_FLAGS[part]} {_own_rates(train_args)[part]:g}" for part in sorted(parts))
        note(f"--learning_rate has nothing to do here: what trains has a rate of its own ({own})")
    if model_args.post_block and "post_block" not in parts:
        raise UserError(
            f"--post_block {model_args.post_block} puts a new block into the model, but it does not train; add "
            "post_block to --tune"
        )
    if not parts:
        raise UserError("nothing is left to train: what the flags choose is frozen by others, or has learning rate 0")
    if train_args.lora_weight_path and "lora" not in parts:
        raise UserError("--lora_weight_path: no LoRA trains; add --lora_enable True")
    if getattr(train_args, "hadpo_compat", False):
        _check_hadpo(parts, train_args)
    return parts


def _check_hadpo(parts: set[str], train_args: Any) -> None:
    """Refuse what ``--hadpo_compat`` cannot mean."""
    if "lora" not in parts or parts - {"lora", "projector"}:
        raise UserError(
            f"--hadpo_compat True: {', '.join(sorted(parts))} would train, but HA-DPO saves nothing unless a LoRA "
            "(and at most the connector beside it) trains; pass --lora_enable True, or leave --hadpo_compat out"
        )
    if train_args.reference != "auto" and ("projector" in parts or train_args.lora_weight_path):
        raise UserError(
            f"--reference {train_args.reference}: with --hadpo_compat True the reference sees the policy's connector "
            "at every step; pass auto"
        )


def _listed(tune: str) -> set[str]:
    """``--tune a,b``."""
    names = [name.strip() for name in tune.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tune: nothing to train; expected one or more of {', '.join(PARTS)}")
    for name in names:
        if name not in PARTS:
            raise UserError(f"--tune {tune}: no part '{name}'; expected one or more of {', '.join(PARTS)}")
        if names.count(name) > 1:
            raise UserError(f"--tune {tune}: '{name}' is named twice")
    return set(names)


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


def put_lora(model: nn.Module, train_args: Any) -> nn.Module:
    """A new LoRA, or that of ``--lora_weight_path``; dropout is ``--lora_dropout``, whatever it was trained with."""
    if train_args.lora_weight_path is None:
        return add_lora(model, train_args)
    from peft.tuners.lora import LoraLayer

    model = load_adapter(model, Path(train_args.lora_weight_path), trainable=True)
    rate = train_args.lora_dropout
    for settings in model.peft_config.values():
        settings.lora_dropout = rate
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(rate) if rate else nn.Identity()
    return model


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


def table(model: nn.Module, train_args: Any) -> str:
    """Markdown: part, parameters, trained parameters, learning rate."""
    total: dict[str, int] = dict.fromkeys(PARTS, 0)
    trained: dict[str, int] = dict.fromkeys(PARTS, 0)
    rates: dict[str, set[float]] = {part: set() for part in PARTS}
    for name, parameter in model.named_parameters():
        size = full_size(parameter)
        part = part_of(name)
        total[part] += size
        if parameter.requires_grad:
            trained[part] += size
            rates[part].add(rate_of(name, train_args))
    lines = ["| part | parameters | trained | learning rate |", "|---|---:|---:|---:|"]
    for part in PARTS:
        if total[part]:
            rate = " (gate ".join(f"{value:g}" for value in sorted(rates[part])) or "frozen"
            rate += ")" if "(" in rate else ""
            lines.append(f"| {part} | {total[part]:,} | {trained[part]:,} | {rate} |")
    lines.append(f"| all | {sum(total.values()):,} | {sum(trained.values()):,} | |")
    for settings in getattr(model, "peft_config", {}).values():
        r, alpha = settings.r, settings.lora_alpha
        named = settings.target_modules
        leaves = ", ".join(sorted({name.split(".")[-1] for name in ([named] if isinstance(named, str) else named)}))
        lines.append(f"\nLoRA: r {r}, alpha {alpha:g}, scale {alpha / r:g}, on the decoder's {leaves}")
    return "\n".join(lines)
