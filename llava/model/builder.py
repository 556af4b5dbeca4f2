"""Files -> model. Any checkpoint is known by what its folder holds, never by the folder's name.

Every way in ends in ``assemble``: one state dict with the module's own names (language model, connector, tower), one
explicit dtype, one ``from_pretrained``, which also serves ZeRO-3, device maps and quantization.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPImageProcessorPil, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.errors import UserError
from llava.files import read_object
from llava.model.adapter import load_adapter
from llava.model.checkpoint import (
    ADAPTER_WEIGHTS,
    CONNECTOR,
    NON_LORA,
    first_of,
    has_tower,
    has_weights,
    model_names,
    read_tower_weights,
)
from llava.model.dialects import EMBEDDINGS, HEAD, PROJECTOR, TOWER, State
from llava.model.huggingface import (
    CLIP_SHAPE,
    LANGUAGE_MODELS,
    PREPROCESSOR,
    image_settings,
    is_huggingface,
    original_config,
)
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM
from llava.model.multimodal_encoder.builder import vision_config
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.quantization import Quantization, check_backend, settle
from llava.tokenization import load_tokenizer

# model_type on disk -> our classes. "llava" is what the released v1.5 says, and Hugging Face's own format
# (``huggingface``): transformers' AutoConfig takes the one for the other without a word, so it is never asked.
FAMILIES: dict[str, tuple[type, type]] = {
    "llava": (LlavaConfig, LlavaLlamaForCausalLM),
    "llava_llama": (LlavaConfig, LlavaLlamaForCausalLM),
    "llava_qwen2": (LlavaQwen2Config, LlavaQwen2ForCausalLM),
}

# What a config.json says about the file and not about the model.
FILE_KEYS = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}


def local_folder(
    name_or_path: str, flag: str, near: Sequence[Path] = (), cache_dir: str | None = None, fetch: bool = True
) -> Path:
    """The folder a path or hub id stands for.

    A relative path is looked for in the working directory, then inside and beside the folders ``near``; what is not a
    local folder is in the hub's cache, or (``fetch``) is put there.
    """
    places = [Path(name_or_path).expanduser()]
    for folder in near:
        places += [folder / name_or_path, folder.parent / name_or_path]
    for place in places:
        if name_or_path and place.is_dir():
            return place
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise UserError(f"{flag} {name_or_path}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # The same weights for other frameworks are left where they are.
        return Path(
            snapshot_download(
                name_or_path,
                cache_dir=cache_dir,
                ignore_patterns=["*.h5", "*.msgpack", "*.onnx"],
                local_files_only=not fetch,
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{flag} {name_or_path}: no such folder, and the hub does not give it ({type(error).__name__})"
        ) from None


def read_config(folder: Path, flag: str) -> dict[str, Any]:
    """A model's ``config.json`` in the original format, whichever of the two it has.

    Raises:
        UserError: none there, or one that cannot be put so.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{flag} {folder}: {_without_config(folder)}")
    config = read_object(file)
    quantized = config.pop("quantization_config", None)  # beside a delta: what it was trained on, not what it holds
    if quantized and has_weights(folder):
        raise UserError(
            f"{flag} {folder}: the weights are quantized ({quantized.get('quant_method')}), which cannot be loaded; "
            "expected float16, bfloat16 or float32 (--load-4bit, --load-8bit and --bits quantize what is loaded)"
        )
    return original_config(config, folder, flag) if is_huggingface(config) else config


def _without_config(folder: Path) -> str:
    """What a folder without config.json is."""
    names = sorted(file.name for file in folder.iterdir())
    if any(name.endswith(".gguf") for name in names):
        return "holds GGUF files (llama.cpp), which cannot be loaded; expected .safetensors or .bin with config.json"
    if first_of(folder, ADAPTER_WEIGHTS):
        return f"{first_of(folder, ADAPTER_WEIGHTS).name} without adapter_config.json; copy the whole folder again"
    found = ", ".join(names[:4]) or "nothing"
    return f"config.json: no such file (found {found}); expected the folder of a whole model"


