"""Write a LLaVA for other programs: Hugging Face's LlavaForConditionalGeneration, or LLaVA's original format.

    python -m llava.model.export --to hf --model-path checkpoints/ha-dpo --model-base liuhaotian/llava-v1.5-7b \
        --out checkpoints/ha-dpo-hf

Deltas are put over what they stand on and a LoRA is folded in (W + scale * B @ A in float32, rounded to W's dtype).
Weights keep the bits they have on disk; what a delta or an outside vision tower brings is written in the dtype that the
whole model has there, so that a file of one dtype stays one. ``--to original`` gives back the weights and the settings
that ``--to hf`` was given.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from transformers import LlamaConfig, PreTrainedTokenizerBase, Qwen2Config

from llava.command_line import OneLineParser, quiet
from llava.conversation import template
from llava.errors import UserError, command_line, note
from llava.files import atomic_folder, leftovers, read_object, write_json
from llava.model.builder import (
    FAMILIES,
    FILE_KEYS,
    check_weights,
    generation_settings,
    load_image_processor,
    local_folder,
    model_settings,
    settle_head,
    skeleton,
)
from llava.model.chat_template import chat_template, turn_opening
from llava.model.checkpoint import SHARD, has_weights, read_tower_weights, write_model_weights
from llava.model.delta import Chain, read_chain
from llava.model.dialects import EMBEDDINGS, HEAD, TOWER, State, huggingface_names, original_names
from llava.model.hf_adapter import write_adapter
from llava.model.hf_tokenizer import save_for_huggingface, save_for_llava
from llava.model.huggingface import (
    LANGUAGE_MODELS,
    PREPROCESSOR,
    PROCESSOR,
    is_huggingface,
    rope_of_every_version,
    rope_settings,
)
from llava.tokenization import load_tokenizer

# Embeddings are in rows of a multiple of this, as in llava-hf's files.
ROWS = 64

# The tower of all released LLaVA-1.5, which a config of Hugging Face's does not name.
CLIP_L_336 = "openai/clip-vit-large-patch14-336"
CLIP_L_336_SHAPE = {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}

DEFAULT_TEMPLATES = {"llama": "llava_v1", "qwen2": "qwen"}
SELECT_FEATURES = {"patch": "default", "cls_patch": "full"}


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        "python -m llava.model.export", description="Write a LLaVA for other programs.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--to", required=True, choices=["hf", "original"], help="hf: transformers, vLLM; original: LLaVA, HA-DPO")
    add("--model-path", required=True, help="a whole model, a delta, or several in order: A,B")
    add("--model-base", help="where the model lies that the first delta was trained on")
    add("--out", required=True, help="the folder to write; it must not exist, or be empty")
    add("--conv-mode", help="the conversation of the chat template (default: llava_v1; qwen for Qwen2)")
    add("--no_merge", action="store_true", help="with --to hf: write the LoRA on top by itself, for plain PEFT")
    add("--max_shard_size", help=f"weights beyond this are written in several files (default: {SHARD})")
    add("--cache_dir", help="the hub's cache")
    return parser.parse()


@dataclass
class Source:
    """What is exported, by the program's names; ``config`` is flat, as in the original format."""

    config: dict[str, Any]
    state: State
    dtype: torch.dtype
    released_tower: bool  # the tower is, bit for bit, the one that mm_vision_tower names
    tokenizer: PreTrainedTokenizerBase
    preprocessor: dict[str, Any]
    generation: dict[str, Any]

    @property
    def language_model(self) -> str:
        """``model_type`` of the language model."""
        family = FAMILIES[self.config["model_type"]][0].model_type
        return next(name for name, ours in LANGUAGE_MODELS.items() if ours == family)


