"""What tuning changed inside a model: POPE's questions through the base and the tuned model, one after the other.

    python -m llava.eval.diagnose --model-path checkpoints/ha-dpo --coco_path COCO --pope_path POPE --set adversarial

Every question's prompt, open for the answer, runs once through each model; nothing is generated. At the position that
predicts the first token of the answer: KL between the two next-token distributions, the gap between yes and no, how far
the hidden state has moved at each depth, and how much attention goes to the picture. ``llava.eval.diagnostics`` says
what is written, and reads it.

Only one model is in memory at a time. What is kept of the base (logits, hidden states, attention; on the disk, in
``--base_cache``) is 4 V + 4 D (L + 3) bytes a question in float32 and half of that in float16: 0.35 MB for a 7B model
in float16, 1 GB for a set of 3,000. A run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from llava import interruption
from llava.command_line import OneLineParser, quiet, refuse_copies
from llava.conversation import template
from llava.distributed import check_device_variables, read_world, say_device, take_card
from llava.errors import BrokenImage, UserError, command_line, note, warn
from llava.eval.answer import Answerer
from llava.eval.asking import LOG_INTERVAL, Picture
from llava.eval.diagnostics import FORMAT, Files, files_of, read_diagnostics
from llava.eval.pope import PROTOCOLS, SETS
from llava.eval.pope_run import QuestionSet, by_picture, output_dir, read_questions
from llava.files import atomic_write, claim_folder, leftovers, read_object, sha256, whole_lines, write_json
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import fingerprint
from llava.model.decoder import layers_of
from llava.model.delta import Chain, read_chain
from llava.model.llava_arch import Pictures
from llava.model.post_block.base import LayerSight
from llava.model.post_block.sight import RowSight
from llava.run_card import FILE, versions

WRITTEN = "what is done so far is written, and the same command does only the rest"
BASE_CACHE = "diagnose_base"
TUNED = "diagnose_tuned"


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m llava.eval.diagnose",
        description="Compare a tuned LLaVA with its base, question by question, inside.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", required=True, help="the tuned model: a whole model, a delta, or several in order: A,B")
    add("--model-base", help="where the model lies that the first delta was trained on")
    add("--base", help="what it is compared with (default: the model that its training began from)")
    add("--coco_path", required=True, help="COCO 2014, with val2014 inside")
    add("--pope_path", required=True, help="folder of coco_pope_*.json (or POPE's repository), or one such file")
    add("--set", default="adversarial", choices=[*SETS, "adv", "all"], help="which questions (adv = adversarial)")
    add("--limit", type=int, help="only the questions about the first so many pictures")
    add("--output_dir", help="where diagnostics_SET.* go (default: where pope_eval.py puts the tuned model's answers)")
    add(
        "--base_cache",
        help="folder that keeps what is known of the base for other models tuned from it (some 0.35 MB a question and "
        "7B model; default: inside the output folder, and removed at the end)",
    )
    add("--load-8bit", action="store_true", help="8-bit weights (bitsandbytes)")
    add("--load-4bit", action="store_true", help="4-bit weights (bitsandbytes)")
    add("--dtype", choices=["float16", "bfloat16", "float32"], help="default: float16 on CUDA, float32 on the CPU")
    add("--prompt", default="hadpo", choices=list(PROTOCOLS), help="how questions are asked, as in pope_eval.py")
    add("--conv-mode", help="conversation template, instead of the one that --prompt names")
    add("--skip_missing_images", action="store_true", help="leave out questions whose picture is missing")
    add("--cache_dir", help="the hub's cache")
    return parser.parse()


# ---- one question through one model ----


class Glance(NamedTuple):
    """One question through one model of L layers, at the position that predicts the first token of the answer.

    Hidden states are those of the embeddings, of each layer, of the norm, and what the head gets (a post block's
    outcome, else the norm's again). Attention is a mean over heads of the weights on the picture's T tokens; the
    block's are of its layers that attend to the row's tokens, and to the picture.
    """

    logits: torch.Tensor  # (V,)
    hidden: torch.Tensor  # (L + 3, D)
    attention: torch.Tensor  # (L, T) float32
    block_tokens: torch.Tensor  # (B, T) float32
    block_pictures: torch.Tensor  # (B', T) float32


class Watch:
    """While entered, forward hooks on a model (with eager attention) that keep what a ``Glance`` holds.

    Each hook keeps the last token's row of the attention weights on the picture alone, so that no two layers' (H, L, L)
    weights are in memory together.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._begin(slice(0, 0))

    def _begin(self, span: slice) -> None:
        """Forget what was kept; the picture's tokens are at ``span`` now."""
        self.span = span
        self.hidden: list[torch.Tensor] = []
        self.attention: list[torch.Tensor] = []
        self.block_tokens: list[torch.Tensor] = []
        self.block_pictures: list[torch.Tensor] = []

    def __enter__(self) -> Watch:
        layers = layers_of(self.model.model)
        self._hooks = [layers[0].register_forward_pre_hook(self._embedded, with_kwargs=True)]
        for layer in layers:
            self._hooks.append(layer.self_attn.register_forward_hook(self._attended))
            self._hooks.append(layer.register_forward_hook(self._left))
        self._hooks.append(self.model.model.norm.register_forward_hook(self._left))
        if self.model.post_block is not None:
            self._hooks.append(self.model.post_block.register_forward_pre_hook(self._block_looks))
            self._hooks.append(self.model.post_block.register_forward_hook(self._left))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.inference_mode()
    def glance(self, pictures: Pictures, ids: list[int]) -> Glance:
        """One prompt about one picture.

        Raises:
            UserError: the prompt is too long for the model, or its logits are not finite.
        """
        model, tokens = self.model, pictures.features.shape[1]
        row = model.splice(torch.tensor([ids], device=model.device), pictures.features, [[0]])
        if row.inputs_embeds.shape[1] < len(ids) - 1 + tokens:
            raise UserError(
                f"a prompt of {len(ids) - 1 + tokens} tokens does not fit the model's {row.inputs_embeds.shape[1]} "
                "(config.json: tokenizer_model_max_length); choose a shorter --conv-mode"
            )
        begin = int(row.begins[0, 0])
        self._begin(slice(begin, begin + tokens))
        wanted = pictures.as_block_wants(model.post_block)
        out = model(
            inputs_embeds=row.inputs_embeds,
            block_pictures=None if wanted is None else wanted[None],
            block_begins=row.begins,
            use_cache=False,
            logits_to_keep=1,
        )
        logits = out.logits[0, -1].cpu()
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite; pass --dtype bfloat16 or float32")
        if model.post_block is None:
            self.hidden.append(self.hidden[-1])
        kept = (self.attention, self.block_tokens, self.block_pictures)
        return Glance(
            logits,
            torch.stack(self.hidden),
            *(torch.stack(weights) if weights else torch.zeros(0, tokens) for weights in kept),
        )

    def _embedded(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])

    def _left(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, hidden: torch.Tensor) -> None:
        self.hidden.append(hidden[0, -1].cpu())

    def _attended(self, _: nn.Module, __: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.attention.append(output[1][0, :, -1, self.span].float().mean(0).cpu())

    def _block_looks(self, _: nn.Module, args: tuple[torch.Tensor, RowSight]) -> tuple[Any, ...]:
        return args[0], SimpleNamespace(layer=partial(self._layer_sight, args[1]))

    def _layer_sight(self, sight: RowSight, number: int, is_last: bool) -> LayerSight:
        """What a block's layer looks through: the same sight, whose weights are kept as they pass."""
        looks = sight.layer(number, is_last)

        def tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # The last token sees the whole row, which has no padding.
            weights = _weights(sight.rope.turn(q)[0, -1], sight.rope.turn(k)[0])
            self.block_tokens.append(weights[self.span].cpu())
            return looks.tokens(q, k, v)

        def pictures(q: torch.Tensor, project: Callable[..., Any]) -> torch.Tensor:
            self.block_pictures.append(_weights(q[0, -1], project(sight.pictures)[0][0, 0]).cpu())
            return looks.pictures(q, project)

        return LayerSight(looks.asked, tokens, pictures)


def _weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention of one query (H, d) to keys (m, H', d): mean over heads, (m,) float32."""
    k = k.repeat_interleave(q.shape[0] // k.shape[1], dim=1).float()
    return torch.einsum("hd,mhd->hm", q.float() / math.sqrt(q.shape[1]), k).softmax(-1).mean(0)


# ---- what is kept on the disk ----


class Records:
    """Records of one size that grow on the disk, each with a line of JSON: NAME.KEY.bin and NAME.KEY.jsonl.

    The first line (``header``) says what all of them have in common. A record is written before its line, so a process
    that is killed leaves nothing that looks whole and is not.
    """

    def __init__(self, folder: Path, name: str, key: dict[str, Any]) -> None:
        self.key = key_of(key)
        self.lines, self.bin = (folder / f"{name}.{self.key[:12]}.{suffix}" for suffix in ("jsonl", "bin"))
        self.read()

    def read(self) -> None:
        """Look at what is there."""
        self.header, self.places, self.infos = None, {}, []
        rows = list(whole_lines(self.lines)) if self.lines.is_file() else []
        if not rows:
            return
        self.header = rows[0]
        size = self.dtype.itemsize
        for info in rows[1 : 1 + (self.bin.stat().st_size // size if self.bin.is_file() else 0)]:
            self._add(info)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype([(name, kind, tuple(shape)) for name, kind, shape in self.header["record"]])

    def begin(self, header: dict[str, Any]) -> None:
        """Make ready to grow; what is there stays, unless it was of another ``header``."""
        if self.header != header:
            self.header, self.places, self.infos = header, {}, []
        with writing(self.lines):
            with atomic_write(self.lines) as file:  # a killed run may have left half a line at the end
                file.writelines(json.dumps(row) + "\n" for row in [header, *self.infos])
            with self.bin.open("ab") as file:
                file.truncate(len(self.infos) * self.dtype.itemsize)

    def append(self, info: dict[str, Any], **values: np.ndarray) -> None:
        """One more record; ``info`` holds the ``picture`` and the ``text`` that it is of."""
        record = np.zeros((), self.dtype)
        for name, value in values.items():
            record[name] = value
        with writing(self.bin):
            with self.bin.open("ab") as file:
                file.write(record.tobytes())
            with self.lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(info) + "\n")
        self._add(info)

    def _add(self, info: dict[str, Any]) -> None:
        self.places[info["picture"], info["text"]] = len(self.infos)
        self.infos.append(info)

    def __getitem__(self, asked: tuple[str, str]) -> tuple[dict[str, Any], np.ndarray]:
        place = self.places[asked]
        offset = place * self.dtype.itemsize
        return self.infos[place], np.fromfile(self.bin, self.dtype, count=1, offset=offset)[0]


def key_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room or pass --output_dir and --base_cache, and run "
            "the same command again: what is done so far is kept"
        ) from None


# ---- all questions through one model ----


class Shown(NamedTuple):
    """A picture, the SHA-256 of its file, and the distinct questions about it."""

    picture: Picture
    digest: str
    texts: list[str]

    def left(self, records: Records) -> Shown:
        return self._replace(texts=[text for text in self.texts if (self.digest, text) not in records.places])

    def known(self, records: Records) -> Shown:
        return self._replace(texts=[text for text in self.texts if (self.digest, text) in records.places])


def run_through(
    answerer: Answerer,
    shown: Sequence[Shown],
    keep: Callable[[dict[str, Any], Glance], None],
    what: str,
    skip_broken: bool,
) -> None:
    """Ask a model about pictures, a picture at a time, and ``keep`` each question's glance with what it is of.

    Raises:
        Stopped: a signal came that was held.
        UserError: a picture that cannot be opened, without ``skip_broken``; or no room on the card.
    """
    model = answerer.model
    with Watch(model) as watch, _progress(what, sum(len(entry.texts) for entry in shown)) as step:
        for picture, digest, texts in shown:
            interruption.stop_if_requested(WRITTEN)
            try:
                pixels = answerer.prepare(picture.path, picture.where)[None]
            except BrokenImage as error:
                if not skip_broken:
                    raise
                warn(f"{error}; its questions are left out")
                continue
            try:
                with torch.inference_mode():
                    pictures = model.look(pixels.to(model.device, model.dtype))
                for text in texts:
                    ids = tokenizer_image_token(answerer.prompt(text), answerer.tokenizer)
                    info = {"picture": digest, "text": text, "prompt": key_of({"ids": ids})}
                    keep(info, watch.glance(pictures, ids))
                    step()
            except torch.OutOfMemoryError:
                raise UserError(
                    "out of memory with one question; pass --load-8bit or --load-4bit, or take a larger card"
                ) from None


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar for who looks on, and lines for a log; call what it gives once a question."""
    logs, logged, done = not sys.stderr.isatty(), time.monotonic(), 0
    with tqdm(total=total, desc=what, unit="question", disable=logs) as bar:

        def step() -> None:
            nonlocal done, logged
            done += 1
            bar.update()
            if logs and (time.monotonic() - logged > LOG_INTERVAL or done == total):
                logged = time.monotonic()
                note(f"{what}: {done}/{total} questions")

        yield step


def shape_of(answerer: Answerer) -> dict[str, Any]:
    """What two models must have in common to be compared."""
    config = answerer.model.config
    return {
        "vocabulary": answerer.model.lm_head.out_features,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "picture tokens": answerer.model.get_vision_tower().num_features,
        "first tokens of yes and no": [list(ids) for ids in answerer.yes_no],
    }


def base_header(answerer: Answerer) -> dict[str, Any]:
    """What every record of a base has in common, and what it holds, with numpy's types."""
    shape = shape_of(answerer)
    layers, width = shape["layers"], shape["width"]
    # As the model gives them: float16 is exact in float16, bfloat16 in float32.
    kind = "f2" if answerer.model.dtype == torch.float16 else "f4"
    record = [
        ["logits", kind, [shape["vocabulary"]]],
        ["hidden", kind, [layers + 3, width]],
        ["attention", "f4", [layers]],
        ["map", "f4", [shape["picture tokens"]]],
    ]
    return {
        "shape": shape,
        "block": answerer.model.post_block is not None,
        "aspect": answerer.aspect,
        "record": record,
    }


def keep_base(records: Records, info: dict[str, Any], glance: Glance) -> None:
    kind = records.dtype["logits"].base
    records.append(
        info,
        logits=glance.logits.float().numpy().astype(kind),
        hidden=glance.hidden.float().numpy().astype(kind),
        attention=glance.attention.sum(-1).numpy(),
        map=glance.attention.mean(0).numpy(),
    )


def keep_tuned(
    records: Records, base: Records, yes_no: Sequence[Sequence[int]], info: dict[str, Any], glance: Glance
) -> None:
    """Compare a question's glance with what is known of the base; ``records`` keep numbers and maps."""
    of_base, record = base[info["picture"], info["text"]]
    if of_base["prompt"] != info["prompt"]:
        raise UserError(
            f"question {info['text']!r}: the tokenizers of the two models make different tokens of it, which cannot be "
            "compared; pass --base"
        )
    logits, before = glance.logits.double(), torch.from_numpy(record["logits"]).double()
    depths = len(records.header["depth_names"])
    hidden, hidden_before = glance.hidden[:depths].double(), torch.from_numpy(record["hidden"][:depths]).double()
    moved = (hidden - hidden_before).norm(dim=-1) / hidden_before.norm(dim=-1).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    logp, logp_before = logits.log_softmax(-1), before.log_softmax(-1)
    block = glance.block_tokens.sum(-1).tolist()
    maps = {"maps_base": record["map"], "maps_tuned": glance.attention.mean(0).numpy()}
    if len(glance.block_pictures):
        maps["map_block"] = glance.block_pictures.mean(0).numpy()
    grid = records.header["grid"]
    records.append(
        {
            "picture": info["picture"],
            "text": info["text"],
            "kl": _rounded(max(float((logp_before.exp() * (logp_before - logp)).sum()), 0.0)),
            "base_gap": _rounded(gap(before, yes_no)),
            "tuned_gap": _rounded(gap(logits, yes_no)),
            "hidden_change": [_rounded(value) for value in moved.tolist()],
            "attention_base": [_rounded(value) for value in record["attention"].tolist()],
            "attention_tuned": [_rounded(value) for value in glance.attention.sum(-1).tolist()],
            "attention_block": [_rounded(value) for value in block] or None,
        },
        # A class token, where the tower gives one, comes first and has no place on the grid.
        **{name: values[-grid * grid :].reshape(grid, grid) for name, values in maps.items()},
    )


def gap(logits: torch.Tensor, yes_no: Sequence[Sequence[int]]) -> float:
    """Logits (V,) -> logsumexp over the first tokens of yes, less that of no."""
    yes, no = (logits[list(ids)].logsumexp(-1) for ids in yes_no)
    return float(yes - no)


def _rounded(value: float) -> float:
    return float(f"{value:.8g}")


def tuned_header(answerer: Answerer, base: dict[str, Any]) -> dict[str, Any]:
    """What every record of the tuned model has in common.

    Raises:
        UserError: the base is of another shape.
    """
    shape, model = shape_of(answerer), answerer.model
    for name, value in shape.items():
        if base["shape"][name] != value:
            raise UserError(f"--base has another {name} ({base['shape'][name]}) than --model-path ({value})")
    grid = math.isqrt(shape["picture tokens"])
    options = getattr(model.config, "post_block", None) or {}
    block_layers = len(model.post_block.layers) if model.post_block is not None and model.post_block.needs_rows else 0
    looks = model.post_block is not None and model.post_block.looks_at is not None
    names = ["embedding", *(f"layer {number}" for number in range(1, shape["layers"] + 1)), "norm"]
    maps = ["maps_base", "maps_tuned", *(["map_block"] if looks else [])]
    return {
        "depth_names": names + (["post block"] if base["block"] or model.post_block is not None else []),
        "layers": shape["layers"],
        "block": options or None,
        "block_layers": block_layers,
        "grid": grid,
        "picture_tokens": shape["picture tokens"],
        "vocabulary": shape["vocabulary"],
        "image_aspect_ratio": answerer.aspect,
        "base_image_aspect_ratio": base["aspect"],
        "record": [[name, "f2", [grid, grid]] for name in maps],
    }


# ---- which model it is compared with ----


class Named(NamedTuple):
    """A model as its flags name it, and what it consists of."""

    path: str
    base: str | None
    chain: Chain

    def key(self) -> list[Any]:
        return [fingerprint(folder) for folder in self.chain.folders]


def named(path: str, base: str | None, flag: str, cache_dir: str | None) -> Named:
    chain = read_chain(path, flag, cache_dir, base)
    if chain.blank:
        raise UserError(f"{flag} {path} is a language model, which sees no pictures; pass a LLaVA")
    return Named(path, base, chain)


def find_base(tuned: Named, cache_dir: str | None) -> Named:
    """The model that the training of ``tuned`` began from: what its last delta stands on, else what run.json names.

    Raises:
        UserError: neither says it.
    """
    chain = tuned.chain
    if len(chain.stages) > 1:
        below = chain.below()
        given = read_chain(tuned.base, "--model-base", cache_dir).newest if tuned.base else None
        # Needed where it is under what is compared with, and refused by the reader where it is that itself.
        return named(below.name, tuned.base if given in below.folders[1:] else None, "--base", cache_dir)
    card = chain.newest / FILE
    content = read_object(card) if card.is_file() else {}
    name = (content.get("arguments") or {}).get("model_name_or_path")
    if not name:
        raise UserError(
            f"--model-path {tuned.path} is a whole model and has no {FILE} that names what its training began from; "
            "pass that as --base"
        )
    at = Path(content.get("working_directory", "")) / name
    return named(str(at) if at.is_dir() else name, None, f"{card}: model_name_or_path", cache_dir)


def load(model: Named, args: argparse.Namespace, device: str) -> Answerer:
    """A model that gives its attention weights, ready to be asked."""
    tokenizer, loaded, image_processor, _ = load_pretrained_model(
        model.path,
        model.base,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        device=device,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        attn_implementation="eager",
        cache_dir=args.cache_dir,
    )
    conversation = template(args.conv_mode, "--conv-mode")
    return Answerer(loaded, tokenizer, image_processor, conversation, suffix=PROTOCOLS[args.prompt].suffix, scores=True)


# ---- the run ----


@command_line
def main() -> None:
    args = parse_args()
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: expected 1 or more")
    refuse_copies()
    if read_world().size > 1:
        raise UserError(
            "llava.eval.diagnose runs as one process; start it without torchrun, or with --nproc_per_node 1"
        )
    check_device_variables()
    args.conv_mode = args.conv_mode or PROTOCOLS[args.prompt].template
    template(args.conv_mode, "--conv-mode")
    names = list(SETS) if args.set == "all" else ["adversarial" if args.set == "adv" else args.set]
    sets = [read_questions(name, args.pope_path, args.coco_path, args.skip_missing_images) for name in names]
    shown = [Shown(picture, sha256(picture.path), list(picture.asked)) for picture in by_picture(sets)[: args.limit]]
    if not shown:
        raise UserError(f"--pope_path {args.pope_path}: no question is left about a picture that is there")
    quiet()
    tuned = named(args.model_path, args.model_base, "--model-path", args.cache_dir)
    base = named(args.base, None, "--base", args.cache_dir) if args.base else find_base(tuned, args.cache_dir)
    folder = output_dir(args.model_path, args.output_dir)
    device = take_card(read_world())
    say_device(read_world())

    asked = {
        "conv_mode": args.conv_mode,
        "protocol": args.prompt,
        "dtype": args.dtype or ("float32" if device == "cpu" else "float16"),
        "quantized": [args.load_8bit, args.load_4bit],
    }
    key = {"tuned": tuned.key(), "base": base.key(), **asked}
    keys = {q.name: key_of({**key, "limit": args.limit, "file": sha256(q.file), "of": len(q.labels)}) for q in sets}
    left = [q for q in sets if not is_done(files_of(folder, q.name), keys[q.name])]
    for questions in sets:
        if questions not in left:
            note(f"{files_of(folder, questions.name).rows} is there already")
    if left:
        with writing(folder):
            claim_folder(folder, "diagnose")
        with interruption.held():
            cache = Path(args.base_cache).expanduser() if args.base_cache else folder / BASE_CACHE
            records = compare(args, tuned, base, shown, asked, cache, folder, device)
            for questions in left:
                card = {
                    "format": FORMAT,
                    "set": questions.name,
                    "key": keys[questions.name],
                    "tuned": args.model_path,
                    "model_base": args.model_base,
                    "base": base.path,
                    **asked,
                    "suffix": PROTOCOLS[args.prompt].suffix,
                    "limit": args.limit,
                    "label_file": str(questions.file),
                    "label_sha256": sha256(questions.file),
                    **{name: value for name, value in records.header.items() if name != "record"},
                    "versions": versions(),
                }
                write_set(files_of(folder, questions.name), questions, shown, records, card)
            for file in folder.glob(f"{TUNED}.*"):
                file.unlink()
            if not args.base_cache:
                shutil.rmtree(cache, ignore_errors=True)
            interruption.ignore()
    print_table(folder, names)


def is_done(files: Files, key: str) -> bool:
    return all(file.is_file() for file in files) and read_object(files.card).get("key") == key


def compare(
    args: argparse.Namespace,
    tuned: Named,
    base: Named,
    shown: Sequence[Shown],
    asked: dict[str, Any],
    cache: Path,
    folder: Path,
    device: str,
) -> Records:
    """Both models over all questions, the base first and only where ``cache`` does not know it; the tuned's records."""
    of_base = Records(cache, "base", {"base": base.key(), **asked})
    if any(entry.left(of_base).texts for entry in shown):
        with writing(cache):
            claim_folder(cache, f"base.{of_base.key[:12]}")
        of_base.read()  # another process may have written to it meanwhile
        answerer = load(base, args, device)
        of_base.begin(base_header(answerer))
        left = [entry for entry in (entry.left(of_base) for entry in shown) if entry.texts]
        run_through(answerer, left, partial(keep_base, of_base), f"base {base.path}", args.skip_missing_images)
        del answerer
        gc.collect()  # hooks, modules and caches refer to each other; two 7B models do not fit together
        if device != "cpu":
            torch.cuda.empty_cache()
    else:
        note(f"{of_base.lines}: knows the base {base.path} already")
    of_tuned = Records(folder, TUNED, {"tuned": tuned.key(), "base": of_base.key, **asked})
    known = [entry.known(of_base) for entry in shown]  # all, but for pictures that could not be opened
    left = [entry for entry in (entry.left(of_tuned) for entry in known) if entry.texts]
    if left or of_tuned.header is None:
        answerer = load(tuned, args, device)
        of_tuned.begin(tuned_header(answerer, of_base.header))
        keep = partial(keep_tuned, of_tuned, of_base, answerer.yes_no)
        run_through(answerer, left, keep, f"tuned {tuned.path}", args.skip_missing_images)
    return of_tuned


def write_set(
    files: Files, questions: QuestionSet, shown: Sequence[Shown], records: Records, card: dict[str, Any]
) -> None:
    """The three files of a set, the card last: without it nothing is read."""
    found = {
        number: (entry.digest, text)
        for entry in shown
        for text, places in entry.picture.asked.items()
        for name, number in places
        if name == questions.name and (entry.digest, text) in records.places
    }
    order = [number for number in questions.questions if number in found]
    maps: dict[str, list[np.ndarray]] = {name: [] for name in records.dtype.names}
    rows = []
    for number in order:
        info, record = records[found[number]]
        values = {name: value for name, value in info.items() if name not in ("picture", "text")}
        row = {
            "question_id": number,
            "image": Path(questions.questions[number].image).name,
            "question": questions.questions[number].text,
            "label": questions.labels[number].label,
        }
        rows.append(row | values)
        for name in maps:
            maps[name].append(record[name])
    grid = records.header["grid"]
    stacked = {name: np.array(values, dtype=np.float16).reshape(-1, grid, grid) for name, values in maps.items()}
    with writing(files.card):
        half_written = [found for path in files for found in leftovers(path)]
        for old in [files.card, *half_written]:
            old.unlink(missing_ok=True)
        with atomic_write(files.maps, "wb") as file:
            np.savez_compressed(file, ids=np.array(order, dtype=np.int64), **stacked)
        with atomic_write(files.rows) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_json(files.card, {**card, "questions": len(rows)})


def print_table(folder: Path, names: Sequence[str]) -> None:
    """Means over each set's questions."""
    read = read_diagnostics(folder)
    print("| set | questions | KL | yes less no: base | tuned | attention to the picture: base | tuned |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        found = read[name]
        numbers = (found.kl, found.base_gap, found.tuned_gap, found.attention_base, found.attention_tuned)
        means = " | ".join(f"{float(values.mean()) if values.size else 0.0:.4f}" for values in numbers)
        print(f"| {name} | {len(found.ids)} | {means} |", flush=True)


if __name__ == "__main__":
    main()
