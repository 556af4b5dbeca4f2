#!/usr/bin/env python
"""POPE's three sets about the first images of its real files, against transformers asked one question at a time.

    python benchmarks/pope.py --json pope.json

Pictures are drawn, 640 x 480 JPEGs as COCO's. Ours is what ``pope_eval.py --set all`` runs behind the loading of the
model, files included. The other side is what its users write: for every question in the files' order open the picture,
``LlavaProcessor``, ``generate``, decode. It answers ``--sample`` evenly spaced questions of all three files, and its
time is scaled to all of them. Every answer has exactly so many tokens; those that both gave must be equal.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import duel, flops
from benchmarks.examples import draw
from benchmarks.models import BOS, EOS, PAD, REAL, TINY, Geometry, common_name, hf_model, image_processor, our_model
from llava.conversation import conv_templates
from llava.eval.pope import SETS, Protocol
from llava.files import read_jsonl

QUESTIONS = Path(__file__).resolve().parent.parent / "tests" / "golden" / "pope_questions"
MOST_IMAGES = 60  # of which the questions are there
PROTOCOL = Protocol("llava_v1", "")
SHARPER = 6.0  # what attention finds weighs more, so that answers differ between questions


class World:
    """Question files of the first ``images`` images, and a drawn picture for each."""

    def __init__(self, folder: Path, images: int, seed: int) -> None:
        self.folder = folder
        self.rows: dict[str, list[dict[str, Any]]] = {}
        names: list[str] = []
        for name in SETS:
            text = (QUESTIONS / f"coco_pope_{name}.json").read_text().splitlines(keepends=True)
            rows = [row for _, row in read_jsonl(QUESTIONS / f"coco_pope_{name}.json")]
            names = names or list(dict.fromkeys(row["image"] for row in rows))[:images]
            kept = [number for number, row in enumerate(rows) if row["image"] in names]
            self.rows[name] = [rows[number] for number in kept]
            (folder / f"coco_pope_{name}.json").write_text("".join(text[number] for number in kept))
        for name in names:
            draw(folder / name, f"{seed} {name}")

    @property
    def asked(self) -> list[tuple[str, int, str, str]]:
        """Set, id, picture and text of every question, in the files' order."""
        return [
            (name, row["question_id"], str(self.folder / row["image"]), row["text"])
            for name, rows in self.rows.items()
            for row in rows
        ]


def tokenizer_of(geometry: Geometry, texts: list[str]) -> Any:
    """A word a token, as Vicuna's vocabulary has most of these; the other ids are words that nobody says."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = ["<unk>", "<s>", "</s>", *words][: geometry.vocab_size - 1]
    vocabulary += [f"w{number}" for number in range(len(vocabulary), geometry.vocab_size - 1)]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*vocabulary, "<image>"])}, unk_token="<unk>"))
    fast.pre_tokenizer = splitter
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("</s>") == EOS
    return tokenizer


def prompt_of(text: str) -> str:
    """What both sides ask."""
    conversation = conv_templates[PROTOCOL.template].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{text}{PROTOCOL.suffix}")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def sharpen(model: Any) -> Any:
    """Random weights that look around: larger queries and outputs of attention. No token without a text, no end."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = common_name(name)
            if name.startswith("model.layers.") and ("q_proj" in name or "o_proj" in name):
                parameter.mul_(SHARPER)
            elif name == "lm_head.weight":
                parameter[[PAD, BOS, EOS, -1]] = 0
    return model


class Ours:
    """``pope_eval.py`` behind the loading of the model."""

    def __init__(
        self, geometry: Geometry, world: World, tokens: int, seed: int, compared: set[tuple[str, int]]
    ) -> None:
        from llava.eval.answer import Answerer, default_batch_size

        tokenizer = tokenizer_of(geometry, [prompt_of(text) for *_, text in world.asked])
        model = sharpen(our_model(geometry, seed))
        template = conv_templates[PROTOCOL.template]
        self.answerer = Answerer(model, tokenizer, image_processor(geometry), template, tokens, PROTOCOL.suffix)
        self.batch_size = default_batch_size(self.answerer, on_cuda=False)
        self.world, self.compared = world, compared

    def step(self) -> dict[str, Any]:
        from llava.distributed import World as Ranks
        from llava.eval.pope_run import answer_sets, read_questions

        folder = str(self.world.folder)
        with tempfile.TemporaryDirectory() as out:
            sets = [read_questions(name, folder, folder, skip_missing_images=False) for name in SETS]
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                answer_sets(self.answerer, sets, Path(out), {}, "hadpo", self.batch_size, Ranks(0, 0, 1))
            said = {
                (name, row["question_id"]): row["answer"]
                for name in SETS
                for _, row in read_jsonl(Path(out) / f"pope_{name}.jsonl")
            }
        return {"answers": {place: said[place] for place in self.compared}}


