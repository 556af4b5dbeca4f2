#!/usr/bin/env python
"""How long a file of training records takes to open, and how much memory.

    python benchmarks/opening.py --folder /tmp/opening --json opening.json

Files like LLaVA-CC3M-Pretrain-595K's chat.json and llava_v1_5_mix665k.json are made up by a seed. Every opening is a
process of its own: ``json.load`` of the file, the first opening, which makes the index, and one that finds it.
Memory is what the process's largest resident set grew by. The records that the index finds are compared with
``json.load``'s, all of them. With ``--pictures`` an empty file is made for every name, and the openings look for all of
them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava.files import write_json

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "a",
    "the",
    "man",
    "woman",
    "dog",
    "red",
    "on",
    "in",
    "café",
    "street",
    "with",
    "small",
    "water",
    "résumé",
    "街",
)
QUESTIONS = ("Provide a brief description of the given image.", "Write a terse but informative summary of the picture.")


def chat(count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Records like LLaVA-CC3M-Pretrain-595K's: one picture, a question, a caption of about ten words."""
    for number in range(count):
        question = draw.choice(QUESTIONS)
        yield {
            "id": f"GCC_train_{number:09d}",
            "image": f"GCC_train_{number:09d}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}" if number % 2 else f"{question}\n<image>"},
                {"from": "gpt", "value": " ".join(draw.choices(WORDS, k=draw.randint(6, 14)))},
            ],
        }


def mix(count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Records like llava_v1_5_mix665k's: several turns, about 1.6 kB; one in ten has no picture."""
    for number in range(count):
        turns = []
        for turn in range(draw.randint(2, 8)):
            mark = "<image>\n" if turn == 0 and number % 10 else ""
            turns.append({"from": "human", "value": mark + " ".join(draw.choices(WORDS, k=draw.randint(5, 20)))})
            turns.append({"from": "gpt", "value": " ".join(draw.choices(WORDS, k=draw.randint(10, 75)))})
        image = {"image": f"coco/train2017/{number:012d}.jpg"} if number % 10 else {}
        yield {"id": f"{number:012d}", **image, "conversations": turns}


def write(path: Path, kind: str, count: int, seed: int) -> None:
    """A made-up file of ``count`` records, as ``json.dump`` writes it without escapes."""
    records = list({"chat": chat, "mix": mix}[kind](count, random.Random(seed)))
    with path.open("w", encoding="utf-8") as file:
        json.dump(records, file, ensure_ascii=False)


def load(path: Path) -> None:
    with path.open(encoding="utf-8") as file:
        json.load(file)


def peak() -> int:
    """KiB of this program's largest resident set; getrusage's begins with that of the process which started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("/proc/self/status has no VmHWM; run this on Linux")
    return int(found[1])


def work(task: str, path: Path, folder: Path | None) -> dict[str, Any]:
    """One measurement in this process: seconds and MiB that the resident set's peak grew by."""
    from llava.data.records import RecordFile, missing_pictures

    before = peak()
    start = time.perf_counter()
    result: dict[str, Any] = {}
    if task == "json.load":
        load(path)
    elif task == "equal":
        with path.open(encoding="utf-8") as file:
            wanted = json.load(file)
        found = RecordFile(path)
        result["records"] = len(found)
        result["equal"] = len(found) == len(wanted) and all(
            found[number] == record for number, record in enumerate(wanted)
        )
    else:
        file = RecordFile(path)
        result["open_s"] = round(time.perf_counter() - start, 3)
        if folder is not None:
            result["missing"] = len(missing_pictures(file, str(folder)))
    result["seconds"] = round(time.perf_counter() - start, 3)
    result["mib"] = round((peak() - before) / 1024, 1)
    return result


def measure(task: str, path: Path, folder: Path | None) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--task", task, "--file", str(path)]
    command += ["--pictures_in", str(folder)] if folder else []
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return json.loads(said.splitlines()[-1])


def make_pictures(folder: Path, path: Path) -> None:
    from llava.data.records import RecordFile

    for name in RecordFile(path).all_names():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("opening"), help="where the files are made")
    parser.add_argument("--chat", type=int, default=600_000, help="records of the file like chat.json")
    parser.add_argument("--mix", type=int, default=150_000, help="records of the file like mix665k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; medians are reported")
    parser.add_argument("--pictures", action="store_true", help="make an empty file for every picture, look for them")
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pictures_in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(work(args.task, args.file, args.pictures_in)))
        return 0

    args.folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for kind, count in (("chat", args.chat), ("mix", args.mix)):
        path = args.folder / f"{kind}_{count}.json"
        if not path.exists():
            write(path, kind, count, args.seed)
        folder = args.folder / "pictures" if args.pictures else None
        if folder is not None:
            make_pictures(folder, path)
        index = path.with_name(f"{path.name}.index")
        rows: dict[str, list[dict[str, Any]]] = {"json.load": [], "first": [], "later": []}
        for _ in range(args.rounds):  # in turns: a busy machine is busy for all of them
            rows["json.load"].append(measure("json.load", path, None))
            index.unlink(missing_ok=True)
            rows["first"].append(measure("first", path, folder))
            rows["later"].append(measure("later", path, folder))
        middle = {
            task: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for task, runs in rows.items()
        }
        middle["first"]["of_json_load"] = round(middle["first"]["open_s"] / middle["json.load"]["seconds"], 3)
        figures[kind] = {"bytes": path.stat().st_size, **middle, "equal": measure("equal", path, None)}
        print(json.dumps({kind: figures[kind]}, indent=1))
    if args.json:
        write_json(args.json, figures)
    return 0 if all(kind["equal"]["equal"] for kind in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
