#!/usr/bin/env python
"""What a command costs before and around its work: scoring 9,000 answers, and the help of a training script.

    python benchmarks/startup.py --json startup.json

Whole processes, by the clock. The help is compared with a Python that imports transformers' ``TrainingArguments`` and
does nothing else, which no script on its trainer can do without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SETS = ("random", "popular", "adversarial")
QUESTIONS = 3000  # of every POPE set


def seconds(command: list[str], rounds: int) -> float:
    """Median of ``rounds`` runs, after one that fills the file cache."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def write_sets(folder: Path) -> None:
    """Labels and answers of three sets, as long as the real ones."""
    for name in SETS:
        labels, answers = [], []
        for number in range(1, QUESTIONS + 1):
            text = f"Is there a thing of kind {number % 80} in the image?"
            label = "yes" if number % 2 else "no"
            row = {"question_id": number, "image": f"COCO_val2014_{number // 6:012d}.jpg", "text": text, "label": label}
            labels.append(json.dumps(row))
            answers.append(
                json.dumps({"question_id": number, "question": text, "answer": "Yes, there is." * (number % 3 > 0)})
            )
        (folder / f"coco_pope_{name}.json").write_text("\n".join(labels) + "\n")
        (folder / f"pope_{name}.jsonl").write_text("\n".join(answers) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    parser.add_argument("--json", type=Path, help="write the seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sets(folder)
        answers = [str(folder / f"pope_{s}.jsonl") for s in SETS]
        labels = [str(folder / f"coco_pope_{s}.json") for s in SETS]
        score = seconds([sys.executable, "evaluate_pope.py", "--answers", *answers, "--labels", *labels], args.rounds)
    found = {
        "evaluate_pope.py, 9,000 answers": score,
        "train_dpo.py --help": seconds([sys.executable, "train_dpo.py", "--help"], args.rounds),
        "import of TrainingArguments": seconds(
            [sys.executable, "-c", "from transformers import TrainingArguments"], args.rounds
        ),
    }
    for what, value in found.items():
        print(f"{what}: {value:.2f} s")
    print(f"help over import: {found['train_dpo.py --help'] / found['import of TrainingArguments']:.2f}")
    if args.json:
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