def check_config(config: dict[str, Any], folder: Path, flag: str) -> dict[str, Any]:
    """``config``, read in ``folder``, which must be that of a LLaVA.

    Raises:
        UserError: another kind of model, with what was found and what is expected.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        hint = ""
        if kind in LANGUAGE_MODELS:
            hint = " (a plain language model becomes a LLaVA with train_pretrain.py)"
        elif kind == "clip_vision_model":
            hint = " (it is a vision tower: pass it as --vision_tower)"
        raise UserError(
            f"{flag} {folder}: model_type '{kind}' cannot be loaded; expected one of {', '.join(FAMILIES)}{hint}"
        )
    aspect, merge = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type")
    if aspect == "anyres" or (merge or "flat") != "flat":
        raise UserError(
            f"{flag} {folder}: a LLaVA-1.6 (anyres) checkpoint (image_aspect_ratio {aspect}, mm_patch_merge_type "
            f"{merge}) cannot be loaded; expected LLaVA-1.5"
        )
    if config.get("mm_hidden_size") is None or not (config.get("mm_vision_tower") or config.get("mm_vision_config")):
        raise UserError(f"{flag} {folder}: config.json names no vision tower (mm_vision_tower, mm_hidden_size)")
    try:
        model_settings(config)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'}: {' '.join(str(error).split())}; download it again") from None
    return config


def with_tower(
    config: dict[str, Any], *folders: Path, cache_dir: str | None = None
) -> tuple[dict[str, Any], Path | None]:
    """``config`` with the tower's shape filled in (``mm_vision_config``), and the tower's folder, or None where it is
    not needed: shape, weights and image processor are all in ``folders`` (the checkpoint's own, and its base's).

    Raises:
        UserError: the tower is needed and ``mm_vision_tower`` leads nowhere.
    """
    inside, named = has_tower(folders[-1]), config.get("mm_vision_tower")
    if not named and not inside:
        first = next(iter(model_names(folders[-1])), "none")
        raise UserError(f"{folders[-1]}: no vision tower in the weights (first: {first}); download them again")
    if config.get("mm_vision_config") and inside and (not named or any(image_settings(folder) for folder in folders)):
        return config, None  # nobody asks the hub for what is here: nodes of a cluster are often offline
    flag = f"{folders[0] / 'config.json'}: mm_vision_tower"
    try:
        tower = local_folder(named, flag, folders, cache_dir)
    except UserError as error:
        if not inside:
            raise
        lacking = "its image processor" if config.get("mm_vision_config") else "its shape (mm_vision_config)"
        raise UserError(
            f"{error}; the weights hold the tower, but {lacking} is in that folder alone: download its config.json and "
            f"{PREPROCESSOR}, and write where they are into mm_vision_tower"
        ) from None
    return {"mm_vision_config": tower_shape(tower), **config}, tower


def tower_shape(tower: Path) -> dict[str, Any]:
    """A CLIP folder's vision configuration, without what belongs to its files."""
    shape = vision_config(str(tower)).to_dict()
    return {key: shape[key] for key in CLIP_SHAPE}


def model_settings(config: dict[str, Any]) -> Any:
    """``config.json`` as the model's own class of configuration, without what belongs to the file."""
    # A copy: transformers writes into the rope_scaling that it is given.
    settings = copy.deepcopy({key: value for key, value in config.items() if key not in FILE_KEYS})
    return FAMILIES[config["model_type"]][0](**settings)


@contextlib.contextmanager
def whole_parameters() -> Iterator[None]:
    """Models made here are ordinary ones, also where ZeRO-3 would partition every new one."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def skeleton(config: dict[str, Any]) -> Any:
    """A model of ``config`` on the meta device: names and shapes without weights."""
    with whole_parameters(), torch.device("meta"):
        return FAMILIES[config["model_type"]][1](model_settings(config))


def settle_head(config: dict[str, Any], state: State) -> tuple[dict[str, Any], State]:
    """Where ``config`` ties the head to the embeddings: ``state`` without a head that is the same, or ``config`` that
    does not tie one that differs, as transformers 5 reads such files.
    """
    if HEAD not in state or not model_settings(config).tie_word_embeddings:
        return config, state
    if torch.equal(state[HEAD].to(state[EMBEDDINGS].dtype), state[EMBEDDINGS]):
        return config, {name: value for name, value in state.items() if name != HEAD}
    return {**config, "tie_word_embeddings": False}, state


def check_weights(model: Any, state: State, file_of: Callable[[str], Path]) -> None:
    """Whether ``state`` is what ``model``, a skeleton, consists of; a vision tower may be left out as a whole.

    Raises:
        UserError: weights are missing, too many, or of another shape; ``file_of`` tells which file brings one.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings and HEAD not in state:
        del wanted[HEAD]
    if not any(name.startswith(TOWER) for name in state):
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(TOWER)}
    if missing := [name for name in wanted if name not in state]:
        mend = "download them again"
        if missing[0].startswith(PROJECTOR):
            mend = f"the connector is in one of {', '.join(NON_LORA + CONNECTOR)}, or in the LLaVA that a LoRA is for"
        raise UserError(
            f"{file_of(missing[0])}: {len(missing)} weights of the model in config.json are missing, first: "
            f"{missing[0]} {wanted[missing[0]]}; {mend}"
        )
    if unknown := [name for name in state if name not in wanted]:
        raise UserError(
            f"{file_of(unknown[0])}: {len(unknown)} weights that the model in config.json has not, first: {unknown[0]} "
            f"{tuple(state[unknown[0]].shape)}; they are another model's"
        )
    if wrong := [name for name, shape in wanted.items() if tuple(state[name].shape) != shape]:
        raise UserError(
            f"{file_of(wrong[0])}: {len(wrong)} weights do not fit config.json, first: {wrong[0]} has shape "
            f"{tuple(state[wrong[0]].shape)}, expected {wanted[wrong[0]]}; they are another model's"
        )


