"""Weights in and out of files.

Inside the program a model has one set of names: those of its modules. On disk there are more: the released v1.5 has no
tower; towers saved by older transformers sit one level deeper (``vision_tower.vision_tower.vision_model.``); adapters
come with a ``non_lora_trainables.bin`` whose keys carry PEFT's prefixes. The functions here translate, refuse what they
cannot read, and write files whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from llava.errors import UserError
from llava.files import atomic_write, publish, read_object, sha256, write_json

State = dict[str, torch.Tensor]

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
POST_BLOCK = "post_block."
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
CONNECTOR = ("mm_projector.bin", "mm_projector.safetensors")
DELTA = "delta.safetensors"

# Buffers that old checkpoints carry and today's modules compute.
_DROPPED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def read_tensors(path: Path) -> State:
    """One ``.safetensors`` or ``.bin`` file, memory-mapped where the format allows.

    Raises:
        UserError: missing, truncated, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing weight file; download the checkpoint again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused: the pickle holds more than tensors and could run code; convert it to safetensors where "
            "you trust it"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged weight file ({str(error).splitlines()[0]}); download it again") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return state


def first_of(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of ``names`` that is a file in ``folder``."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def has_weights(folder: Path) -> bool:
    """Whether ``folder`` holds a whole model, in one file or in shards."""
    return first_of(folder, [n for name in WEIGHTS for n in (name, f"{name}.index.json")]) is not None


def has_tower(folder: Path) -> bool:
    """Whether the model in ``folder`` brings its vision tower; only names are read."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            if name.endswith(".safetensors"):
                try:
                    with safe_open(folder / name, framework="pt") as file:
                        return any(key.startswith(TOWER) for key in file.keys())  # noqa: SIM118
                except SafetensorError:
                    return False  # reading it says what is wrong
            return any(key.startswith(TOWER) for key in read_tensors(folder / name))
        if index.is_file():
            return any(key.startswith(TOWER) for key in read_object(index).get("weight_map", {}))
    return False


def read_model_weights(folder: Path) -> State:
    """All weights of a model folder, single file or shards, safetensors before ``.bin``, names as in the program."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return runtime_names(read_tensors(folder / name))
        index = folder / f"{name}.index.json"
        if index.is_file():
            state: State = {}
            weight_map = read_object(index).get("weight_map", {})
            for shard in sorted(set(weight_map.values())):
                state.update(read_tensors(folder / shard))
            absent = [key for key in weight_map if key not in state]
            if absent:
                raise UserError(
                    f"{index}: {len(absent)} weights are in no shard, first: {absent[0]}; download it again"
                )
            return runtime_names(state)
    raise UserError(f"{folder}: no model weights; expected {' or '.join(WEIGHTS)}, or shards with an .index.json")


def runtime_names(state: State) -> State:
    """Names on disk -> names of the modules; computed buffers are dropped."""
    return {
        key.replace(f"{TOWER}vision_model.", TOWER): value for key, value in state.items() if not _DROPPED.search(key)
    }


def disk_names(state: State) -> State:
    """Names of the modules -> names that LLaVA's own code reads (its tower has one level more)."""
    return {re.sub(rf"^{re.escape(TOWER)}(?!vision_model\.)", f"{TOWER}vision_model.", k): v for k, v in state.items()}


def read_tower_weights(folder: Path) -> State:
    """A CLIP folder's vision part, named as inside a LLaVA."""
    state = read_model_weights(folder)
    nested = any(key.startswith("vision_model.") for key in state)  # a whole CLIP also has a text tower
    return {
        TOWER + key.removeprefix("vision_model."): value
        for key, value in state.items()
        if not nested or key.startswith("vision_model.")
    }


def read_connector(path: Path) -> State:
    """``mm_projector.bin`` -> ``model.mm_projector.*`` and whatever else of the model it carries (embeddings).

    Raises:
        UserError: no connector inside.
    """
    state = strip_prefixes(read_tensors(path))
    connector = {PROJECTOR + k.split("mm_projector.", 1)[1]: v for k, v in state.items() if "mm_projector." in k}
    if not connector:
        keys = ", ".join(list(state)[:3])
        raise UserError(f"{path}: no connector inside; expected keys with 'mm_projector.', found {keys}")
    return {**connector, **{k: v for k, v in state.items() if "mm_projector." not in k}}


def strip_prefixes(state: State) -> State:
    """``base_model.model.`` of PEFT and the doubled ``model.model.`` taken off, as upstream's loader does."""
    state = {key.removeprefix("base_model."): value for key, value in state.items()}
    if any(key.startswith("model.model.") for key in state):
        state = {key.removeprefix("model."): value for key, value in state.items()}
    # Beside these alone nothing starts with "model.model.".
    return runtime_names({re.sub(r"^model\.(lm_head|post_block)\.", r"\1.", k): v for k, v in state.items()})


def assign(model: nn.Module, state: State, source: str | os.PathLike[str]) -> None:
    """Copy ``state`` into ``model``'s parameters of the same names, also where ZeRO-3 has partitioned them.

    Raises:
        UserError: a name the model has not, or another shape.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    parameters = dict(model.named_parameters())
    unknown = [key for key in state if key not in parameters]
    if unknown:
        raise UserError(f"{source}: {len(unknown)} weights that the model has not, first: {unknown[0]}")
    for key, value in state.items():
        parameter = parameters[key]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if shape != tuple(value.shape):
            raise UserError(f"{source}: {key} has shape {tuple(value.shape)}, the model wants {shape}")
        with torch.no_grad(), gathered([parameter], modify=is_deepspeed_zero3_enabled()):
            if parameter.shape == value.shape:  # under ZeRO-3 on the modifying rank only
                parameter.copy_(value.to(parameter.dtype))


def gathered(parameters: list[nn.Parameter], modify: bool = False) -> Any:
    """Context in which partitioned parameters are whole; nothing happens to ordinary ones."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)


def gather_state(model: nn.Module, wanted: Callable[[str, nn.Parameter], bool], keep: bool = True) -> State:
    """Copies on the CPU of the parameters that ``wanted(name, parameter)`` chooses.

    Every rank must call it: under ZeRO-3 a parameter is gathered from all of them, one at a time. Ranks that do not
    ``keep`` the copies get an empty state.
    """
    state: State = {}
    for name, parameter in model.named_parameters():
        if wanted(name, parameter):
            with gathered([parameter]):
                if keep:
                    state[name] = parameter.detach().to("cpu", copy=True)
    return state


def write_tensors(path: Path, state: State) -> None:
    """``.bin`` (what upstream's loader opens) or ``.safetensors``, whole or not at all."""
    if path.suffix == ".bin":
        with atomic_write(path, "wb") as file:
            torch.save(state, file)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({key: value.contiguous() for key, value in state.items()}, temporary, metadata={"format": "pt"})
    publish(temporary, path)


def write_model_weights(folder: Path, state: State, max_shard_size: str = "5GB") -> list[str]:
    """A whole model as safetensors, in shards with an index where it is large; names as LLaVA's own code reads them.

    Returns the names of the files written.
    """
    state = disk_names(state)
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in plan.filename_to_tensors.items():
        write_tensors(folder / name, {key: state[key] for key in keys})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", json.loads(json.dumps(index)))
        return [*plan.filename_to_tensors, "model.safetensors.index.json"]
    return list(plan.filename_to_tensors)


def weight_files(folder: Path) -> list[Path]:
    """The files that ``read_model_weights`` reads, in a fixed order; none where there are none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / shard for shard in sorted(set(read_object(index).get("weight_map", {}).values()))]
    return []


def fingerprint(folder: Path) -> list[list[Any]]:
    """Name, size and time of a folder's weight files: cheap, and different after any training."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".bin", ".safetensors") or f.name == "config.json")
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def content_hash(files: Iterable[Path]) -> str:
    """Hex SHA-256 over the contents of ``files`` in their order, wherever they lie and whatever they are called."""
    return hashlib.sha256("".join(_file_hash(file) for file in files).encode()).hexdigest()


# Bytes; a smaller file is read sooner than what is remembered of it would be worth keeping.
WORTH_REMEMBERING = 64 << 20


def _file_hash(file: Path) -> str:
    found = file.resolve()
    if found.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", found.name):
        return found.name  # the hub's cache calls large files by their SHA-256
    try:
        status = found.stat()
        return _hash_once(str(found), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); download the checkpoint again") from None


@functools.cache
def _hash_once(path: str, size: int, mtime_ns: int) -> str:
    """A file's SHA-256, remembered on disk where reading it again would take long."""
    if size < WORTH_REMEMBERING:
        return sha256(path)
    memo = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llava" / "sha256.json"
    before = _remembered(memo).get(path)
    if isinstance(before, list) and before[:2] == [size, mtime_ns] and len(before) == 3:
        return before[2]
    digest = sha256(path)
    with contextlib.suppress(OSError):  # nothing but time is lost
        write_json(memo, {**_remembered(memo), path: [size, mtime_ns, digest]})
    return digest


def _remembered(memo: Path) -> dict[str, Any]:
    try:
        return read_object(memo)
    except UserError:
        return {}