def read_source(chain: Chain, out: Path) -> Source:
    """Everything of a model that is to be written to ``out``, weights in the dtypes in which they are written.

    Raises:
        UserError: something of it cannot be read.
    """
    config, tower = chain.configured()
    root = chain.root().state()
    state = chain.state(root=root)
    on_disk = {name: value.dtype for name, value in root.items()}
    dtype = on_disk[EMBEDDINGS]
    outside = tower is not None and not any(name.startswith(TOWER) for name in state)
    if outside:
        state = {**state, **read_tower_weights(tower)}
    check_weights(skeleton(config), state, chain.file_of)
    state = {name: value.to(on_disk.get(name, dtype)) for name, value in state.items()}
    named = tower
    if is_huggingface(read_object(chain.root_folder / "config.json")):
        config["mm_vision_tower"] = config.get("mm_vision_tower") or _usual_tower(config)
        named = _named_tower(config["mm_vision_tower"], chain)
        outside = named is not None and _is_in(named, state)
    if named is not None:
        config["mm_vision_tower"] = lasting_name(config["mm_vision_tower"], named, out)
    config, state = settle_head(config, state)
    rope = config.pop("rope_parameters", None)  # transformers 5's, which 4 does not know
    return Source(
        config=rope_of_every_version({**config, **(rope_settings(dict(rope)) if rope else {})}),
        state=state,
        dtype=dtype,
        released_tower=outside,
        tokenizer=load_tokenizer(chain.folder_with("tokenizer_config.json"), config.get("vocab_size")),
        preprocessor=load_image_processor(*chain.folders, tower).to_dict(),
        generation={"do_sample": False, **generation_settings(chain.source, model_settings(config))},
    )


def _usual_tower(config: dict[str, Any]) -> str | None:
    """The tower that a config of Hugging Face's does not name, told by its shape."""
    shape = config["mm_vision_config"]
    return CLIP_L_336 if all(shape.get(key) == value for key, value in CLIP_L_336_SHAPE.items()) else None


def lasting_name(name: str, tower: Path, out: Path) -> str:
    """``mm_vision_tower`` as it leads to the folder ``tower`` from ``out`` too, wherever that is read."""
    if tower.parent.name == "snapshots":  # the name is a hub id
        return name
    near = next((place for place in (out / name, out.parent / name) if place.is_dir()), None)
    return name if near is not None and near.samefile(tower) else os.path.abspath(tower)


def _named_tower(name: str | None, chain: Chain) -> Path | None:
    """The folder of the tower ``name``, where it is on this machine."""
    try:
        folder = local_folder(name or "", "mm_vision_tower", chain.folders, chain.cache_dir, fetch=False)
    except UserError:
        return None
    return folder if has_weights(folder) else None


def _is_in(tower: Path, state: State) -> bool:
    """Whether ``state`` has the tower in the folder ``tower``, bit for bit."""
    named = read_tower_weights(tower)
    return all(key in state and torch.equal(value.to(state[key].dtype), state[key]) for key, value in named.items())


def _extra_rows(state: State, rows: int) -> State:
    """Embeddings and head with ``rows`` rows; new ones are the mean of the old."""
    grown = dict(state)
    for name in (EMBEDDINGS, HEAD):
        if name in state:
            weight = state[name]
            # A mean logit is never the largest: greedy text stays what it is.
            mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
            grown[name] = torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])
    return grown


def refuse_inexpressible(config: dict[str, Any], where: str) -> None:
    """What LlavaForConditionalGeneration has no place for.

    Raises:
        UserError: with the setting.
    """
    connector = config.get("mm_projector_type") or "linear"
    feature = config.get("mm_vision_select_feature") or "patch"
    found = {
        f"a connector of type {connector} (it has mlp2x_gelu)": connector != "mlp2x_gelu",
        "a post block": bool(config.get("post_block")),
        "mm_use_im_start_end": bool(config.get("mm_use_im_start_end")),
        f"mm_vision_select_feature {feature}": feature not in SELECT_FEATURES,
    }
    for what, present in found.items():
        if present:
            raise UserError(f"{where}: Hugging Face's LLaVA has no place for {what}; pass --to original")