def assemble(
    config: dict[str, Any],
    state: State,
    source: Path,
    dtype: torch.dtype,
    tower: Path | None = None,
    device_map: Any = None,
    quantization: Quantization | None = None,
    file_of: Callable[[str], Path] | None = None,
    **kwargs: Any,
) -> Any:
    """A model of ``config`` with the weights in ``state``; the tower's come from its folder where ``state`` has none.

    Raises:
        UserError: weights are missing, too many, or of another shape; ``file_of`` tells which file brings one.
    """
    if not any(key.startswith(TOWER) for key in state):
        if tower is None:
            raise UserError(
                f"{source}: no vision tower inside, and mm_vision_tower {config.get('mm_vision_tower')} is missing"
            )
        state = {**state, **read_tower_weights(tower)}
    config, state = settle_head(config, state)
    check_weights(skeleton(config), state, file_of or (lambda name: source))
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its load report
    if quantization is not None:
        kwargs |= quantization.options(state)
    if device_map is not None:
        kwargs["device_map"] = device_map
    try:
        model = FAMILIES[config["model_type"]][1].from_pretrained(
            None, config=model_settings(config), state_dict=state, dtype=dtype, **kwargs
        )
    except ImportError as error:  # a kernel that is not installed
        wanted = kwargs.get("attn_implementation")
        flag = f"--attn_implementation {wanted}: " if wanted else ""
        raise UserError(f"{flag}{' '.join(str(error).split())}; pass sdpa, or install it") from None
    if quantization is not None:
        settle(model)
    model.generation_config = GenerationConfig(**generation_settings(source, model.config))
    model.name_or_path = model.config._name_or_path = str(source)  # adapters name it as their base
    return model


def generation_settings(folder: Path, config: Any) -> dict[str, Any]:
    """The folder's, made greedy: Vicuna's has a temperature without sampling, which cannot be saved again.

    What the folder does not say is the model's ``config``'s.
    """
    file = folder / "generation_config.json"
    given = read_object(file) if file.is_file() else {}
    keep = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "repetition_penalty")
    settings = {k: getattr(config, k, None) for k in keep[:3]}
    settings.update({k: given[k] for k in keep if given.get(k) is not None})
    if (settings["pad_token_id"] or 0) >= config.vocab_size:  # Hugging Face's <pad>, which has no row here
        settings["pad_token_id"] = config.pad_token_id
    return {k: v for k, v in settings.items() if v is not None}


def load_image_processor(*folders: Path | None) -> CLIPImageProcessorPil:
    """The first image processor in a checkpoint's, its base's, its tower's folder; Pillow, as upstream.

    It is CLIP's whatever class the file names: padding is LLaVA's own step before it.
    """
    for folder in folders:
        settings = image_settings(folder) if folder is not None else None
        if settings is not None:
            padding = ("do_pad", "pad_size", "image_processor_type", "processor_class")
            return CLIPImageProcessorPil(**{k: v for k, v in settings.items() if k not in padding})
    raise UserError(f"no {PREPROCESSOR} in {', '.join(dict.fromkeys(str(f) for f in folders if f))}")


def blank_config(folder: Path, model_args: Any, cache_dir: str | None = None) -> tuple[dict[str, Any], Path]:
    """Config of a LLaVA on the language model in ``folder`` with the tower that the flags name, and the tower's folder.

    Upstream's defaults where a flag is not given: connector ``linear``, last layer of the tower, ``patch``.
    """
    tower = local_folder(model_args.vision_tower, "--vision_tower", cache_dir=cache_dir)
    shape = tower_shape(tower)
    config = read_object(folder / "config.json")
    layer = model_args.mm_vision_select_layer
    config.update(
        model_type=LANGUAGE_MODELS[config["model_type"]],
        mm_vision_tower=model_args.vision_tower,
        mm_vision_config=shape,
        mm_hidden_size=shape["hidden_size"],
        mm_projector_type=model_args.mm_projector_type or "linear",
        mm_vision_select_layer=-1 if layer is None else layer,
        mm_vision_select_feature=model_args.mm_vision_select_feature or "patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        use_mm_proj=True,
    )
    return config, tower


