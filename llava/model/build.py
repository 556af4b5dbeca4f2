"""Two downloaded models -> one LLaVA whose connector is still to be trained.

    python -m llava.model.build --llm Qwen/Qwen1.5-4B-Chat --vision_tower openai/clip-vit-large-patch14-336 \
        --out checkpoints/llava-qwen-blank

Written are the weights of both, a connector drawn with ``--seed``, tokenizer, image processor, chat template and the
settings of generation. ``--to hf`` (the default) is Hugging Face's ``LlavaForConditionalGeneration``, which plain
transformers loads, and every script here too; ``--to original`` is LLaVA's own format. Before the folder gets its name
it is read back: the ids, the number of tokens a picture takes, a text (the logits must be the language model's own) and
a picture are tried.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from llava.command_line import OneLineParser, quiet
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, template
from llava.errors import UserError, command_line, note
from llava.files import existing, read_object, write_json
from llava.mm_utils import preprocess_image, tokenizer_image_token
from llava.model.builder import (
    blank_config,
    check_weights,
    fresh_connector,
    generation_settings,
    load_image_processor,
    load_pretrained_model,
    local_folder,
    model_settings,
    settle_head,
    skeleton,
)
from llava.model.chat_template import BY_LOOK, chat_template, usual_template
from llava.model.checkpoint import SHARD, read_tower_weights, write_model_weights
from llava.model.delta import Chain, read_chain
from llava.model.dialects import EMBEDDINGS, HEAD, PROJECTOR, TOWER, State
from llava.model.export import (
    Source,
    check_shard_size,
    free_folder,
    interruptible,
    lasting_name,
    refuse_inexpressible,
    size,
    write_huggingface,
    write_original,
    write_whole,
)
from llava.model.huggingface import LANGUAGE_MODELS
from llava.tokenization import load_tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SENTENCE = "The quick brown fox jumps over the lazy dog."

# How far logits of one model may lie apart when they are computed twice, as a share of the largest of them: nothing
# where the same kernels meet the same shapes, a few roundings of the dtype where they do not.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        "python -m llava.model.build",
        description="Put a language model and a vision tower together.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--llm", required=True, help="language model of Llama's or Qwen2's kind: a folder, a hub id, or a .gguf file")
    add("--gguf_file", help="the file to read in that folder, where it holds GGUF files (llama.cpp)")
    add("--vision_tower", required=True, help="CLIP: a folder or a hub id")
    add("--out", required=True, help="the folder to write; it must not exist, or be empty")
    add("--to", default="hf", choices=["hf", "original"], help="Hugging Face's format (default), or LLaVA's own")
    add("--mm_projector_type", default="mlp2x_gelu", help="linear | mlp<N>x_gelu | identity; hf has mlp2x_gelu alone")
    add("--mm_vision_select_layer", type=int, default=-2, help="hidden state of the tower (default: -2)")
    add("--mm_vision_select_feature", default="patch", choices=["patch", "cls_patch"])
    add("--image_aspect_ratio", default="pad", choices=["pad", "square"], help="square: CLIP's centre crop")
    add("--conv-mode", help="conversation template (default: told from the language model's own)")
    add("--seed", type=int, default=0, help="of the connector's first weights")
    add("--dtype", choices=list(DTYPES), help="of the weights written (default: as the language model's are on disk)")
    add("--max_shard_size", help=f"weights beyond this are written in several files (default: {SHARD})")
    add("--cache_dir", help="the hub's cache")
    return parser.parse()


@contextlib.contextmanager
def language_model_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of ``--llm`` with ``config.json``, weights and tokenizer; of GGUF files one that lives for a while.

    Raises:
        UserError: nothing there that can be read.
    """
    given = Path(args.llm).expanduser()
    if given.suffix == ".gguf" and given.is_file():
        if args.gguf_file:
            raise UserError(f"--llm {args.llm} is the GGUF file itself; leave out --gguf_file")
        folder, name = given.parent, given.name
    else:
        folder, name = local_folder(args.llm, "--llm", cache_dir=args.cache_dir), args.gguf_file
    if name is None:
        found = sorted(file.name for file in folder.glob("*.gguf"))
        if found and not (folder / "config.json").is_file():
            raise UserError(f"--llm {args.llm} holds GGUF files; pass one: --gguf_file {' | '.join(found)}")
        yield folder
        return
    file = existing(folder / name, "--gguf_file")
    with tempfile.TemporaryDirectory(dir=Path(args.out).expanduser().absolute().parent, prefix=".gguf.") as unpacked:
        unpack_gguf(file, Path(unpacked), DTYPES[args.dtype or "float32"])
        yield Path(unpacked)