def write_huggingface(source: Source, folder: Path, conv_mode: str, max_shard_size: str) -> None:
    """A ``LlavaForConditionalGeneration`` with processor, tokenizer and chat template.

    The vocabulary grows by ``<image>`` and ``<pad>`` where there is no room, in rows of a multiple of 64.
    """
    config, conversation = source.config, template(conv_mode, "--conv-mode")
    jinja = chat_template(conversation, conv_mode)
    image_id, pad_id = save_for_huggingface(source.tokenizer, folder, jinja, turn_opening(conversation))
    rows, needed = source.state[EMBEDDINGS].shape[0], max(image_id, pad_id) + 1
    state = source.state
    if needed > rows:
        state = _extra_rows(state, -(-needed // ROWS) * ROWS)

    text_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[source.language_model]
    text_keys = {*text_class().to_dict(), "rope_theta", "rope_scaling"} - FILE_KEYS
    text = {key: value for key, value in config.items() if key in text_keys}
    shape = config["mm_vision_config"]
    # max_length is a setting of generation, and is in its file.
    left_out = {*text_keys, *FILE_KEYS, "mm_vision_config", "post_block", "max_length"}
    strategy = SELECT_FEATURES[config.get("mm_vision_select_feature") or "patch"]
    patches = (shape["image_size"] // shape["patch_size"]) ** 2
    layer = config.get("mm_vision_select_layer")
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": image_id,
            "pad_token_id": pad_id,
            "ignore_index": -100,
            "image_seq_length": patches + (strategy == "full"),
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1 if layer is None else layer,
            "vision_feature_select_strategy": strategy,
            "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
            "torch_dtype": _dtype_name(source.dtype),
            "text_config": {
                **text,
                "architectures": [text_class.model_type.capitalize() + "ForCausalLM"],
                "model_type": source.language_model,
                "pad_token_id": pad_id,
                "torch_dtype": _dtype_name(source.dtype),
                "vocab_size": state[EMBEDDINGS].shape[0],
            },
            "vision_config": {**shape, "model_type": "clip_vision_model", "torch_dtype": _dtype_name(source.dtype)},
            # So that --to original gives back what was there.
            **{key: value for key, value in config.items() if key not in left_out},
        },
    )
    padded = config.get("image_aspect_ratio") == "pad"
    preprocessor = {**source.preprocessor, "image_processor_type": "CLIPImageProcessor"}
    if padded:
        preprocessor.update(image_processor_type="LlavaImageProcessor", do_pad=True)
    write_json(folder / PREPROCESSOR, {**preprocessor, "processor_class": "LlavaProcessor"})
    write_json(
        folder / PROCESSOR,
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,  # CLIP's class token
            "patch_size": shape["patch_size"],
            "vision_feature_select_strategy": strategy,
        },
    )
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    write_json(folder / "generation_config.json", {**source.generation, "pad_token_id": pad_id})
    write_model_weights(folder, huggingface_names(state), max_shard_size)


