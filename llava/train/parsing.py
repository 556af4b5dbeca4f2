"""Command line -> arguments: what the flags of several groups mean together, and which have nothing to do."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llava.command_line import OneLineErrors, refuse_unknown
from llava.errors import UserError, note
from llava.files import field as field_of
from llava.files import read_object
from llava.model.builder import local_folder

# What HA-DPO has not, by the value that leaves it out.
NOT_IN_HADPO = {
    "reference_from": "start",
    "loss_type": ["sigmoid"],
    "loss_weights": [1.0],
    "label_smoothing": 0.0,
    "aux_data": None,
    "cache_hidden": None,
    "group_by_image": False,
    "train_sampling_strategy": "random",
}

# Flags that upstream's commands carry and that have no work here.
NOTHING_TO_DO = {
    "lazy_preprocess": "records are always processed when they are needed",
    "is_multimodal": "every model here is multimodal",
    "log_freq": "--logging_steps decides",
    "ignore_bias_buffers": "the models have no bias buffers",
}


class OneLineHfParser(OneLineErrors, HfArgumentParser):
    """Hugging Face's parser of dataclasses, with errors of one line."""


def parse(classes: tuple[type, ...], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Command line -> dataclasses.

    Raises:
        UserError: an unknown flag (with the nearest known one), or values that do not go together.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineHfParser(classes, allow_abbrev=False)
    *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    refuse_unknown(parser, rest)
    # The parser takes dashes for underscores too.
    given = {arg.split("=")[0].removeprefix("--").replace("-", "_") for arg in argv if arg.startswith("--")}
    for flag, reason in NOTHING_TO_DO.items():
        if flag in given:
            note(f"--{flag} has nothing to do here: {reason}")
    _settle_evaluation(parsed, given)
    _settle_idle(parsed, given)
    _settle_adapter(next(args for args in parsed if isinstance(args, TrainingArguments)), given)
    _settle_workers(next(args for args in parsed if isinstance(args, TrainingArguments)), given)
    return tuple(parsed)


def _settle_workers(train_args: TrainingArguments, given: set[str]) -> None:
    """Data workers live on between epochs (with the pictures they remember) unless the flags say otherwise."""
    if train_args.dataloader_num_workers:
        if "dataloader_persistent_workers" not in given:
            train_args.dataloader_persistent_workers = True
        return
    if train_args.dataloader_persistent_workers:
        note("--dataloader_persistent_workers has nothing to do here: --dataloader_num_workers is 0")
        train_args.dataloader_persistent_workers = False


def _settle_idle(parsed: list[Any], given: set[str]) -> None:
    """Flags whose work another flag takes away: a note where nothing else is meant, an error where two contradict."""
    values = {name: value for group in parsed for name, value in vars(group).items()}
    idle = {}
    trains_lora = "lora" in (values["tune"] or "").replace(" ", "").split(",") or values.get("train_type") == "use_lora"
    if not (values["lora_enable"] or trains_lora):
        idle |= dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout"), "--lora_enable is False")
    if values["bits"] != 4:
        idle |= dict.fromkeys(("double_quant", "quant_type"), f"--bits is {values['bits']}")
    if not values.get("aux_data"):
        idle |= {"aux_weight": "there is no --aux_data"}
    if values["eval_data_path"] is None:
        idle |= {"eval_steps": "there is no --eval_data_path"}
    for flag in sorted(given & idle.keys()):
        note(f"--{flag} has nothing to do here: {idle[flag]}")
    if values.get("hadpo_compat"):
        for flag, without in NOT_IN_HADPO.items():
            if values[flag] != without:
                raise UserError(f"--{flag} is not HA-DPO's and would change --hadpo_compat's numbers; leave one out")
    for flag in ("group_by_modality_length", "group_by_image", "upstream_order"):
        if "train_sampling_strategy" in given and values.get(flag):
            chosen_by = "hadpo_compat" if values.get("hadpo_compat") else flag
            raise UserError(f"--train_sampling_strategy and --{chosen_by} True both choose the order; pass one")
    if values["mm_projector_lr"] and values["freeze_mm_mlp_adapter"]:
        raise UserError("--mm_projector_lr is for the connector, which --freeze_mm_mlp_adapter freezes; pass one")


def _settle_adapter(train_args: TrainingArguments, given: set[str]) -> None:
    """``--lora_weight_path`` brings its rank and alpha; flags that say otherwise are refused."""
    if train_args.lora_weight_path is None:
        return
    folder = local_folder(train_args.lora_weight_path, "--lora_weight_path", cache_dir=train_args.cache_dir)
    train_args.lora_weight_path = os.path.abspath(folder)
    source = Path(folder) / "adapter_config.json"
    if not source.is_file():
        raise UserError(
            f"--lora_weight_path {folder}: no {source.name}, so it is no LoRA; pass a whole model as "
            "--model_name_or_path, a connector as --pretrain_mm_mlp_adapter"
        )
    settings = read_object(source)
    for flag, key in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
        own = field_of(str(source), settings, key, (int, float))
        if flag in given and getattr(train_args, flag) != own:
            raise UserError(f"--{flag} {getattr(train_args, flag)}: {source} has {own}; leave --{flag} out")
        setattr(train_args, flag, own)


def _settle_evaluation(parsed: list[Any], given: set[str]) -> None:
    """Held-out data is measured ten times a run unless the flags say when; an evaluation without data is refused."""
    train_args = next(args for args in parsed if isinstance(args, TrainingArguments))
    held_out = next(args.eval_data_path for args in parsed if hasattr(args, "eval_data_path"))
    if held_out is None:
        if train_args.eval_strategy != IntervalStrategy.NO:
            raise UserError(
                f"--eval_strategy {train_args.eval_strategy.value} needs held-out data; pass --eval_data_path"
            )
    elif not {"eval_strategy", "evaluation_strategy"} & given:
        train_args.eval_strategy, train_args.do_eval = IntervalStrategy.STEPS, True
        if "eval_steps" not in given:
            train_args.eval_steps = 0.1


def as_dict(*groups: Any) -> dict[str, Any]:
    """All arguments by name, as JSON can hold them, and the number of processes, which decides what they mean."""
    values: dict[str, Any] = {"world_size": int(os.environ.get("WORLD_SIZE", "1"))}
    for group in groups:
        for f in fields(group):
            value = getattr(group, f.name)
            plain = value is None or isinstance(value, (bool, int, float, str, list, dict))
            values[f.name] = getattr(value, "value", value) if plain else str(getattr(value, "value", value))
    return values
