"""Let a model describe training pictures: what HA-DPO corrects, and gives back as preference pairs.

python -m demo.describe --model-path CHECKPOINT --annotations instances.json --first 1600 --count 300 --out said.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from demo.data import description_question, read_scenes
from llava.command_line import quiet
from llava.conversation import conv_templates
from llava.errors import command_line
from llava.eval.answer import Answerer, Question
from llava.eval.answer_files import AnswerFile
from llava.eval.asking import LOG_INTERVAL
from llava.eval.pope_run import model_key
from llava.model.builder import load_pretrained_model

BATCH = 20


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--annotations", type=Path, required=True, help="instances.json beside the pictures")
    parser.add_argument("--first", type=int, required=True, help="pictures to pass over")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    quiet()
    tokenizer, model, image_processor, _ = load_pretrained_model(args.model_path, None, device="cpu")
    answerer = Answerer(model, tokenizer, image_processor, conv_templates["v1"], max_new_tokens=80)

    names = list(read_scenes(args.annotations))[args.first : args.first + args.count]
    questions = {
        i: Question(str(args.annotations.parent / name), description_question(i), f"{args.annotations}: {name}")
        for i, name in enumerate(names)
    }
    key = {
        **model_key(args.model_path, None),
        "first": args.first,
        "count": args.count,
        "annotations": args.annotations.stat().st_size,
    }
    file = AnswerFile(args.out, key)
    done, ids = file.answered().keys(), list(questions)
    file.begin()
    # Whole batches: what a killed run left behind changes no batch, and so no rounding.
    batches = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
    for batch in tqdm([b for b in batches if not done >= set(b)], desc="descriptions", mininterval=LOG_INTERVAL):
        texts = answerer.answer([questions[i] for i in batch])
        file.append({"question_id": i, "image": names[i], "text": text} for i, text in zip(batch, texts, strict=True))
    file.finish(ids)


if __name__ == "__main__":
    main()