def write_original(source: Source, folder: Path, max_shard_size: str) -> None:
    """A folder that LLaVA's and HA-DPO's own loaders read, and ours.

    The tower is left out, as in the released models, where ``mm_vision_tower`` names the same one.
    """
    state, config = source.state, {key: value for key, value in source.config.items() if key not in FILE_KEYS}
    if source.released_tower:
        state = {name: value for name, value in state.items() if not name.startswith(TOWER)}
        config.pop("mm_vision_config", None)
    else:
        config["unfreeze_mm_vision_tower"] = True  # or LLaVA's loader takes the tower that mm_vision_tower names
    if not config.get("mm_vision_tower"):
        note("mm_vision_tower is not known, which LLaVA's own loader wants: write the CLIP's name into config.json")
    config_class, model_class = FAMILIES[source.config["model_type"]]
    write_json(
        folder / "config.json",
        {
            **config,
            "architectures": [model_class.__name__],
            "model_type": config_class.model_type,
            "torch_dtype": _dtype_name(source.dtype),
        },
    )
    write_json(folder / PREPROCESSOR, {**source.preprocessor, "image_processor_type": "CLIPImageProcessor"})
    write_json(folder / "generation_config.json", source.generation)
    source.tokenizer.padding_side = config.get("tokenizer_padding_side") or "right"
    save_for_llava(source.tokenizer, folder)
    write_model_weights(folder, original_names(state), max_shard_size)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def free_folder(name: str) -> Path:
    """Where ``--out`` is to be.

    Raises:
        UserError: something is there already, or the place cannot be written to.
    """
    out = Path(name).expanduser()
    if out.is_symlink() or out.name in ("", ".."):
        out = out.resolve()  # what is written beside it gets its name
    try:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out {name}: the folder is not empty; pass a new one")
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {name}: is a file; pass a new folder")
        if os.path.ismount(out):
            raise UserError(f"--out {name}: is a mount point, which cannot be renamed; pass a new folder inside it")
        above = next(place for place in out.absolute().parents if place.exists())
        os.rmdir(tempfile.mkdtemp(dir=above, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"--out {name}: cannot be written ({error.strerror})") from None
    for folder in leftovers(out):
        note(f"{folder}: left by an export that was killed, if none is running; delete it")
    return out


def write_whole(out: Path, needed: int, write: Callable[[Path], None]) -> None:
    """``out``, filled by ``write``: whole or not at all. ``needed`` bytes must be free.

    Raises:
        UserError: no space, or no leave to write there.
    """
    above = next(place for place in out.absolute().parents if place.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise UserError(f"--out {out}: needs {size(needed)}, but {size(free)} are free; pass a folder on another disk")
    try:
        with atomic_folder(out) as folder:
            write(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _check_flags(args: argparse.Namespace) -> None:
    if args.to == "original" and (args.conv_mode or args.no_merge):
        flag = "--conv-mode" if args.conv_mode else "--no_merge"
        raise UserError(f"{flag} is for --to hf; leave it out, or pass --to hf")
    if args.no_merge and args.conv_mode:
        raise UserError("--conv-mode: an adapter has no chat template; leave it out")
    if args.no_merge and args.max_shard_size:
        raise UserError("--max_shard_size: an adapter is written in one file; leave it out")
    if args.conv_mode:
        chat_template(template(args.conv_mode, "--conv-mode"), args.conv_mode)
    check_shard_size(args.max_shard_size)


def check_shard_size(given: str | None) -> None:
    """Raise ``UserError`` for a ``--max_shard_size`` that is no size."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=given or SHARD)
        positive = given is None or float(given.strip()[:-2]) > 0
    except ValueError:
        positive = False
    if not positive:
        raise UserError(f"--max_shard_size {given}: expected a size such as 5GB or 500MB")


def _below(chain: Chain) -> str:
    """What a LoRA on top of ``chain`` lies over, by a name that leads to it.

    Raises:
        UserError: no LoRA, or a language model below, which sees no pictures.
    """
    adapter = chain.adapter
    if adapter is None:
        raise UserError(f"--no_merge: {chain.newest} is no LoRA; leave it out")
    below = chain.below()
    if below.blank:
        raise UserError(f"--no_merge: {adapter} lies over a language model, which is no LLaVA; leave out --no_merge")
    return below.name


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    print("interrupted; nothing was written", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end in one line and leave nothing half-written."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@command_line
def main() -> None:
    args = parse_args()
    _check_flags(args)
    out = free_folder(args.out)
    quiet()
    with interruptible():
        export(args, out)


def export(args: argparse.Namespace, out: Path) -> None:
    """Write what the flags name to ``out``."""
    chain = read_chain(args.model_path, "--model-path", args.cache_dir, args.model_base)
    shard = args.max_shard_size or SHARD
    if args.to == "hf":
        refuse_inexpressible(chain.config(), f"--model-path {args.model_path}")
    if args.no_merge:
        base = _below(chain)
        write_whole(out, 0, lambda folder: write_adapter(chain.adapter, chain.config(), folder))
        what, load = "a LoRA", f"PeftModel.from_pretrained(model, {str(out)!r}) over what --to hf makes of {base}"
    else:
        source = read_source(chain, out)
        needed, what = sum(value.nbytes for value in source.state.values()), _dtype_name(source.dtype)
        if args.to == "hf":
            conv_mode = args.conv_mode or DEFAULT_TEMPLATES[source.language_model]
            write_whole(out, needed, lambda folder: write_huggingface(source, folder, conv_mode, shard))
            load = f"LlavaForConditionalGeneration.from_pretrained({str(out)!r})"
        else:
            write_whole(out, needed, lambda folder: write_original(source, folder, shard))
            load = f"load_pretrained_model({str(out)!r}, None)"
            if "llava" not in out.name.lower():
                note(f"LLaVA's own loader takes a folder for a LLaVA by 'llava' in its name, which {out.name} has not")
    written = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size(written)}, {what}; load it with {load}", flush=True)


if __name__ == "__main__":
    main()
