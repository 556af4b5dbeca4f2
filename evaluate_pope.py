#!/usr/bin/env python
"""POPE answers + labels -> confusion counts and a row per set for the results table. Needs no GPU and no torch.

python evaluate_pope.py --answers runs/llava-7b/pope/pope_*.jsonl --labels POPE/output/coco/coco_pope_*.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from llava.command_line import OneLineParser
from llava.errors import UserError, command_line
from llava.eval.pope import answers_of, pair_files, read_answers, read_labels, score, table_header, table_row
from llava.files import existing, write_json


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(description="Score POPE answers.", allow_abbrev=False)
    add = parser.add_argument
    files = {"nargs": "+", "action": "extend", "required": True, "metavar": "FILE"}
    add(
        "--answers",
        help="answers.jsonl of ours, HA-DPO's or LLaVA's: one per set, or LLaVA's file of all sets",
        **files,
    )
    add("--labels", help="coco_pope_{random,popular,adversarial}.json; the set is told from the file's name", **files)
    add("--json", metavar="FILE", help="also write the metrics as JSON; '-': to stdout, and the table to stderr")
    add("--model", help="the table's Model column (default: the folder of the answers, or the one above 'pope')")
    add("--hadpo", default="-", metavar="MARK", help="the table's HA-DPO column, any text (default: -)")
    return parser.parse()


def model_name(answers_file: Path) -> str:
    """The folder a run wrote into: 'llava-7b' for ``llava-7b/pope_adv.jsonl`` and ``llava-7b/pope/adv.jsonl``."""
    folder = Path(os.path.abspath(answers_file)).parent  # not resolve(): a link's own name is the one the user chose
    return (folder.parent if folder.name == "pope" else folder).name


def write_metrics(path: str, metrics: dict[str, dict[str, float | int]]) -> None:
    """Write ``--json FILE``, or print it for ``--json -``."""
    if path == "-":
        print(json.dumps(metrics, indent=2))
        return
    try:
        write_json(Path(path).expanduser(), metrics)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from None


@command_line
def main() -> None:
    args = parse_args()
    answers = {path: read_answers(path) for path in (existing(name, "--answers") for name in args.answers)}
    pairs = pair_files(answers, [existing(name, "--labels") for name in args.labels])

    confusions, rows = {}, []
    for name, answers_file, labels_file in pairs:
        picked = answers_of(answers[answers_file], name, answers_file)
        confusions[name] = score(read_labels(labels_file), picked, labels_file, answers_file)
        rows.append(table_row(args.model or model_name(answers_file), name, args.hadpo, confusions[name]))

    if args.json is not None:
        write_metrics(args.json, {name: c.as_dict() for name, c in confusions.items()})
    out = sys.stderr if args.json == "-" else sys.stdout
    for name, c in confusions.items():
        print(f"{name}: TP {c.tp} FP {c.fp} TN {c.tn} FN {c.fn}", file=out)
    print(table_header(), *rows, sep="\n", file=out)
    if unparsed := sum(c.unparsed for c in confusions.values()):
        print(f"note: {unparsed} answers say neither yes nor no; they count as yes, as in POPE's evaluate.py", file=out)


if __name__ == "__main__":
    main()