def unpack_gguf(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write what a GGUF file holds as transformers reads it: config, weights (dequantized, in ``dtype``), tokenizer.

    Raises:
        UserError: no GGUF file, or of a model that is neither a Llama nor a Qwen2.
    """
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise UserError(f"--gguf_file {file.name} needs the package gguf; pip install gguf")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"--gguf_file {file}: no GGUF file; download it again")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        kind = AutoConfig.from_pretrained(**where).model_type
        if kind not in LANGUAGE_MODELS:
            raise UserError(f"--gguf_file {file}: a '{kind}'; expected one of {', '.join(LANGUAGE_MODELS)}")
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    except (ValueError, KeyError, OSError, NotImplementedError, struct.error, IndexError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"--gguf_file {file}: cannot be read ({said}); expected a whole one of a Llama or Qwen2"
        ) from None
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights[HEAD]
    # Not save_pretrained, which takes the dequantized model for a quantized one.
    write_model_weights(folder, weights)
    config = model.config.to_dict()
    del config["quantization_config"]
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", model.generation_config.to_dict())
    tokenizer.save_pretrained(folder)


def check_language_model(folder: Path, name: str) -> None:
    """Raise ``UserError`` where ``folder`` holds another kind of model."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"--llm {name}: config.json: no such file; expected the folder of a language model")
    kind = read_object(file).get("model_type")
    if kind not in LANGUAGE_MODELS:
        hint = "; it is a LLaVA already, train_pretrain.py takes it" if "llava" in str(kind) else ""
        raise UserError(f"--llm {name}: model_type '{kind}'; expected one of {', '.join(LANGUAGE_MODELS)}{hint}")


def choose_template(wanted: str | None, tokenizer: Any, config: dict[str, Any]) -> str:
    """Name of the conversation template: ``--conv-mode``, else what the tokenizer's own chat template looks like.

    Raises:
        UserError: it has no turns, or ends its answers with a token that the tokenizer has not.
    """
    name = wanted or usual_template(tokenizer, config)
    own = getattr(tokenizer, "chat_template", None)
    if wanted is None and own and not any(mark in str(own) for mark in BY_LOOK):
        note(
            f"the language model's own chat template is none that is known here; the conversations are those of {name}"
        )
    conversation = template(name, "--conv-mode")
    chat_template(conversation, name)
    stop = stop_id(tokenizer, conversation)
    if stop is None and "<|" in conversation.stop_string:
        raise UserError(
            f"--conv-mode {name}: the tokenizer has no token {conversation.stop_string}, which ends an answer; pass v1"
        )
    return name


def stop_id(tokenizer: Any, conversation: Conversation) -> int | None:
    """Id of the token that ends an answer; None where the template's end is no token of its own."""
    found = tokenizer.convert_tokens_to_ids(conversation.stop_string)
    return None if found is None or found == tokenizer.unk_token_id else found


def assemble_parts(args: argparse.Namespace, chain: Chain, out: Path) -> tuple[Source, str]:
    """Everything that is to be written, and the name of the template.

    Raises:
        UserError: the models do not fit the flags.
    """
    config, tower = blank_config(chain.newest, args, args.cache_dir)
    config["mm_vision_tower"] = lasting_name(args.vision_tower, tower, out)
    config["image_aspect_ratio"] = args.image_aspect_ratio
    if args.to == "hf":
        refuse_inexpressible(config, "--to hf")
    tokenizer = load_tokenizer(chain.folder_with("tokenizer_config.json"), config.get("vocab_size"))
    name = choose_template(args.conv_mode, tokenizer, config)
    config["mm_conv_mode"] = name
    state = chain.state()
    dtype = DTYPES[args.dtype] if args.dtype else state[EMBEDDINGS].dtype
    state = {**state, **fresh_connector(config, args.seed), **read_tower_weights(tower)}
    config, state = settle_head(config, state)
    check_weights(skeleton(config), state, chain.file_of)
    generation = {"do_sample": False, **generation_settings(chain.newest, model_settings(config))}
    ends = generation.get("eos_token_id")
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    stop = stop_id(tokenizer, template(name))
    if stop is not None and stop not in ends:
        ends.insert(0, stop)
    generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    source = Source(
        config=config,
        state={key: value.to(dtype) for key, value in state.items()},
        dtype=dtype,
        released_tower=True,
        tokenizer=tokenizer,
        preprocessor=load_image_processor(tower).to_dict(),
        generation=generation,
    )
    return source, name


@torch.inference_mode()
def own_logits(folder: Path, ids: list[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """What the language model itself, in transformers, says about ``ids``: logits (L, V) in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return model(torch.tensor([ids], device=device)).logits[0].float().cpu()


@torch.inference_mode()
def check(folder: Path, source: Source, conv_mode: str, own: torch.Tensor, ids: list[int], device: str) -> list[str]:
    """What is found when ``folder`` is read back, a line each.

    Raises:
        UserError: it is not what it must be.
    """
    tokenizer, model, image_processor, _ = load_pretrained_model(str(folder), None, device=device, dtype=source.dtype)
    lines = [_check_ids(folder, model)]

    picture = Image.new("RGB", (640, 480), (200, 120, 40))
    conversation = template(conv_mode)
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\nWhat is this?")
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    pixels = preprocess_image(picture, image_processor, source.config["image_aspect_ratio"])[None]
    features = model.look(pixels.to(device, model.dtype)).features.shape[1]
    lines.append(_check_picture_tokens(folder, picture, prompt, features, tokenizer))

    found = model(torch.tensor([ids], device=device)).logits[0].float().cpu()
    rows = min(found.shape[1], own.shape[1])
    apart = float((found[:, :rows] - own[:, :rows]).abs().max() / own.abs().max())
    if not apart <= TOLERANCE[source.dtype]:
        raise UserError(
            f"{folder}: logits of a text differ from the language model's own by {apart:.2g} of the largest; its "
            "weights or its config.json are not read as they are meant"
        )
    lines.append(
        f"text alone: {len(ids)} tokens, logits {apart:.1g} from the language model's own (share of the largest)"
    )

    prompt_ids = torch.tensor([tokenizer_image_token(prompt, tokenizer)], device=device)
    logits = model(prompt_ids, images=pixels.to(device, model.dtype)).logits
    length = prompt_ids.shape[1] - 1 + features
    if logits.shape[1] != length or not torch.isfinite(logits).all():
        raise UserError(
            f"{folder}: a picture and a question give logits {tuple(logits.shape)}, expected {length} finite"
        )
    lines.append(f"picture and question: {length} tokens, logits finite")
    return lines


def _check_ids(folder: Path, model: Any) -> str:
    """Raises ``UserError`` where a special token has no id, several, or no row."""
    config = read_object(folder / "config.json")
    hf = "text_config" in config
    tokenizer = AutoTokenizer.from_pretrained(folder) if hf else load_tokenizer(folder)
    rows = config.get("text_config", config)["vocab_size"]
    said = {"pad": tokenizer.pad_token_id, "eos": model.generation_config.eos_token_id}
    if hf:
        wanted, found = config["image_token_index"], tokenizer.encode(DEFAULT_IMAGE_TOKEN, add_special_tokens=False)
        if found != [wanted]:
            raise UserError(f"{folder}: {DEFAULT_IMAGE_TOKEN} is {found} in the tokenizer, expected [{wanted}]")
        said = {DEFAULT_IMAGE_TOKEN: wanted, **said}
    for name, index in said.items():
        for one in index if isinstance(index, list) else [index]:
            if one is not None and not 0 <= one < rows:
                raise UserError(f"{folder}: the id of {name}, {one}, is outside the {rows} rows of the embeddings")
    same = " (padding is the end token: masks must come from lengths)" if said["pad"] == said["eos"] else ""
    return "ids: " + ", ".join(f"{name} {index}" for name, index in said.items()) + f", of {rows} rows{same}"


def _check_picture_tokens(folder: Path, picture: Image.Image, prompt: str, features: int, tokenizer: Any) -> str:
    """Raises ``UserError`` where transformers' processor makes other ids of a prompt than the programs here."""
    if not (folder / "processor_config.json").is_file():
        return f"a picture: {features} tokens"
    processor = AutoProcessor.from_pretrained(folder)
    image_id = processor.tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    found = processor(images=picture, text=prompt)["input_ids"][0]
    ours = [
        part
        for index in tokenizer_image_token(prompt, tokenizer)
        for part in ([image_id] * features if index == IMAGE_TOKEN_INDEX else [index])
    ]
    if list(found) != ours:
        count = list(found).count(image_id)
        raise UserError(
            f"{folder}: transformers' processor gives {len(found)} ids, {count} of them for the picture; expected "
            f"{len(ours)} and {features}"
        )
    return f"a picture: {features} tokens, from the tower and from transformers' processor"


def table(state: State, tied: bool) -> str:
    """Markdown: parameters by part, and gigabytes (1e9 bytes) of all weights by dtype.

    int8 and int4 are what ``--load-8bit`` and ``--load-4bit`` keep: the decoder's linear layers in 1 byte a weight and
    a float32 a row, or in nf4 with doubly quantized scales (1/2 byte a weight, a byte for 64 and a float32 for 16,384
    of them), all else in 2 bytes. Activations, caches and what training needs come on top.
    """
    parts = {"vision tower": 0, "connector": 0, "embeddings": 0, "decoder": 0, "lm_head": 0}
    linear = rows = 0
    for name, value in state.items():
        marks = {TOWER: "vision tower", PROJECTOR: "connector", EMBEDDINGS: "embeddings", HEAD: "lm_head"}
        parts[next((part for mark, part in marks.items() if name.startswith(mark)), "decoder")] += value.numel()
        if name.startswith("model.layers.") and value.ndim == 2:
            linear, rows = linear + value.numel(), rows + len(value)
    total = sum(parts.values())
    rest = 2 * (total - linear)
    memory = {
        "fp32": 4 * total,
        "bf16": 2 * total,
        "int8": rest + linear + 4 * rows,
        "int4": rest + linear * (1 / 2 + 1 / 64 + 4 / 16384),
    }
    lines = ["| part | parameters |", "|---|---:|"]
    for part, count in parts.items():
        same = " (the embeddings)" if part == "lm_head" and tied else ""
        lines.append(f"| {part}{same} | {count:,} |")
    lines += [
        f"| all | {total:,} |",
        "",
        "| weights in | " + " | ".join(memory) + " |",
        "|---|" + "---:|" * len(memory),
    ]
    lines.append("| | " + " | ".join(size(round(count)) for count in memory.values()) + " |")
    return "\n".join(lines)


@command_line
def main() -> None:
    args = parse_args()
    check_shard_size(args.max_shard_size)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected 0 or more")
    out = free_folder(args.out)
    quiet()
    with interruptible(), language_model_folder(args) as folder:
        check_language_model(folder, args.llm)
        build(args, folder, out)


def build(args: argparse.Namespace, folder: Path, out: Path) -> None:
    """Write the blank LLaVA on the language model in ``folder`` to ``out``.

    Raises:
        UserError: it cannot be made, or is not what it must be; nothing is left behind.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, conv_mode = assemble_parts(args, read_chain(str(folder), "--llm", args.cache_dir), out)
    ids = source.tokenizer(SENTENCE).input_ids
    own = own_logits(folder, ids, source.dtype, device)
    gc.collect()
    shard = args.max_shard_size or SHARD
    lines: list[str] = []

    def write(staged: Path) -> None:
        if args.to == "hf":
            write_huggingface(source, staged, conv_mode, shard)
        else:
            write_original(source, staged, shard)
        lines.extend(check(staged, source, conv_mode, own, ids, device))

    write_whole(out, sum(value.nbytes for value in source.state.values()), write)
    print(table(source.state, HEAD not in source.state), "", *lines, sep="\n")
    print(
        f"{out}: {str(source.dtype).removeprefix('torch.')}, conversations: {conv_mode}; next: train_pretrain.py "
        f"--train_type projector --model_name_or_path {args.out}",
        flush=True,
    )


if __name__ == "__main__":
    main()
