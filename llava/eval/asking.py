"""Questions about many pictures, asked group by group on all ranks: what a run over a question file is made of."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from tqdm import tqdm

from llava import status
from llava.distributed import World
from llava.errors import BrokenImage, UserError, note, warn
from llava.eval.answer import Answerer, Said

LOG_INTERVAL = 30.0  # seconds between lines of progress where nobody looks on: a queued job's log

Place = tuple[str, int]  # where an answer is wanted: a set and the id of one of its questions

PREPARING = 2  # threads that open pictures: one keeps a CPU's model busy, two a fast card


@dataclass
class Picture:
    """A picture and what is asked about it: its distinct questions, each with the (set, id) that it answers.

    ``apart``: every one of these gets an answer of its own.
    """

    path: str
    where: str
    asked: dict[str, list[Place]]
    apart: bool = False

    @property
    def answers(self) -> int:
        """How many are made for it."""
        return sum(map(len, self.asked.values())) if self.apart else len(self.asked)


def in_groups(pictures: list[Picture], batch_size: int) -> list[list[Picture]]:
    """Pictures that are asked about together: whole ones, with ``batch_size`` questions at most where it is not one.

    Groups do not depend on the number of ranks, nor on what a killed run left behind: rounding stays the same.
    """
    groups: list[list[Picture]] = []
    room = 0
    for picture in pictures:
        if picture.answers > room:
            groups.append([])
            room = batch_size
        groups[-1].append(picture)
        room -= picture.answers
    return groups


class Progress:
    """How far the ranks are: a bar for who looks on, lines for a log, and the heartbeat.

    Rank 0 knows its own share alone, which is every n-th group; for all ranks it scales that up.
    """

    def __init__(
        self,
        what: str,
        total: int,
        groups: list[list[Picture]],
        mine: list[list[Picture]],
        done: set[Place],
        world: World,
    ) -> None:
        self.what, self.total, self.done = what, total, done
        self.left, self.share, self.own = self._new(groups), self._new(mine), 0
        self.logs = world.rank == 0 and not sys.stderr.isatty()
        if done:
            rest = f"the other {self.left} are asked" if groups else "nothing is asked"
            note(f"{what}: {self.total - self.left} of {self.total} questions are answered already; {rest}")
        self.bar = tqdm(
            total=self.share,
            desc=what,
            unit="question",
            disable=world.rank != 0 or not groups or self.logs,
        )

    def __enter__(self) -> Progress:
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
            note(f"{self.what}: {step}/{self.total} questions, {rate:.3g} questions/s, {left} left")

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _new(self, groups: list[list[Picture]]) -> int:
        return sum(place not in self.done for group in groups for place in answered_by(group))


def answered_by(group: list[Picture]) -> list[Place]:
    return [place for picture in group for places in picture.asked.values() for place in places]


def prepared(
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


def answers_about(
    answerer: Answerer,
    group: list[Picture],
    pixels: list[Future[torch.Tensor]],
    batch_size: int,
    skip_broken: bool,
    seed_of: Callable[[Place], int] | None = None,
) -> list[tuple[str, list[Place], Said]]:
    """A group's questions, where they stand, and their answers; ``skip_broken``: without pictures that do not open.

    Equal questions about a picture share an answer; where ``seed_of`` gives places seeds, each is drawn one of its own.
    """
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
            alone = [where] if seed_of is None else [[place] for place in where]
            asked += [(len(opened) - 1, text)] * len(alone)
            places += alone
    if not opened:
        return []
    seeds = None if seed_of is None else [seed_of(place) for (place,) in places]
    try:
        answers = answerer.ask(torch.stack(opened), asked, batch_size, seeds)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory with {len(asked)} questions about {len(opened)} picture(s) at a time; "
            f"pass a --batch_size below {batch_size}",
            everywhere=False,
        ) from None
    return [(text, where, said) for (_, text), where, said in zip(asked, places, answers, strict=True)]
