"""A LoRA in PEFT's own layout, for plain PEFT over Hugging Face's LlavaForConditionalGeneration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.files import read_object, write_json
from llava.model.adapter import load_adapter
from llava.model.builder import skeleton
from llava.model.checkpoint import ADAPTER_WEIGHTS, assign, read_adapter, write_tensors
from llava.model.dialects import PROJECTOR
from llava.model.multimodal_projector.builder import build_vision_projector

CONNECTOR_MODULE = "multi_modal_projector"

# The names of modules, not those of files: PEFT 0.21 converts the names of a LoRA's weights where they are of files,
# and then looks for whole modules (the connector) under names that it has not converted.
_MODULES = {
    f"{PROJECTOR}0.": f"model.{CONNECTOR_MODULE}.linear_1.",
    f"{PROJECTOR}2.": f"model.{CONNECTOR_MODULE}.linear_2.",
    "model.layers.": "model.language_model.layers.",
}


def module_name(name: str) -> str:
    """A weight or module in ``LlavaForConditionalGeneration`` of transformers 4.52 and newer."""
    prefix = next((prefix for prefix in _MODULES if name.startswith(prefix)), "")
    return _MODULES.get(prefix, "") + name.removeprefix(prefix)


def write_adapter(adapter: Path, config: dict[str, Any], folder: Path) -> None:
    """Write the LoRA in ``adapter`` (and the connector with it) to ``folder``, for a base of ``config``.

    Raises:
        UserError: it is of a kind, or brings a part, for which there is no place, or does not fit ``config``.
    """
    settings = read_object(adapter / "adapter_config.json")
    lora, others = read_adapter(adapter)
    strange = [name for name in others if not name.startswith(PROJECTOR)]
    strange += [name for name in lora if not re.match(r"model\.layers\..*\.lora_[AB]\.weight$", name)]
    if strange:
        raise UserError(
            f"--no_merge: {adapter} brings {strange[0]}, and only LoRA weights of the language model and the connector "
            "can be written by themselves; leave out --no_merge"
        )
    model = skeleton(config)
    if model.model.mm_projector is None:  # config does not know the tower's shape, which a LoRA has no part in
        model.model.mm_projector = build_vision_projector(model.config)
    assign(model, others, adapter)
    load_adapter(model, adapter)
    modules = {name.rsplit(".lora_", 1)[0] for name in lora}
    inside = {re.sub(r"^model\.layers\.\d+\.", "", name) for name in modules}
    leaves = "|".join(sorted({name.rsplit(".", 1)[-1] for name in inside}))
    everywhere = modules == {
        f"model.layers.{layer}.{name}" for layer in range(model.config.num_hidden_layers) for name in inside
    }
    settings.update(
        # Where the base lies in Hugging Face's format is not known here. By the name of LLaVA's, transformers would
        # build a model of its own defaults, which have 7 billion weights.
        base_model_name_or_path=None,
        # Leaf names alone would also match the vision tower's.
        target_modules=rf".*language_model.*\.({leaves})" if everywhere else sorted(map(module_name, modules)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=[CONNECTOR_MODULE] if others else None,
    )
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key):
            settings[key] = {module_name(name): value for name, value in settings[key].items()}
    state = {f"base_model.model.{module_name(name)}": value for name, value in {**lora, **others}.items()}
    write_json(folder / "adapter_config.json", settings)
    write_tensors(folder / ADAPTER_WEIGHTS[0], state)
