"""Folders in Hugging Face's format (``LlavaForConditionalGeneration``), read as LLaVA's own.

Their weights have other names (``dialects``), their ``config.json`` keeps the two models' sizes in ``text_config`` and
``vision_config``, and a Llama's vocabulary is longer there: ``<image>``, ``<pad>`` and padding up to a multiple of 64.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.llava import LlavaConfig

from llava.errors import UserError
from llava.files import field, read_object
from llava.model.dialects import EMBEDDINGS, HEAD, State
from llava.tokenization import HUGGINGFACE_TOKENS, added_tokens, vocabulary_size

LANGUAGE_MODELS = {"llama": "llava_llama", "qwen2": "llava_qwen2"}

# What decides a tower's arithmetic.
CLIP_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # transformers 5 keeps the image processor in it

# The original's keys that a folder in this format may carry.
_CARRIED = re.compile(r"mm_|use_mm_|tune_|freeze_|unfreeze_|tokenizer_|image_aspect_ratio$|max_sequence_length$")
# transformers has no rows of its own to add beyond <image>, <pad> and the rest of a block of 64.
_ADDED = 2 + 64

_FEATURES = {"default": "patch", "full": "cls_patch"}


def is_huggingface(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a model of several models."""
    return "text_config" in config


def original_config(config: dict[str, Any], folder: Path, flag: str) -> dict[str, Any]:
    """``config.json`` of ``LlavaForConditionalGeneration`` in the original format; ``image_aspect_ratio`` where known.

    What the file leaves out is transformers' default for it, as in its own classes.

    Raises:
        UserError: another kind of model, or one that the original format cannot describe.
    """
    where = f"{flag} {folder}"
    _check_kind(config, where)
    if config.get("pad_token_id") is not None:
        field(str(folder / "config.json"), config, "pad_token_id", int)
    try:
        parsed = LlavaConfig.from_dict(config)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'}: {' '.join(str(error).split())}; download it again") from None
    text, vision = parsed.text_config, parsed.vision_config
    layer = parsed.vision_feature_layer
    for wrong, found, expected in (
        (isinstance(layer, list), f"vision_feature_layer {layer}", "one layer"),
        (parsed.projector_hidden_act != "gelu", f"projector_hidden_act {parsed.projector_hidden_act}", "gelu"),
        (not parsed.multimodal_projector_bias, "multimodal_projector_bias false", "true"),
    ):
        if wrong:
            raise UserError(f"{where}: {found} cannot be loaded; expected {expected}, as in LLaVA-1.5")
    own = {f.name for f in dataclasses.fields(text)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    flat = {name: getattr(text, name) for name in sorted(own - {"rope_parameters"})}
    rows = real_rows(parsed, folder)
    return {
        **{key: value for key, value in config.items() if _CARRIED.match(key)},
        **flat,
        **rope_settings(dict(text.rope_parameters)),
        "vocab_size": rows,
        "pad_token_id": _pad(config, text, rows),
        "tie_word_embeddings": parsed.tie_word_embeddings,
        "model_type": LANGUAGE_MODELS[text.model_type],
        "mm_vision_config": {key: getattr(vision, key) for key in CLIP_SHAPE},
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": _FEATURES[parsed.vision_feature_select_strategy],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        **_aspect(config, folder),
    }


def _check_kind(config: dict[str, Any], where: str) -> None:
    kind = config.get("model_type")
    if kind == "clip":
        raise UserError(f"{where} is a CLIP, a vision tower; pass it as --vision_tower, and a LLaVA here")
    if kind in ("llava_next", "llava_next_video", "llava_onevision"):
        raise UserError(f"{where}: a LLaVA-1.6 ({kind}, anyres) checkpoint cannot be loaded; expected LLaVA-1.5")
    if kind != "llava":
        raise UserError(f"{where}: model_type '{kind}' cannot be loaded; expected llava (LLaVA-1.5)")
    inner = (("text_config", "llama", LANGUAGE_MODELS), ("vision_config", "clip_vision_model", ("clip_vision_model",)))
    for name, default, known in inner:
        found = (config.get(name) or {}).get("model_type", default)
        if found not in known:
            raise UserError(f"{where}: {name} has model_type '{found}'; expected {' or '.join(known)}")


def real_rows(config: LlavaConfig, folder: Path) -> int:
    """Rows of the embeddings that belong to the language model; those behind them are ``<image>``, ``<pad>``, noise.

    Where the tokenizer has other tokens behind ``image_token_index``, or its pieces end elsewhere, all rows do.
    """
    rows, first = config.text_config.vocab_size, config.image_token_index
    if config.text_config.model_type != "llama" or not 0 < rows - first <= _ADDED or vocabulary_size(folder) != first:
        return rows
    others = {token for token, (index, _) in added_tokens(folder).items() if index >= first} - {*HUGGINGFACE_TOKENS}
    return rows if others else first


def cut_rows(state: State, rows: int) -> State:
    """``state`` without the rows of embeddings and head behind the first ``rows``."""
    return {key: value[:rows] if key in (EMBEDDINGS, HEAD) else value for key, value in state.items()}


def rope_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's ``rope_parameters`` as ``rope_theta`` and ``rope_scaling``, which every version reads."""
    theta = settings.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if settings.get("rope_type") == "default" else settings}


def rope_of_every_version(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with ``rope_scaling`` as transformers 4.31 wants it too: of two keys, or none."""
    scaling = dict(config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("linear", "dynamic"):
        scaling = {"type": kind, "factor": scaling.get("factor")}
    config = {**config, "rope_scaling": None if kind == "default" else scaling} if scaling else config
    return {"rope_theta": theta, **config} if theta is not None else config


def _pad(config: dict[str, Any], text: PreTrainedConfig, rows: int) -> int | None:
    """The first pad id that has a row; a Llama's ``<pad>`` has none, and LLaVA pads with ``<unk>``."""
    found = (config.get("pad_token_id"), text.pad_token_id, 0 if text.model_type == "llama" else None)
    return next((id_ for id_ in found if id_ is not None and 0 <= id_ < rows), None)


def _aspect(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """``image_aspect_ratio`` where the config or the image processor says it."""
    said = config.get("image_aspect_ratio")
    if said is None and (image_settings(folder) or {}).get("do_pad"):
        said = "pad"
    return {"image_aspect_ratio": said} if said else {}


def image_settings(folder: Path) -> dict[str, Any] | None:
    """A folder's image processor as it is on disk; None where there is none."""
    if (folder / PREPROCESSOR).is_file():
        return read_object(folder / PREPROCESSOR)
    if (folder / PROCESSOR).is_file():
        found = read_object(folder / PROCESSOR).get("image_processor")
        return found if isinstance(found, dict) else None
    return None
