"""Names of weights in other programs' files.

============================  ===============================  =======================================
in the program (and LLaVA's)  Hugging Face's files             Hugging Face's modules (transformers 5)
============================  ===============================  =======================================
model.layers.N.*, ...         language_model.model.layers.N.*  model.language_model.layers.N.*
lm_head.weight                language_model.lm_head.weight    lm_head.weight
model.mm_projector.{0,2}.*    multi_modal_projector.linear_*   model.multi_modal_projector.linear_*
model.vision_tower.           vision_tower.vision_model.*      model.vision_tower.*
vision_tower.*
============================  ===============================  =======================================

LLaVA's own files have ``vision_model.`` once more behind the tower, and none of the tower where it lies elsewhere.
Whatever wrapped a model when it was saved (PEFT, DDP, ``torch.compile``) is in front of these names.
"""

from __future__ import annotations

import re

from torch import Tensor

State = dict[str, Tensor]

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
POST_BLOCK = "post_block."
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"

# Buffers that old checkpoints carry and today's modules compute; what PEFT keeps of a module that it trained whole.
_DROPPED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$|\.original_module\.")

# ``base_model.model.`` is PEFT's; LLaVA's loader takes one ``model.`` of a doubled one off as well.
_WRAPPED = re.compile(
    r"^(?:module\.|_orig_mod\.)*(?:base_model\.(?:model\.)?)?(?:module\.|_orig_mod\.)*"
    r"(?:model\.(?=(?:model|lm_head|post_block)\.))?"
)
_SAVED_BY_PEFT = re.compile(r"\.(?:modules_to_save\.default|modules_to_save|base_layer)(?=\.)")

# Each name takes the first line that fits. What fits none is a name of the program already.
_TO_RUNTIME = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", TOWER),
        (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
        (r"^(?:model\.)?language_model\.(?:model\.)?", "model."),
        (r"^(?:model\.)?multi_modal_projector\.linear_1\.", f"{PROJECTOR}0."),
        (r"^(?:model\.)?multi_modal_projector\.linear_2\.", f"{PROJECTOR}2."),
        (r"^mm_projector\.", PROJECTOR),
    )
]

_TO_HUGGINGFACE = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"^{re.escape(TOWER)}", "vision_tower.vision_model."),
        (rf"^{re.escape(PROJECTOR)}0\.", "multi_modal_projector.linear_1."),
        (rf"^{re.escape(PROJECTOR)}2\.", "multi_modal_projector.linear_2."),
        (r"^model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    )
]

_TO_ORIGINAL = [
    (re.compile(rf"^{re.escape(TOWER)}"), f"{TOWER}vision_model."),
    (re.compile(rf"^{re.escape(POST_BLOCK)}"), f"model.{POST_BLOCK}"),
]


def _renamed(name: str, table: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in table:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name


def runtime_name(name: str) -> str:
    """The program's name of a weight that a file calls ``name``."""
    return _renamed(_SAVED_BY_PEFT.sub("", _WRAPPED.sub("", name, count=1)), _TO_RUNTIME)


def lora_name(name: str) -> str:
    """The program's name of a LoRA weight, without the adapter's own name in it, as PEFT's files have it."""
    return re.sub(r"\.default(?=\.|$)", "", re.sub(r"(lora_magnitude_vector)$", r"\1.weight", runtime_name(name)))


def runtime_names(state: State) -> State:
    """Names in files -> names in the program; computed buffers are dropped."""
    return {runtime_name(name): value for name, value in state.items() if not _DROPPED.search(name)}


def original_names(state: State) -> State:
    """Names in the program -> names that LLaVA's own code reads."""
    return {_renamed(name, _TO_ORIGINAL): value for name, value in state.items()}


def huggingface_names(state: State) -> State:
    """Names in the program -> names in the files of ``LlavaForConditionalGeneration`` (every version reads these)."""
    return {_renamed(name, _TO_HUGGINGFACE): value for name, value in state.items()}