def fresh_connector(config: dict[str, Any], seed: int) -> State:
    """A new connector's weights: the same on every rank and in every run of a seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = build_vision_projector(PretrainedConfig(**config))
    return {PROJECTOR + key: value for key, value in connector.state_dict().items()}


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    cache_dir: str | None = None,
) -> tuple[PreTrainedTokenizerBase, Any, CLIPImageProcessorPil, int]:
    """Upstream's loader: ``(tokenizer, model, image_processor, context_len)``, ready to generate.

    ``model_path`` may hold a whole model or a delta (a LoRA, a connector, whatever else was trained on a frozen
    backbone), or be several, ``A,B``. A delta finds its base by its ``delta.json``; ``model_base`` says where it lies
    instead, and must be given for a delta without one (upstream's). ``model_name`` is accepted and not needed. The
    dtype is float16 on CUDA, as upstream, and float32 on the CPU unless ``dtype`` says otherwise. LoRA weights are
    merged. ``load_8bit`` and ``load_4bit`` (nf4, with its scales quantized too) are of the decoder's linear layers.

    Raises:
        UserError: what was found cannot be loaded, with what to pass instead.
    """
    from llava.model.delta import read_chain  # which builds models too

    on_cuda = str(device).startswith("cuda") and torch.cuda.is_available()
    dtype = dtype or (torch.float16 if on_cuda else torch.float32)
    options: dict[str, Any] = {}
    if on_cuda:
        options["device_map"] = device_map if device == "cuda" else {"": device}
    if use_flash_attn or attn_implementation:
        options["attn_implementation"] = attn_implementation or "flash_attention_2"
    quantization = None
    if load_8bit or load_4bit:
        if load_8bit and load_4bit:
            raise UserError("--load-8bit and --load-4bit: pass one of them")
        where = device if on_cuda or device != "cuda" else "cpu"
        quantization = Quantization(4 if load_4bit else 8, dtype, where)
        check_backend("--load-4bit" if load_4bit else "--load-8bit", quantization.bits, where)

    chain = read_chain(model_path, "--model-path", cache_dir, model_base)
    config, tower = chain.configured()
    # Into quantized weights a LoRA could be folded only by rounding them once more; into a head that is the embeddings,
    # PEFT would fold it twice.
    fold = quantization is not None or (model_settings(config).tie_word_embeddings and chain.adapts_head)
    options |= {"quantization": quantization, "file_of": chain.file_of}
    model = assemble(config, chain.state(adapter=fold), chain.source, dtype, tower, **options)
    if chain.adapter is not None and not fold:
        model = load_adapter(model, chain.adapter).merge_and_unload()
    if not on_cuda and device not in ("cuda", "cpu"):
        model = model.to(device)

    tokenizer = load_tokenizer(chain.folder_with("tokenizer_config.json"), config.get("vocab_size"))
    _add_image_marks(model, tokenizer)
    context_len = getattr(model.config, "max_sequence_length", 2048)
    image_processor = load_image_processor(*chain.folders, tower)
    model.get_vision_tower().image_processor = image_processor
    return tokenizer, model.eval(), image_processor, context_len


def load_as_asked(args: argparse.Namespace, device: str) -> tuple[PreTrainedTokenizerBase, Any, CLIPImageProcessorPil]:
    """``(tokenizer, model, image_processor)`` of the model that the flags of an inference command name.

    Reads of ``args``: model_path, model_base, load_8bit, load_4bit, dtype, attn_implementation, cache_dir.

    Raises:
        UserError: as ``load_pretrained_model``.
    """
    return load_pretrained_model(
        args.model_path,
        args.model_base,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        device=device,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        attn_implementation=args.attn_implementation,
        cache_dir=args.cache_dir,
    )[:3]


def _add_image_marks(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Old checkpoints mark pictures with tokens of their own; their embeddings are in the checkpoint."""
    marks = []
    if getattr(model.config, "mm_use_im_patch_token", False):
        marks.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if getattr(model.config, "mm_use_im_start_end", False):
        marks += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if marks:
        tokenizer.add_tokens(marks, special_tokens=True)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
