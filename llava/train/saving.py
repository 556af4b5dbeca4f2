"""What a run leaves behind: a folder that loads again, in upstream's file names, whatever was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from llava.files import write_json
from llava.model.adapter import fill_adapter
from llava.model.checkpoint import (
    ADAPTER_WEIGHTS,
    CONNECTOR,
    DELTA,
    NON_LORA,
    assign,
    first_of,
    gather_state,
    read_adapter,
    read_connector,
    read_model_weights,
    read_tensors,
    write_model_weights,
    write_tensors,
)
from llava.model.delta import DELTA_CARD, saves_delta
from llava.model.dialects import State, original_names, runtime_names
from llava.train.trainable import part_of

PEFT_PREFIX = "base_model.model."


def bare_model(model: nn.Module) -> Any:
    """The LLaVA inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save_checkpoint(
    model: nn.Module,
    parts: set[str],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    writer: bool = True,
) -> None:
    """Write what trained, with config, tokenizer and image processor.

    =====================  ==========================================================================
    trained                files (those of LLaVA and HA-DPO; ``load_pretrained_model`` reads each)
    =====================  ==========================================================================
    LoRA                   adapter_model.safetensors, adapter_config.json, non_lora_trainables.bin
    connector only         mm_projector.bin
    backbone, tower        model.safetensors (in shards where large), everything included
    anything else          delta.safetensors
    =====================  ==========================================================================

    All but a whole model come with ``delta.json``: what they stand on. A tensor that does not train is written too
    where nothing below holds it (a new connector). Every rank calls it (ZeRO-3 gathers from all); only the ``writer``
    touches the disk.
    """
    inner = bare_model(model)
    whole = not saves_delta(parts)
    brought = inner.stands_on.brought
    state = gather_state(
        model, lambda name, p: whole or p.requires_grad or name.removeprefix(PEFT_PREFIX) in brought, keep=writer
    )
    if not writer:
        return
    folder.mkdir(parents=True, exist_ok=True)
    held = {part_of(name) for name in state}
    if whole:
        written = write_model_weights(folder, original_names(state))
    else:
        if "lora" in parts:
            written = _save_adapter(model, state, folder)
        else:
            written = [CONNECTOR[0] if held == {"projector"} else DELTA]
            write_tensors(folder / written[0], state)
        write_json(folder / DELTA_CARD, {**inner.stands_on.card, "parts": sorted(held)})
        written.append(DELTA_CARD)
    # What an earlier run left in the folder under other names would be loaded instead.
    ours = (
        *ADAPTER_WEIGHTS,
        "adapter_config.json",
        *NON_LORA,
        *CONNECTOR,
        DELTA,
        DELTA_CARD,
        "model*.safetensors*",
        "pytorch_model*.bin*",
    )
    for stale in {path for pattern in ours for path in folder.glob(pattern)} - {folder / name for name in written}:
        stale.unlink()
    write_config(inner, folder)
    generation = inner.generation_config.to_dict()
    write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def _save_adapter(model: Any, state: State, folder: Path) -> list[str]:
    from peft import get_peft_model_state_dict

    adapter = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    write_tensors(folder / ADAPTER_WEIGHTS[0], adapter)
    settings = {k: _plain(v) for k, v in model.peft_config["default"].to_dict().items()}
    write_json(folder / "adapter_config.json", {**settings, "inference_mode": True})
    # Upstream's loader asks for this file even where nothing but the LoRA trained.
    others = {name: value for name, value in state.items() if part_of(name) != "lora"}
    write_tensors(folder / NON_LORA[0], others)
    return [ADAPTER_WEIGHTS[0], "adapter_config.json", NON_LORA[0]]


def _plain(value: Any) -> Any:
    value = sorted(value) if isinstance(value, set) else value
    return getattr(value, "value", value)


def write_config(model: Any, folder: Path) -> None:
    """``config.json`` that upstream's code and ours read: the original format with the ``mm_*`` fields."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    write_json(folder / "config.json", {**config, "architectures": [type(model).__name__]})


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put back into ``model`` what ``save_checkpoint`` wrote for it (to go on training)."""
    if first_of(folder, ADAPTER_WEIGHTS):
        lora, others = read_adapter(folder)
        fill_adapter(model, lora, folder)
        assign(bare_model(model), others, folder)
        return
    connector, delta = first_of(folder, CONNECTOR), folder / DELTA
    if connector is not None:
        state = read_connector(connector)
    else:
        state = runtime_names(read_tensors(delta)) if delta.is_file() else read_model_weights(folder)
    assign(model, state, folder)
