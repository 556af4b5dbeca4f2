"""Ask a LLaVA the questions of a file, one answer each or several: LLaVA's command, on the engine of ``pope_eval.py``.

    python -m llava.eval.model_vqa_loader --model-path liuhaotian/llava-v1.5-7b --question-file questions.jsonl \
        --image-folder COCO/val2014 --answers-file answers.jsonl --temperature 0 --conv-mode vicuna_v1

A line of the question file: ``{"question_id", "image", "text"}``. A line of the answers file, in the same order:
``{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}``; with ``--num_samples K`` a question has K of
them, with ``"sample"`` from 0. What is sampled depends on ``--seed``, the question's line and the sample alone, not on
processes or batches. A run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from pathlib import Path
from typing import Any

from llava import interruption
from llava.command_line import OneLineParser, refuse_copies
from llava.errors import UserError, command_line, note

SET = "questions"  # the one set there is


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        "python -m llava.eval.model_vqa_loader", description="Ask a LLaVA the questions of a file.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model-path", required=True, help="a whole model, a delta, or several in order: A,B")
    add("--model-base", help="where the model lies that the first delta was trained on")
    add("--image-folder", required=True, help="where the pictures lie: a folder, or a .zip")
    add("--question-file", required=True, help="JSON lines of question_id, image and text")
    add("--answers-file", required=True, help="where the answers go")
    add("--conv-mode", help="conversation template (default: the one the model was trained with)")
    add("--num-chunks", type=int, default=1, help="into how many parts the questions are split")
    add("--chunk-idx", type=int, default=0, help="which of the parts is asked, from 0")
    add("--temperature", type=float, default=0.2, help="of sampling (default 0.2, as LLaVA's); 0: the likeliest token")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens that have this share together")
    add("--top_k", type=int, default=50, help="and among so many (default 50, as LLaVA through transformers); 0: all")
    add("--num_beams", type=int, default=1, help="beam search, with --temperature 0; slow: questions one by one")
    add("--num_samples", type=int, default=1, help="answers to every question")
    add("--seed", type=int, default=0, help="of sampling")
    add("--max_new_tokens", type=int, default=128, help="at most, an answer")
    add("--load-8bit", action="store_true", help="8-bit weights (bitsandbytes)")
    add("--load-4bit", action="store_true", help="4-bit weights (bitsandbytes)")
    add("--dtype", choices=["float16", "bfloat16", "float32"], help="default: float16 on CUDA, float32 on the CPU")
    add("--attn_implementation", choices=["sdpa", "eager", "flash_attention_2"])
    add("--batch_size", type=int, help="answers at a time (default: what fits); 1: one by one, as upstream asks")
    add("--skip_missing_images", action="store_true", help="leave out questions whose picture is missing")
    add("--cache_dir", help="the hub's cache")
    args = parser.parse()
    for name in ("num_chunks", "num_beams", "num_samples", "max_new_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected 1 or more")
    if not 0 <= args.chunk_idx < args.num_chunks:
        raise UserError(f"--chunk-idx {args.chunk_idx}: expected 0 to {args.num_chunks - 1} (--num-chunks)")
    if args.temperature < 0 or args.top_k < 0:
        raise UserError("--temperature and --top_k: expected 0 or more")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p:g}: expected more than 0 and at most 1")
    if args.temperature == 0 and args.num_samples > 1:
        raise UserError("--num_samples: with --temperature 0 all samples are the same; pass a --temperature above 0")
    if args.temperature == 0 and args.top_p < 1:
        raise UserError("--top_p chooses what is sampled from, but --temperature 0 samples nothing; leave one out")
    if args.temperature > 0 and args.num_beams > 1:
        raise UserError(
            "--num_beams searches for the likeliest answer, --temperature samples one; pass --temperature 0"
        )
    return args


def read_questions(args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Questions of the chunk by their place in the file, with ``path`` and ``where``, every picture looked for.

    Raises:
        UserError: no such file, a broken line, or missing pictures.
    """
    from llava.data.images import drop_missing, join
    from llava.files import existing, field, read_jsonl, read_records

    path = existing(args.question_file, "--question-file")
    existing(args.image_folder, "--image-folder", directory=not args.image_folder.endswith(".zip"))
    rows: list[dict[str, Any]] = []
    # Upstream's are JSON lines by any name.
    listed = path.read_bytes()[:1024].lstrip()[:1] == b"["
    found = read_records(path) if listed else ((f"{path}: line {n}", row) for n, row in read_jsonl(path))
    for where, row in found:
        if "question_id" not in row:
            raise UserError(f"{where}: key 'question_id' is missing")
        image, text = (field(where, row, key, str) for key in ("image", "text"))
        rows.append({**row, "path": join(args.image_folder, image), "text": text, "where": where})
    size = math.ceil(len(rows) / args.num_chunks)  # as LLaVA splits them; the last parts may be smaller, or empty
    numbers = range(len(rows))[args.chunk_idx * size : (args.chunk_idx + 1) * size]
    records = [(rows[number]["where"], number) for number in numbers]
    if records:
        records = drop_missing(
            records, lambda number: [rows[number]["path"]], args.skip_missing_images, "--image-folder"
        )
    else:
        note(f"--chunk-idx {args.chunk_idx} of {args.num_chunks}: no question is left for it")
    return {number: rows[number] for _, number in records}


