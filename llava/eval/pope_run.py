"""A POPE run: which questions, where the answers go, its sets answered by all ranks together, and their counts.

The three sets ask 9,000 questions about the same 500 pictures, 5,127 different ones: they are asked picture by picture.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava import interruption, status
from llava.data.images import drop_missing
from llava.distributed import World
from llava.errors import BrokenImage, UserError, note, warn
from llava.eval.answer import Answerer, Question, Said
from llava.eval.answer_files import AnswerFile
from llava.eval.pope import Answer, Confusion, Label, read_labels, read_questions_of, score, set_of
from llava.files import sha256
from llava.model.checkpoint import fingerprint
from llava.model.delta import read_chain, split_names

LOG_INTERVAL = 30.0  # seconds between lines of progress where nobody looks on: a queued job's log

Place = tuple[str, int]  # a set and the id of one of its questions

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
    asked: dict[str, list[Place]]


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
    groups = [g for g in in_groups(by_picture(sets), batch_size) if not done.issuperset(_answered_by(g))]
    mine = groups[world.rank :: world.size]
    left_out: set[Place] = set()
    with _Progress(sets, groups, mine, done, world) as progress:
        for group, pixels in _prepared(answerer, mine):
            interruption.stop_if_requested("its answers are written, and the same command asks only the rest")
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
            left_out.update(set(_answered_by(group)) - {place for _, places, _ in said for place in places} - done)
            progress.add(group)
    left_out = set().union(*world.gather(left_out))
    return {q.name: _scored(q, files[q.name], left_out) for q in sets} if world.rank == 0 else {}


class _Progress:
    """How far the ranks are: a bar for who looks on, lines for a log, and the heartbeat.

    Rank 0 knows its own share alone, which is every n-th group; for all ranks it scales that up.
    """

    def __init__(
        self,
        sets: list[QuestionSet],
        groups: list[list[Picture]],
        mine: list[list[Picture]],
        done: set[Place],
        world: World,
    ) -> None:
        self.total = sum(len(questions.questions) for questions in sets)
        self.done = done
        self.left, self.share, self.own = self._new(groups), self._new(mine), 0
        self.names = names = ", ".join(questions.name for questions in sets)
        self.logs = world.rank == 0 and not sys.stderr.isatty()
        if done:
            rest = f"the other {self.left} are asked" if groups else "nothing is asked"
            note(f"POPE {names}: {self.total - self.left} of {self.total} questions are answered already; {rest}")
        self.bar = tqdm(
            total=self.share,
            desc=f"POPE {names}",
            unit="question",
            disable=world.rank != 0 or not groups or self.logs,
        )

    def __enter__(self) -> _Progress:
        self.began = self.logged = time.monotonic()
        if status.current:
            status.current.update(state="running", step=self.total - self.left, max_steps=self.total)
        return self

    def add(self, group: list[Picture]) -> None:
        """A group of this rank's share is answered, and its answers are written."""
        count = self._new([group])
        self.own += count
        self.bar.update(count)
        now, scale = time.monotonic(), self.left / self.share
        rate = self.own * scale / (now - self.began)
        step = self.total - self.left + round(self.own * scale)
        seconds_left = round((self.share - self.own) * scale / rate)
        if status.current:
            status.current.update(step=step, rate=round(rate, 2), seconds_left=seconds_left)
        if self.logs and (now - self.logged > LOG_INTERVAL or self.own == self.share):
            self.logged = now
            left = datetime.timedelta(seconds=seconds_left)
            note(f"POPE {self.names}: {step}/{self.total} questions, {rate:.3g} questions/s, {left} left")

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _new(self, groups: list[list[Picture]]) -> int:
        return sum(place not in self.done for group in groups for place in _answered_by(group))


def _answered_by(group: list[Picture]) -> list[Place]:
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
) -> list[tuple[str, list[Place], Said]]:
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
