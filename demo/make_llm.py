"""The demo's language model, from nothing: a SentencePiece vocabulary and a small Llama that has only read text.

    python -m demo.make_llm --output_dir demo/weights/llm

It reads tags, captions and descriptions of scenes nobody drew, and conversations in LLaVA's template in which one of
them stands where LLaVA puts the picture. So it knows the words, what keeps company with what, and how to answer from
what it has been told; it has seen no picture.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from demo import language
from demo.things import PLACES, THINGS
from demo.world import imagine
from llava.constants import IGNORE_INDEX
from llava.conversation import Piece, conv_templates
from llava.data.supervision import tokenize_pieces
from llava.files import atomic_folder, write_json
from llava.tokenization import load_tokenizer

VOCABULARY = 640
TEMPLATES = ("v1", "llava_v1")  # the one LLaVA trains in, and the one HA-DPO evaluates in


def plain_text(rng: random.Random) -> list[Piece]:
    """A caption or a description, all of it to be learned; often behind the tags of its picture."""
    scene = imagine(rng)
    text = language.caption(scene) if rng.random() < 0.5 else language.description(scene)
    tags = [Piece(language.tags(scene, rng) + rng.choice([" ", "\n"]))] if rng.random() < 0.7 else []
    return [*tags, Piece(f"{text}</s>", supervised=True)]


def talk(rng: random.Random) -> list[Piece]:
    """A conversation about a scene that the first turn tells; the answers are to be learned."""
    scene = imagine(rng)
    conversation = conv_templates[rng.choice(TEMPLATES)].copy()
    if rng.random() < 0.5:
        conversation.system = ""
    told = language.tags(scene, rng)
    if rng.random() < 0.4:
        told = language.description(scene) if rng.random() < 0.5 else language.caption(scene)
    turns = language.conversation(scene, rng, rounds=8, share_of_yes=0.5)
    for index, (question, answer) in enumerate(turns):
        conversation.append_message(conversation.roles[0], f"{told}\n{question}" if index == 0 else question)
        conversation.append_message(conversation.roles[1], answer)
    return list(conversation.pieces())


def make_tokenizer(folder: Path, seed: int) -> None:
    """A byte-pair vocabulary with Llama's special tokens and settings, trained on the world's text."""
    rng = random.Random(seed)
    # Every word often enough to become one piece, </s> not learned as text.
    texts = ["".join(piece.text for piece in talk(rng)).replace("</s>", " ") for _ in range(3000)]
    texts += [f"{language.question(k)} {language.answer(k, True)} {language.answer(k, False)}" for k in THINGS] * 20
    texts += [f"{name} {word}" for name in PLACES for word in language.NUMBERS] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        user_defined_symbols=["\n"],  # a piece of its own, as in Llama's vocabulary: pictures end with one
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
    write_json(folder / "tokenizer_config.json", {**settings, **special, "model_max_length": 2048})


def batches(tokenizer: Any, seed: int, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels (size, length), one text a row; one batch in four holds many short texts instead."""
    rng = random.Random(seed)
    while True:
        kind, count = (plain_text, 4 * size) if rng.random() < 1 / 4 else (talk, size)
        rows = [tokenize_pieces(kind(rng), tokenizer) for _ in range(count)]
        ids, labels = (
            pad_sequence([torch.tensor(row[side]) for row in rows], batch_first=True, padding_value=padding)
            for side, padding in ((0, 0), (1, IGNORE_INDEX))
        )
        yield ids, labels


def told_right(logits: torch.Tensor, labels: torch.Tensor, yes: int, no: int) -> tuple[int, int]:
    """How many yes/no answers begin with the right word, and how many there are."""
    asked = (labels[:, 1:] == yes) | (labels[:, 1:] == no)
    says_yes = (logits[:, :-1, yes] > logits[:, :-1, no])[asked]
    return (says_yes == (labels[:, 1:][asked] == yes)).sum().item(), asked.sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo/weights/llm"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)  # on every machine: sums depend on their number
    with atomic_folder(args.output_dir) as folder:
        make_tokenizer(folder, args.seed)
        train(args, folder, began)
    print(f"{args.output_dir}: {time.monotonic() - began:.0f} s")


def train(args: argparse.Namespace, folder: Path, began: float) -> None:
    """Read ``args.steps`` batches and save the model into ``folder``, where the tokenizer is."""
    tokenizer = load_tokenizer(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=160,
            intermediate_size=432,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            pad_token_id=0,
            attn_implementation="sdpa",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(i / args.steps, 1)))),
    )
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    right = asked = 0
    stream = batches(tokenizer, args.seed + 1, args.batch_size)
    for step in range(1, args.steps + 1):
        ids, labels = next(stream)
        # Padding is on the right, behind every label: it needs no mask.
        out = model(input_ids=ids, labels=labels)
        loss = out.loss
        right, asked = (
            old + new for old, new in zip((right, asked), told_right(out.logits, labels, yes, no), strict=True)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == args.steps:
            said = f"loss {loss.item():.3f}, yes or no right {right / max(asked, 1):.1%}"
            print(f"step {step}/{args.steps} {said}, {time.monotonic() - began:.0f} s", flush=True)
            right = asked = 0
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.half().save_pretrained(folder)
    print(f"{model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
