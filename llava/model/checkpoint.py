"""Weights in and out of files.

Inside the program a model has one set of names: those of its modules. On disk there are more (``dialects``), and the
released v1.5 has no tower. The functions here read files under the program's names, refuse what they cannot read, and
write files whole.
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
from llava.files import atomic_write, publish, read_object, refuse_pointer, sha256, write_json
from llava.model.dialects import (
    PROJECTOR,
    TOWER,
    State,
    lora_name,
    runtime_name,
    runtime_names,
)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
CONNECTOR = ("mm_projector.bin", "mm_projector.safetensors")
DELTA = "delta.safetensors"

SHARD = "5GB"  # of weights in one file, at most


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
    except pickle.UnpicklingError as error:
        if not _begins_as_pickle(path):
            raise _damaged(path, error) from None
        raise UserError(
            f"{path}: refused: the pickle holds more than tensors and could run code; convert it to safetensors where "
            "you trust it"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise _damaged(path, error) from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return state


def _begins_as_pickle(path: Path) -> bool:
    """Whether the first bytes are those of torch's files, zipped or from before 1.6."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def _damaged(path: Path, error: Exception) -> UserError:
    refuse_pointer(path)
    why = (str(error).splitlines() or [type(error).__name__])[0]
    if path.suffix != ".safetensors" and not _begins_as_pickle(path):
        why = "neither a zip nor a pickle"
    return UserError(f"{path}: damaged weight file ({why}); download it again")


def first_of(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of ``names`` that is a file in ``folder``."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def has_weights(folder: Path) -> bool:
    """Whether ``folder`` holds a whole model, in one file or in shards."""
    return first_of(folder, [n for name in WEIGHTS for n in (name, f"{name}.index.json")]) is not None


def tensor_names(path: Path) -> list[str]:
    """The program's names of what a weight file or an index holds; of a safetensors file only its head is read."""
    if path.suffix == ".json":
        names: Iterable[str] = read_object(path).get("weight_map", {})
    elif path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except SafetensorError:
            names = read_tensors(path)  # says what is wrong
    else:
        names = read_tensors(path)
    return [runtime_name(name) for name in names]


def model_names(folder: Path) -> list[str]:
    """The program's names of a model's weights, in one file or in shards; none where there are none."""
    file = first_of(folder, [n for name in WEIGHTS for n in (name, f"{name}.index.json")])
    return tensor_names(file) if file is not None else []


def has_tower(folder: Path) -> bool:
    """Whether the model in ``folder`` brings its vision tower; only names are read."""
    return any(name.startswith(TOWER) for name in model_names(folder))


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
    tensors = read_tensors(path)
    state = runtime_names(tensors)
    if not any(key.startswith(PROJECTOR) for key in state):
        keys = ", ".join(list(tensors)[:3]) or "nothing"
        raise UserError(f"{path}: no connector inside; expected keys with 'mm_projector.', found {keys}")
    return state


def read_adapter(folder: Path) -> tuple[State, State]:
    """A LoRA's weights (``model.layers.0.self_attn.q_proj.lora_A.weight``), and the whole tensors beside them.

    The latter are those of ``non_lora_trainables`` and of PEFT's ``modules_to_save``.

    Raises:
        UserError: no weights, or no LoRA in them.
    """
    path = first_of(folder, ADAPTER_WEIGHTS)
    if path is None:
        raise UserError(f"{folder}: no adapter weights; expected {' or '.join(ADAPTER_WEIGHTS)}")
    tensors = read_tensors(path)
    state = runtime_names(tensors)
    lora = {lora_name(key): value for key, value in state.items() if "lora_" in key}
    if not lora:
        raise UserError(f"{path}: no LoRA inside; expected keys with 'lora_A', found {', '.join(list(tensors)[:3])}")
    others = {key: value for key, value in state.items() if "lora_" not in key}
    extra = first_of(folder, NON_LORA)
    return lora, {**others, **(runtime_names(read_tensors(extra)) if extra else {})}


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


def write_model_weights(folder: Path, state: State, max_shard_size: str = SHARD) -> list[str]:
    """A whole model as safetensors, in shards with an index where it is large; names are written as they are.

    Returns the names of the files written.
    """
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
