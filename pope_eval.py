#!/usr/bin/env python
"""Ask a LLaVA the POPE questions; write its answers and print the results row.

    torchrun --nproc_per_node 2 --master_port $RANDOM pope_eval.py --coco_path COCO --pope_path POPE \
        --model-path checkpoints/ha-dpo --model-base liuhaotian/llava-v1.5-7b --set popular

Answers go to ``--output_dir`` (by default ``pope/`` inside the checkpoint) as ``pope_{set}.jsonl``. All questions about
a picture are answered together, and with ``--set all`` those that the sets share once. A run that was killed goes on
where it was.
"""

from __future__ import annotations

import argparse

from llava import interruption
from llava.command_line import OneLineParser, refuse_copies
from llava.errors import UserError, command_line, note
from llava.eval.pope import PROTOCOLS
from llava.status import Status

SETS = {"random": "random", "popular": "popular", "adv": "adversarial", "adversarial": "adversarial"}
IN_HEARTBEAT = ("accuracy", "f1", "yes_ratio")


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(description="Ask a LLaVA the POPE questions.", allow_abbrev=False)
    add = parser.add_argument
    add("--model-path", required=True, help="a whole model, a delta, or several in order: A,B")
    add("--model-base", help="where the model lies that the first delta was trained on")
    add("--coco_path", required=True, help="COCO 2014, with val2014 inside")
    add("--pope_path", required=True, help="folder of coco_pope_*.json (or POPE's repository), or one such file")
    add("--set", default="popular", choices=[*SETS, "all"], help="which questions (adv = adversarial)")
    add("--output_dir", help="where the answers go")
    add("--load-8bit", action="store_true", help="8-bit weights (bitsandbytes)")
    add("--load-4bit", action="store_true", help="4-bit weights (bitsandbytes)")
    add("--dtype", choices=["float16", "bfloat16", "float32"], help="default: float16 on CUDA, float32 on the CPU")
    add("--attn_implementation", choices=["sdpa", "eager", "flash_attention_2"])
    add(
        "--prompt",
        default="hadpo",
        choices=list(PROTOCOLS),
        help="hadpo: the bare question, in template llava_v1; llava: with 'Answer the question using a single word or "
        "phrase.', in vicuna_v1 (LLaVA's published numbers); their numbers do not compare",
    )
    add("--conv-mode", help="conversation template, instead of the one that --prompt names")
    add("--scores", action="store_true", help="write 'score', the probability of yes (against no), with every answer")
    add("--max_new_tokens", type=int, default=512)
    add(
        "--batch_size",
        type=int,
        help="questions at a time, those about one picture never parted (default: what fits); 1: one by one, as "
        "upstream asks, which half precision rounds otherwise than many together",
    )
    add("--skip_missing_images", action="store_true", help="leave out questions whose picture is missing")
    add("--cache_dir", help="the hub's cache")
    return parser.parse()


@command_line
def main() -> None:
    args = parse_args()
    from llava.conversation import template
    from llava.distributed import check_device_variables, join_world, say_device, take_card
    from llava.eval.pope_run import answer_sets, model_key, output_dir, read_questions
    from llava.files import claim_folder, leftovers

    for flag in ("batch_size", "max_new_tokens"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected 1 or more")
    refuse_copies()
    check_device_variables()
    protocol = PROTOCOLS[args.prompt]
    args.conv_mode = args.conv_mode or protocol.template
    conversation = template(args.conv_mode, "--conv-mode")
    names = sorted(set(SETS.values()), key=list(SETS.values()).index) if args.set == "all" else [SETS[args.set]]
    questions = {n: read_questions(n, args.pope_path, args.coco_path, args.skip_missing_images) for n in names}
    folder = output_dir(args.model_path, args.output_dir)

    from llava.command_line import quiet
    from llava.eval.answer import Answerer, default_batch_size
    from llava.eval.pope import table_header, table_row
    from llava.model.builder import load_as_asked
    from llava.run_card import RunCard

    quiet()
    world = join_world()
    device = take_card(world)
    say_device(world)
    which_model = model_key(args.model_path, args.model_base, args.cache_dir)  # refuses a path without a model
    tokenizer, model, image_processor = load_as_asked(args, device)
    answerer = Answerer(
        model, tokenizer, image_processor, conversation, args.max_new_tokens, protocol.suffix, args.scores
    )
    if answerer.rows_because and args.batch_size != 1:
        note(f"questions are asked by separate rows: {answerer.rows_because}")
    args.batch_size = args.batch_size or world.rank_0s(default_batch_size(answerer, device != "cpu"))
    # Answers of a killed run are kept where all of this is the same.
    settings = {
        **which_model,
        "conv_mode": args.conv_mode,
        "max_new_tokens": args.max_new_tokens,
        "dtype": str(model.dtype),
        "quantized": [args.load_8bit, args.load_4bit],
        "scores": args.scores,
    }
    asked = SETS.get(args.set, args.set)
    heartbeat = Status(folder, "pope_eval.py", "questions", world.size, world.rank == 0, f"status_{asked}.json")
    label = folder.resolve().parent.name if folder.name == "pope" else folder.resolve().name
    data_files = [q.file for q in questions.values()]
    card = RunCard(folder, vars(args), data_files, seed=None, name=f"run_{asked}.json")
    card.content["protocol"] = args.prompt
    if world.rank == 0:
        claim_folder(folder, f"run_{asked}")
        for file in [*leftovers(card.path), *leftovers(heartbeat.path)]:
            file.unlink(missing_ok=True)
    # From here on a signal ends the run between two groups of questions; after the last one, it changes nothing.
    with interruption.held():
        try:
            counts = answer_sets(
                answerer,
                list(questions.values()),
                folder,
                settings,
                args.prompt,
                args.batch_size,
                world,
                skip_broken=args.skip_missing_images,
            )
        except interruption.Stopped as stopped:
            heartbeat.stop(str(stopped))
            raise
        if world.rank == 0:
            card.finish({name: c.as_dict() for name, c in counts.items()})
            metrics = {f"{n}/{m}": round(getattr(c, m), 4) for n, c in counts.items() for m in IN_HEARTBEAT}
            heartbeat.update(state="finished", seconds_left=None, metrics=metrics)
            rows = (table_row(label, name, "-", c) for name, c in counts.items())
            print(table_header(), *rows, sep="\n", flush=True)
        interruption.ignore()


if __name__ == "__main__":
    main()
