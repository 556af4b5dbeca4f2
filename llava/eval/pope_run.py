"""A POPE run: which questions, where the answers go, its sets answered by all ranks together, and their counts.

The three sets ask 9,000 questions about the same 500 pictures, 5,127 different ones: they are asked picture by picture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava.data.images import drop_missing
from llava.distributed import World
from llava.errors import BrokenImage, UserError, warn
from llava.eval.answer import Answerer, Question, Said
from llava.eval.answer_files import AnswerFile
from llava.eval.pope import Answer, Confusion, Label, read_labels, read_questions_of, score, set_of
from llava.files import sha256
from llava.model.checkpoint import fingerprint
from llava.model.delta import read_chain, split_names

# Seconds between updates of the progress bar: a queued job's log should not be made of them.
MIN_INTERVAL = 0.5 if sys.stderr.isatty() else 30.0

PREPARING = 2  # threads that open pictures: one keeps a CPU's model busy, two a fast card


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


@dataclass
class Picture:
    """A picture and what is asked about it: its distinct questions, each with the (set, id) that it answers."""

    path: str
    where: str
    asked: dict[str, list[tuple[str, int]]]


def by_picture(sets: list[QuestionSet]) -> list[Picture]:
    """The pictures of all sets, in the order in which they and their questions come first."""
    pictures: dict[str, Picture] = {}
    for questions in sets:
        for number, question in questions.questions.items():
            picture = pictures.setdefault(question.image, Picture(question.image, question.where, {}))
            picture.asked.setdefault(question.text, []).append((questions.name, number))
    return list(pictures.values())


def in_groups(pictures: list[Picture], batch_size: int) -> list[list[Picture]]:
    """Pictures that are asked about together: whole ones, with ``batch_size`` questions at most where it is not one.

    Groups do not depend on the number of ranks, nor on what a killed run left behind: rounding stays the same.
    """
    groups: list[list[Picture]] = []
    room = 0
    for picture in pictures:
        if len(picture.asked) > room:
            groups.append([])
            room = batch_size
        groups[-1].append(picture)
        room -= len(picture.asked)
    return groups


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
    """Answer sets on all ranks and score them; a question that several sets ask is asked once.

    ``settings`` is what the answers depend on besides the questions. ``skip_broken`` leaves out questions whose picture
    cannot be opened; without it such a picture ends the run.
    """
    key = {
        **settings,
        "protocol": protocol,
        "batch_size": batch_size,
        "questions": {questions.name: [sha256(questions.file), len(questions.questions)] for questions in sets},
    }
    files = {
        questions.name: AnswerFile(folder / f"pope_{questions.name}.jsonl", key, world.rank, world.barrier)
        for questions in sets
    }
    done = {(name, number) for name, file in files.items() for number in file.resume()}
    groups = in_groups(by_picture(sets), batch_size)
    mine = [group for group in groups if not done.issuperset(_answered_by(group))][world.rank :: world.size]
    with tqdm(
        total=sum(len(_answered_by(group)) for group in mine),
        desc=f"POPE {', '.join(files)}",
        unit="question",
        disable=world.rank != 0,
        mininterval=MIN_INTERVAL,
    ) as progress:
        for group, pixels in _prepared(answerer, mine):
            said = _answers(answerer, group, pixels, batch_size, skip_broken)
            for name, file in files.items():
                rows = [
                    {"question_id": number, "question": text, "answer": answer.text, "protocol": protocol}
                    | ({} if answer.score is None else {"score": answer.score})
                    for text, places, answer in said
                    for place, number in places
                    if place == name and (name, number) not in done
                ]
                file.append(rows)
            progress.update(len(_answered_by(group)))
    return {q.name: _scored(q, files[q.name], skip_broken) for q in sets}


def _answered_by(group: list[Picture]) -> list[tuple[str, int]]:
    return [place for picture in group for places in picture.asked.values() for place in places]


def _prepared(
    answerer: Answerer, groups: list[list[Picture]]
) -> Iterator[tuple[list[Picture], list[Future[torch.Tensor]]]]:
    """Groups with their pictures, opened while the group before is being answered."""
    with ThreadPoolExecutor(PREPARING) as pool:
        waiting: list[tuple[list[Picture], list[Future[torch.Tensor]]]] = []
        try:
            for group in groups:
                waiting.append((group, [pool.submit(answerer.prepare, p.path, p.where) for p in group]))
                if len(waiting) > 1:
                    yield waiting.pop(0)
            yield from waiting
        finally:
            pool.shutdown(cancel_futures=True)


def _answers(
    answerer: Answerer,
    group: list[Picture],
    pixels: list[Future[torch.Tensor]],
    batch_size: int,
    skip_broken: bool,
) -> list[tuple[str, list[tuple[str, int]], Said]]:
    """A group's questions, where they stand, and their answers; ``skip_broken``: without pictures that do not open."""
    opened, asked, places = [], [], []
    for picture, future in zip(group, pixels, strict=True):
        try:
            opened.append(future.result())
        except BrokenImage as error:
            if not skip_broken:
                raise
            warn(f"{error}; its questions are left out", everywhere=False)
            continue
        for text, where in picture.asked.items():
            asked.append((len(opened) - 1, text))
            places.append(where)
    if not opened:
        return []
    try:
        answers = answerer.ask(torch.stack(opened), asked, batch_size)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory with {len(asked)} questions about {len(opened)} picture(s) at a time; "
            f"pass a --batch_size below {batch_size}",
            everywhere=False,
        ) from None
    return [(text, where, said) for (_, text), where, said in zip(asked, places, answers, strict=True)]


def _scored(questions: QuestionSet, file: AnswerFile, skip_broken: bool) -> Confusion:
    """One set's answers, of all ranks, written and counted."""
    rows = file.merge(list(questions.questions))
    answers = {row["question_id"]: Answer(row["answer"], row["question"], str(file.path)) for row in rows}
    labels = {number: label for number, label in questions.labels.items() if number in answers or not skip_broken}
    return score(labels, answers, questions.file, file.path)


def rank_0s(value: int, world: World) -> int:
    """Rank 0's value, for what must be one number everywhere."""
    if world.size == 1:
        return value
    import torch.distributed as dist

    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def model_key(model_path: str, model_base: str | None, cache_dir: str | None = None) -> dict[str, Any]:
    """What tells one model from another: the weight files of its folders, the newest first."""
    chain = read_chain(model_path, "--model-path", cache_dir, model_base)
    return {"model": [fingerprint(folder) for folder in chain.folders]}
