"""A POPE run: which questions, where the answers go, one set answered by all ranks together, and its counts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.data.images import drop_missing
from llava.distributed import World
from llava.errors import BrokenImage, UserError, warn
from llava.eval.answer import Answerer, Question
from llava.eval.answer_files import AnswerFile
from llava.eval.pope import Answer, Confusion, Label, read_labels, read_questions_of, score, set_of
from llava.files import sha256
from llava.model.checkpoint import fingerprint

# Seconds between updates of the progress bar: a queued job's log should not be made of them.
MIN_INTERVAL = 0.5 if sys.stderr.isatty() else 30.0


@dataclass
class QuestionSet:
    """One POPE set: its file, and its questions and labels by id, in file order."""

    name: str
    file: Path
    questions: dict[int, Question]
    labels: dict[int, Label]


def read_questions(name: str, pope_path: str, coco_path: str, skip_missing_images: bool) -> QuestionSet:
    """Questions of the set ``name``, every picture looked for.

    Raises:
        UserError: no such file, a broken record, or missing pictures.
    """
    file = _question_file(name, pope_path)
    labels = read_labels(file)
    root = Path(coco_path).expanduser()
    if not root.is_dir():
        raise UserError(f"--coco_path {coco_path}: no such folder")
    pictures = root / "val2014" if (root / "val2014").is_dir() else root
    asked = {
        number: Question(str(pictures / image), text, labels[number].where)
        for number, (image, text) in read_questions_of(file).items()
    }
    records = [(question.where, number) for number, question in asked.items()]
    kept = drop_missing(records, lambda number: [asked[number].image], skip_missing_images, "--coco_path")
    ids = [number for _, number in kept]
    return QuestionSet(name, file, {n: asked[n] for n in ids}, {n: labels[n] for n in ids})


def _question_file(name: str, pope_path: str) -> Path:
    given = Path(pope_path).expanduser()
    if given.is_file():
        if set_of(given) != name:
            raise UserError(f"--pope_path {pope_path}: not the set '{name}' by its name; pass the folder of the files")
        return given
    places = [given / f"coco_pope_{name}.json", given / "output" / "coco" / f"coco_pope_{name}.json"]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"--pope_path {pope_path}: no {places[0].name} there (nor in output/coco)")


def output_dir(model_path: str, given: str | None) -> Path:
    """``--output_dir``, else ``pope/`` inside the checkpoint, else (a hub id) ``pope_results/NAME/``."""
    if given:
        return Path(given)
    model = Path(model_path).expanduser()
    return model / "pope" if model.is_dir() else Path("pope_results") / model_path.strip("/").split("/")[-1]


def answer_set(
    answerer: Answerer,
    questions: QuestionSet,
    folder: Path,
    settings: dict[str, Any],
    batch_size: int,
    world: World,
    skip_broken: bool = False,
) -> Confusion:
    """Answer one set on all ranks and score it; ``settings`` is what the answers depend on besides the questions.

    ``skip_broken`` leaves out questions whose picture cannot be opened; without it such a picture ends the run.
    """
    path = folder / f"pope_{questions.name}.jsonl"
    key = {**settings, "questions": sha256(questions.file), "ids": len(questions.questions)}
    answers_file = AnswerFile(path, key, world.rank, world.barrier)
    done = answers_file.resume()
    ids = list(questions.questions)
    # Batches do not depend on the number of ranks, nor on what a killed run left behind: rounding stays the same.
    batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    mine = [batch for batch in batches if not done.keys() >= set(batch)][world.rank :: world.size]
    with tqdm(
        total=sum(map(len, mine)),
        desc=f"POPE {questions.name}",
        unit="question",
        disable=world.rank != 0,
        mininterval=MIN_INTERVAL,
    ) as progress:
        for batch in mine:
            answers_file.append(_rows(answerer, questions, batch, skip_broken))
            progress.update(len(batch))
    rows = answers_file.merge(ids)
    answers = {row["question_id"]: Answer(row["answer"], row["question"], str(path)) for row in rows}
    labels = {number: label for number, label in questions.labels.items() if number in answers or not skip_broken}
    return score(labels, answers, questions.file, path)


def _rows(answerer: Answerer, questions: QuestionSet, batch: list[int], skip_broken: bool) -> list[dict[str, Any]]:
    """Answers of one batch; with ``skip_broken``, without the questions whose picture cannot be opened."""
    try:
        texts = answerer.answer([questions.questions[number] for number in batch])
    except BrokenImage as error:
        if not skip_broken:
            raise
        if len(batch) == 1:
            warn(f"{error}; the question is left out", everywhere=False)
            return []
        return [row for number in batch for row in _rows(answerer, questions, [number], skip_broken)]
    return [
        {"question_id": number, "question": questions.questions[number].text, "answer": text}
        for number, text in zip(batch, texts, strict=True)
    ]


def model_key(model_path: str, model_base: str | None) -> dict[str, Any]:
    """What tells one model from another: the weight files of its folders."""
    return {flag: fingerprint(path) for flag, path in (("model", model_path), ("base", model_base)) if path}
