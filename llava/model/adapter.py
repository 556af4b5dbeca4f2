"""A LoRA from files onto a model, whichever program wrote it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.files import field, read_object
from llava.model.checkpoint import assign, read_adapter
from llava.model.dialects import State, lora_name, runtime_name

# LoRA belongs to the language model. Bare target names would also match the tower's q/k/v_proj.
LORA_EXCLUDED = r".*(vision_tower|mm_projector|post_block).*"


def load_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """``model`` with the LoRA in ``folder`` on it; the tensors that come with a LoRA must be in the model already.

    It goes on exactly the modules that it has weights for. The files' names may be those of any dialect, and under
    ZeRO-3 the weights get to where they were partitioned to.

    Raises:
        UserError: no LoRA, of a kind that is not known, or one that was trained on another model.
    """
    from peft import get_peft_model

    weights, _ = read_adapter(folder)
    settings = _adapter_settings(model, folder, {name.rsplit(".lora_", 1)[0] for name in weights})
    settings.inference_mode = not trainable
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
        model = get_peft_model(model, settings)
    fill_adapter(model, weights, folder)
    return model


def fill_adapter(model: Any, weights: State, folder: Path) -> None:
    """Put a LoRA's ``weights`` into a model that has one of the same shape.

    Raises:
        UserError: some are missing, too many, or of another shape.
    """
    names = {lora_name(name): name for name, _ in model.named_parameters() if "lora_" in name}
    another = "the adapter was trained on another model"
    missing = sorted(names.keys() - weights.keys())
    if missing:
        raise UserError(f"{folder}: {len(missing)} LoRA weights are missing, first: {missing[0]}; {another}")
    try:
        assign(model, {names.get(name, name): value for name, value in weights.items()}, folder)
    except UserError as error:
        raise UserError(f"{error}; {another}") from None


# What PEFT can do to a LoRA beyond what its weights say and this loader gives them back to.
_UNKNOWN_TO_LOADER = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)

# Of adapter_config.json what PEFT would take in any other kind, and fail on later.
_ADAPTER_KINDS: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "rank_pattern": dict,
    "alpha_pattern": dict,
}


def _adapter_settings(model: Any, folder: Path, modules: set[str]) -> Any:
    """``adapter_config.json`` for a LoRA on the ``modules`` of ``model``."""
    from peft import LoraConfig

    file = folder / "adapter_config.json"
    given = read_object(file)
    if (kind := given.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{file}: peft_type {kind} cannot be loaded; expected LORA")
    unknown = [key for key in _UNKNOWN_TO_LOADER if given.get(key)]
    if (init := given.get("init_lora_weights", True)) not in (True, False, "gaussian", "orthogonal"):
        unknown.append(f"init_lora_weights {init}")  # changes the base's weights too
    if unknown:
        raise UserError(f"{file}: {', '.join(unknown)} cannot be loaded; merge the adapter where it was trained")
    absent = sorted(modules - {name for name, _ in model.named_modules()})
    if absent:
        raise UserError(
            f"{folder}: a LoRA on {len(absent)} modules that the model has not, first: {absent[0]}; the adapter was "
            "trained on another model"
        )
    for key, kind in _ADAPTER_KINDS.items():
        if given.get(key) is not None:
            field(str(file), given, key, kind)
    patterns = {
        key: {runtime_name(name): value for name, value in (given.get(key) or {}).items()}
        for key in ("rank_pattern", "alpha_pattern")
    }
    for pattern in {name for names in patterns.values() for name in names}:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules):
            raise UserError(f"{file}: pattern {pattern} fits none of the modules that have LoRA weights")
    leaves = sorted({name.rsplit(".", 1)[-1] for name in modules})
    plain = modules == {
        name
        for name, _ in model.named_modules()
        if name.rsplit(".", 1)[-1] in leaves and not re.fullmatch(LORA_EXCLUDED, name)
    }
    settings = {key: value for key, value in given.items() if key in LoraConfig.__dataclass_fields__}
    settings.update(
        target_modules=leaves if plain else sorted(modules),
        exclude_modules=LORA_EXCLUDED if plain else None,
        # Whole tensors that came with it are in the model already.
        modules_to_save=None,
        bias="none",
        layers_to_transform=None,
        layers_pattern=None,
        **patterns,
    )
    # Of a key that says null, PEFT's default, as where the key is missing.
    defaults = {key for key in ("r", "lora_alpha", "lora_dropout") if settings.get(key) is None}
    return LoraConfig(**{key: value for key, value in settings.items() if key not in defaults})
