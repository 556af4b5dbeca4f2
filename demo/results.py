"""What the demo shows: the table, the curves, and what DPO changed on some test pictures."""

from __future__ import annotations

import random
from pathlib import Path

from demo import data
from demo.report import Curve, Shown, write_report
from llava.eval.pope import (
    SETS,
    UNNAMED,
    Confusion,
    parse_answer,
    read_answers,
    read_labels,
    read_questions_of,
    score,
    table_header,
    table_row,
)
from llava.files import atomic_write, read_json

MODEL = "demo-llava"
WITHOUT, WITH = "\u2717", "\u2713"  # the HA-DPO column
BEFORE_AND_AFTER = ((WITHOUT, "pope"), (WITH, "pope-ha-dpo"))  # that, and where the answers are


def write(out: Path, seed: int, times: dict[str, float]) -> str:
    """``table.md`` and ``report.html`` of a run; returns the table."""
    rows = [(MODEL, name, mark, counts(out, folder, name)) for mark, folder in BEFORE_AND_AFTER for name in SETS]
    table = write_table(out, [table_header(), *(table_row(*row) for row in rows)])
    page = out / "report.html"
    write_report(page, rows=rows, curves=_curves(out), shown=_shown(out, seed), times=times, facts=_facts(out, seed))
    return table


def write_table(out: Path, lines: list[str]) -> str:
    """``table.md``; returns what is in it."""
    table = "\n".join(lines)
    with atomic_write(out / "table.md") as file:
        file.write(table + "\n")
    return table


def counts(out: Path, folder: str | Path, name: str) -> Confusion:
    """Counts of one set; ``folder``, in ``out`` or anywhere, holds the answers; as evaluate_pope.py makes them."""
    labels, file = out / f"world/pope/coco_pope_{name}.json", out / folder / f"pope_{name}.jsonl"
    return score(read_labels(labels), read_answers(file)[UNNAMED], labels, file)


def _curves(out: Path) -> list[Curve]:
    """What the trainings logged."""
    wanted = (
        ("DPO: reward margin", "rewards/margins", "llava-ha-dpo"),
        ("DPO: loss", "loss", "llava-ha-dpo"),
        ("Connector training: loss", "loss", "connector"),
        ("Instruction tuning: loss", "loss", "llava"),
    )
    found = []
    for title, name, folder in wanted:
        logs = [log for log in read_json(out / folder / "trainer_state.json")["log_history"] if name in log]
        found.append(Curve(title, name, [log["step"] for log in logs], [log[name] for log in logs]))
    return found


def _shown(out: Path, seed: int) -> list[Shown]:
    """Twelve test pictures by lot, one adversarial question each: eight whose answer DPO turned, four it did not."""
    file = out / "world/pope/coco_pope_adversarial.json"
    labels, questions = read_labels(file), read_questions_of(file)
    before, after = (
        read_answers(out / folder / "pope_adversarial.jsonl")[UNNAMED] for folder in ("pope", "pope-ha-dpo")
    )
    drawn = random.Random(f"shown {seed}").sample(sorted(questions), len(questions))
    turned = [n for n in drawn if parse_answer(before[n].text) != parse_answer(after[n].text)]
    picked: dict[str, int] = {}
    for numbers, until in ((turned, 8), (drawn, 12)):
        for number in numbers:
            if len(picked) < until and (until == 8 or number not in turned):
                picked.setdefault(questions[number][0], number)
    return [
        Shown(
            out / "world/coco/val2014" / image,
            questions[number][1],
            labels[number].label,
            before[number].text,
            after[number].text,
        )
        for image, number in picked.items()
    ]


def _facts(out: Path, seed: int) -> list[tuple[str, str]]:
    """What a reader needs to repeat the run."""
    card = read_json(out / "llava-ha-dpo/run.json")
    pairs = read_json(out / "ha-dpo/pope_data.json")
    wrong = sum(not pair["correct"] for pair in pairs)
    asked = len(read_labels(out / "world/probe/coco_pope_adversarial.json"))
    asked_about = len({image for image, _ in read_questions_of(out / "world/pope/coco_pope_random.json").values()})
    described = len(read_json(out / "ha-dpo/desc_data.json"))
    return [
        ("seed", str(seed)),
        ("training pictures", f"{data.TRAINING}, of which {data.TALKED_ABOUT} in the instruction data"),
        (
            "test pictures",
            f"{data.TEST}, never trained on; POPE asks about {asked_about}, which show three kinds or more",
        ),
        ("questions about other training pictures", f"{asked}; {wrong} wrong answers became DPO's yes/no pairs"),
        ("descriptions of training pictures", f"{data.DESCRIBED}, {described} name what is not there"),
        ("machine", f"{card['hardware']['cpus']} cores, {card['hardware']['platform']}, no GPU used"),
        ("versions", ", ".join(f"{name} {version}" for name, version in card["versions"].items() if version)),
    ]