def by_picture(questions: dict[int, dict[str, Any]], samples: int, drawn: bool, at_most: int) -> list[Any]:
    """The pictures in the order of the file; one that needs more than ``at_most`` answers is there several times."""
    from llava.eval.asking import Picture

    wanted: dict[str, list[tuple[str, int]]] = {}
    for number, row in questions.items():
        wanted.setdefault(row["path"], []).extend((row["text"], number * samples + k) for k in range(samples))
    pictures = []
    for path, answers in wanted.items():
        for start in range(0, len(answers), at_most):
            part = answers[start : start + at_most]
            picture = Picture(path, questions[part[0][1] // samples]["where"], {}, apart=drawn)
            for text, place in part:
                picture.asked.setdefault(text, []).append((SET, place))
            pictures.append(picture)
    return pictures


def seed_of(seed: int, place: int, samples: int) -> int:
    """The seed of one sample; the first ones of a question are the same whatever their number."""
    number, sample = divmod(place, samples)
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {sample}".encode()).digest()[:8], "big") >> 1


@command_line
def main() -> None:
    args = parse_args()
    from llava.conversation import template, template_of
    from llava.distributed import check_device_variables, join_world, say_device, take_card
    from llava.files import sha256
    from llava.mm_utils import get_model_name_from_path

    refuse_copies()
    check_device_variables()
    if args.conv_mode:
        template(args.conv_mode, "--conv-mode")
    questions = read_questions(args)
    path = Path(args.answers_file).expanduser()
    if path.is_dir():
        raise UserError(f"--answers-file {path} is a folder; name a file in it")

    from llava.command_line import quiet
    from llava.eval.answer import Answerer, default_batch_size
    from llava.eval.answer_files import AnswerFile
    from llava.eval.asking import Progress, answered_by, answers_about, in_groups, prepared
    from llava.eval.pope_run import model_key
    from llava.model.builder import load_as_asked
    from llava.model.delta import split_names
    from llava.model.generation import Sampling

    quiet()
    world = join_world()
    device = take_card(world)
    say_device(world)
    which_model = model_key(args.model_path, args.model_base, args.cache_dir)  # refuses a path without a model
    tokenizer, model, image_processor = load_as_asked(args, device)
    conv_mode = args.conv_mode or template_of(model.config)
    sampling = Sampling(args.temperature, args.top_p, args.top_k) if args.temperature else None
    answerer = Answerer(
        model,
        tokenizer,
        image_processor,
        template(conv_mode),
        args.max_new_tokens,
        sampling=sampling,
        num_beams=args.num_beams,
    )
    if answerer.rows_because and args.batch_size != 1:
        note(f"questions are asked by separate rows: {answerer.rows_because}")
    batch_size = args.batch_size or world.rank_0s(default_batch_size(answerer, device != "cpu"))
    samples, model_id = args.num_samples, get_model_name_from_path(split_names(args.model_path)[-1])
    # Answers of a killed run are kept where all of this is the same.
    key = {
        **which_model,
        "conv_mode": conv_mode,
        "max_new_tokens": args.max_new_tokens,
        "sampling": [*sampling, args.seed, samples] if sampling else args.num_beams,
        "dtype": str(model.dtype),
        "quantized": [args.load_8bit, args.load_4bit],
        "batch_size": batch_size,
        "questions": [sha256(args.question_file), args.num_chunks, args.chunk_idx, len(questions)],
        "image_folder": str(Path(args.image_folder).expanduser().resolve()),
    }
    file = AnswerFile(path, key, world.rank, id_key="answer_id")
    ids = {f"{number}-{k}": number * samples + k for number in questions for k in range(samples)}
    done = {(SET, ids[name]) for name in file.answered() if name in ids} if world.rank == 0 else None
    done = world.rank_0s(done)
    file.begin()
    pictures = by_picture(questions, samples, sampling is not None, max(batch_size, 1))
    groups = [group for group in in_groups(pictures, batch_size) if not done.issuperset(answered_by(group))]
    mine = groups[world.rank :: world.size]
    left_out: set[int] = set()
    # From here on a signal ends the run between two groups of questions.
    with interruption.held(), Progress("questions", len(ids), groups, mine, done, world) as progress:
        for group, pixels in prepared(answerer, mine):
            interruption.stop_if_requested("its answers are written, and the same command asks only the rest")
            drawn_by = (lambda place: seed_of(args.seed, place[1], samples)) if sampling else None
            said = answers_about(answerer, group, pixels, batch_size, args.skip_missing_images, drawn_by)
            rows = {}
            for text, places, answer in said:
                for _, place in places:
                    number, k = divmod(place, samples)
                    rows[place] = {
                        "question_id": questions[number]["question_id"],
                        "prompt": text,
                        "text": answer.text,
                        "answer_id": f"{number}-{k}",
                        "model_id": model_id,
                        **({"sample": k} if samples > 1 else {}),
                        "metadata": {},
                    }
            file.append(row for place, row in rows.items() if (SET, place) not in done)
            left_out.update(place for _, place in answered_by(group) if place not in rows and (SET, place) not in done)
            progress.add(group)
        left_out = set().union(*world.gather(left_out))
        if world.rank == 0:
            written = file.finish([name for name, place in ids.items() if place not in left_out])
            note(f"{len(written)} answers in {path}")
        interruption.ignore()


if __name__ == "__main__":
    main()