class Theirs:
    """``LlavaForConditionalGeneration``, a question at a time."""

    def __init__(
        self, geometry: Geometry, asked: list[tuple[str, int, str, str]], texts: list[str], tokens: int, seed: int
    ) -> None:
        from transformers import LlavaProcessor

        self.model = sharpen(hf_model(geometry, seed))
        self.processor = LlavaProcessor(
            image_processor(geometry),
            tokenizer_of(geometry, texts),
            patch_size=geometry.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        self.asked, self.tokens = asked, tokens

    def step(self) -> dict[str, Any]:
        from PIL import Image

        said = {}
        for name, number, path, text in self.asked:
            inputs = self.processor(images=Image.open(path), text=prompt_of(text), return_tensors="pt")
            inputs.pop("token_type_ids", None)
            out = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            said[name, number] = self.processor.batch_decode(new, skip_special_tokens=True)[0].strip()
        return {"answers": said}


def useful(geometry: Geometry, world: World, tokens: int) -> float:
    """Operations of distinct questions, each shared beginning once; every token but an answer's last is fed again."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.data.packing import pack_prompts
    from llava.mm_utils import tokenizer_image_token

    tokenizer = tokenizer_of(geometry, [prompt_of(text) for *_, text in world.asked])
    pairs = list(dict.fromkeys((path, text) for _, _, path, text in world.asked))
    pictures = {path: number for number, path in enumerate(dict.fromkeys(path for path, _ in pairs))}
    rows = [
        [
            (i, pictures[path]) if i == IMAGE_TOKEN_INDEX else i
            for i in tokenizer_image_token(prompt_of(text), tokenizer)
        ]
        for path, text in sorted(pairs, key=lambda pair: pictures[pair[0]])
    ]
    stream = pack_prompts(rows, geometry.tokens_per_image, None)
    seen = stream["position_ids"] + 1
    last = seen[stream["queries"]]
    fed = sum(int((last + step).sum()) for step in range(1, tokens))
    steps = (tokens - 1) * len(last)
    return flops.pictures(geometry, len(pictures)) + flops.decoder(
        geometry,
        flops.Amount(len(pictures), len(seen) + steps, int(seen.sum()) + fed, len(last) + steps, int(last.sum()) + fed),
    )


def main() -> int:
    parser = duel.options(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=40, help=f"of POPE's first {MOST_IMAGES}")
    parser.add_argument("--sample", type=int, default=60, help="questions that transformers answers (0: all)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 10], help="of every answer")
    args = parser.parse_args()
    if not 1 <= args.images <= MOST_IMAGES:
        parser.error(f"--images {args.images}: expected 1 to {MOST_IMAGES}")
    geometry = TINY if args.tiny else REAL

    records = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), args.images, args.seed)
        asked = world.asked
        number = min(args.sample or len(asked), len(asked))
        sample = [asked[i * len(asked) // number] for i in range(number)]
        compared = {(name, question) for name, question, *_ in sample}
        texts = [prompt_of(text) for *_, text in asked]
        for tokens in args.tokens:
            work = f"POPE, three sets, {args.images} images, answers of {tokens} tokens"
            against = f"LlavaForConditionalGeneration, one at a time ({number} of {len(asked)} questions)"
            if args.only not in f"{work} {against}":
                continue
            contenders = {
                "ours": partial(Ours, geometry, world, tokens, args.seed, compared),
                "theirs": partial(Theirs, geometry, sample, texts, tokens, args.seed),
            }
            row = duel.Row(work, against, "ours", "theirs", useful(geometry, world, tokens))
            (record,) = duel.run(contenders, [row], args.rounds, args.threads)
            scale = len(asked) / number
            record["ratio"] *= scale
            for kind in ("seconds", "processor_seconds"):
                record[kind][1] *= scale
            record["all_seconds"][1] = [seconds * scale for seconds in record["all_seconds"][1]]
            record["questions"] = {"asked": len(asked), "compared": number}
            records.append(record)
    return duel.report(records, args.json)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
