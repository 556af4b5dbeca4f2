"""A POPE run: which questions, where the answers go, its sets answered by all ranks together, and their counts.

The three sets ask 9,000 questions about the same 500 pictures, 5,127 different ones: they are asked picture by picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava import interruption
from llava.data.images import drop_missing
from llava.distributed import World
from llava.errors import UserError
from llava.eval.answer import Answerer, Question
from llava.eval.answer_files import AnswerFile
from llava.eval.asking import Picture, Place, Progress, answered_by, answers_about, in_groups, prepared
from llava.eval.pope import Answer, Confusion, Label, read_labels, read_questions_of, score, set_of
from llava.files import sha256
from llava.model.checkpoint import fingerprint
from llava.model.delta import read_chain, split_names


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
    model = Path(split_names(model_path)[-1]).expanduser()
    return model / "pope" if model.is_dir() else Path("pope_results") / str(model).strip("/").split("/")[-1]


def by_picture(sets: list[QuestionSet]) -> list[Picture]:
    """The pictures of all sets, in the order in which they and their questions come first."""
    pictures: dict[str, Picture] = {}
    for questions in sets:
        for number, question in questions.questions.items():
            picture = pictures.setdefault(question.image, Picture(question.image, question.where, {}))
            picture.asked.setdefault(question.text, []).append((questions.name, number))
    return list(pictures.values())


def answer_sets(
    answerer: Answerer,
    sets: list[QuestionSet],
    folder: Path,
    settings: dict[str, Any],
    protocol: str,
    batch_size: int,
    world: World,
    skip_broken: bool = False,
) -> dict[str, Confusion]:
    """Answer sets on all ranks; rank 0 writes their files and scores them, the others return no counts.

    A question that several sets ask is asked once. ``settings`` is what the answers depend on besides the questions.
    ``skip_broken`` leaves out questions whose picture cannot be opened; without it such a picture ends the run.

    Raises:
        Stopped: a signal came that was held (``interruption.held``); the answers so far are written.
        LostRank: another rank has ended; the answers so far are written.
    """
    key = {
        **settings,
        "protocol": protocol,
        "batch_size": batch_size,
        "questions": {questions.name: [sha256(questions.file), len(questions.questions)] for questions in sets},
    }
    files = {q.name: AnswerFile(folder / f"pope_{q.name}.jsonl", key, world.rank) for q in sets}
    # One rank looks: another one might see something else through a network folder, and they share out what is left.
    done = {(n, number) for n, file in files.items() for number in file.answered()} if world.rank == 0 else None
    done = world.rank_0s(done)
    for file in files.values():
        file.begin()
    groups = [g for g in in_groups(by_picture(sets), batch_size) if not done.issuperset(answered_by(g))]
    mine = groups[world.rank :: world.size]
    left_out: set[Place] = set()
    total = sum(len(q.questions) for q in sets)
    with Progress(f"POPE {', '.join(q.name for q in sets)}", total, groups, mine, done, world) as progress:
        for group, pixels in prepared(answerer, mine):
            interruption.stop_if_requested("its answers are written, and the same command asks only the rest")
            said = answers_about(answerer, group, pixels, batch_size, skip_broken)
            for name, file in files.items():
                rows = [
                    {"question_id": number, "question": text, "answer": answer.text, "protocol": protocol}
                    | ({} if answer.score is None else {"score": answer.score})
                    for text, places, answer in said
                    for place, number in places
                    if place == name and (name, number) not in done
                ]
                file.append(rows)
            left_out.update(set(answered_by(group)) - {place for _, places, _ in said for place in places} - done)
            progress.add(group)
    left_out = set().union(*world.gather(left_out))
    return {q.name: _scored(q, files[q.name], left_out) for q in sets} if world.rank == 0 else {}


def _scored(questions: QuestionSet, file: AnswerFile, left_out: set[Place]) -> Confusion:
    """One set's answers, of all ranks, written and counted."""
    order = [number for number in questions.questions if (questions.name, number) not in left_out]
    rows = file.finish(order)
    answers = {row["question_id"]: Answer(row["answer"], row["question"], str(file.path)) for row in rows}
    return score({number: questions.labels[number] for number in order}, answers, questions.file, file.path)


def model_key(model_path: str, model_base: str | None, cache_dir: str | None = None) -> dict[str, Any]:
    """What tells one model from another: the weight files of its folders, the newest first."""
    chain = read_chain(model_path, "--model-path", cache_dir, model_base)
    return {"model": [fingerprint(folder) for folder in chain.folders]}
