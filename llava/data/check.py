"""Walk through training data once, in parallel, and say what is in it and what is wrong with it.

    python -m llava.data.check --data_path LLaVA-CC3M-Pretrain-595K
    python -m llava.data.check --data_path mix.yaml --image_folder playground/data --model_name_or_path MODEL \
        --version v1 --model_max_length 2048 --report problems.jsonl

Records and turns are counted, every picture is looked for and decoded. With a model (its tokenizer and the size of its
tower; no weights are read) rows are counted in tokens, and answers that ``--model_max_length`` cuts. Exit code 1 where
something was found that training would refuse or lose.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from llava.command_line import OneLineParser
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import BrokenImage, UserError, command_line, note

AT_A_TIME = 128  # records that a worker is given
SHOWN = 5  # problems of a kind that are printed
MISSING, BROKEN, REFUSED, CUT = "missing picture", "broken picture", "refused record", "cut answer"
MENDS = {
    MISSING: "fetch them, check --image_folder, or train with --skip_missing_images",
    BROKEN: "fetch them again, or train with --skip_missing_images",
    REFUSED: "mend or remove them: training would end at the first",
    CUT: "raise --model_max_length, or they are learnt in part or not at all",
}


class Problem(NamedTuple):
    """Something wrong with a record."""

    kind: str
    where: str
    message: str


@dataclass
class Seen:
    """What some records were: counts, and of each its words, tokens (with pictures) and supervised tokens."""

    counts: Counter[str] = field(default_factory=Counter)
    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    learnt: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        """Take over what another part was."""
        self.counts.update(other.counts)
        for name in ("words", "tokens", "learnt", "problems"):
            getattr(self, name).extend(getattr(other, name))


def parse_args() -> argparse.Namespace:
    parser = OneLineParser("python -m llava.data.check", description="Check training data.", allow_abbrev=False)
    add = parser.add_argument
    add("--data_path", required=True, help="as train_pretrain.py's: a file of records, a folder, or a mixture's YAML")
    add("--image_folder", help="where the pictures lie: a folder, or a .zip")
    add("--model_name_or_path", help="count tokens as a training of this model does")
    add("--vision_tower", help="the tower, where the model is a language model")
    add("--version", help="conversation template (default: the model's own; without a model v1)")
    add("--model_max_length", type=int, default=2048, help="where rows are cut (default 2048)")
    add("--open_images", default="True", choices=["True", "False"], help="False: only look whether pictures are there")
    add("--num_workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: a CPU each)")
    add("--report", help="write every problem as a JSON line here")
    add("--cache_dir", help="the hub's cache")
    args = parser.parse()
    for name in ("num_workers", "model_max_length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected 1 or more")
    if args.vision_tower and not args.model_name_or_path:
        raise UserError("--vision_tower has nothing to do without --model_name_or_path")
    return args


class Walk:
    """One file of records, looked at part by part; what processes share is made before they fork."""

    def __init__(self, path: str, folder: str | None, builder: Any, counts_tokens: bool, opens: bool) -> None:
        from llava.data.records import RecordFile, missing_pictures

        self.file, self.folder = RecordFile(path), folder
        self.builder, self.counts_tokens, self.opens = builder, counts_tokens, opens
        self.missing = missing_pictures(self.file, folder)
        # A picture is opened where it is named first.
        self.first: dict[str, int] = {}
        rows = np.repeat(np.arange(len(self.file)), self.file.pictures)
        for path_, row in zip(self.file.paths(folder), rows.tolist(), strict=True):
            self.first.setdefault(path_, row)

    def part(self, start: int) -> Seen:
        """The records from ``start`` on."""
        seen = Seen()
        for row in range(start, min(start + AT_A_TIME, len(self.file))):
            self._record(row, seen)
        return seen

    def _record(self, row: int, seen: Seen) -> None:
        from llava.data.images import join

        where, record = self.file.where(row), self.file[row]
        paths = [join(self.folder, name) for name in self.file.names_of(row)]
        kind = "text only" if not paths else "one picture" if len(paths) == 1 else "several pictures"
        seen.counts.update({"records": 1, kind: 1, "pictures named": len(paths)})
        seen.words.append(int(self.file.words[row]))
        for path in dict.fromkeys(paths):
            self._picture(path, where, row, seen)
        try:
            turns = record.get("conversations")
            if not isinstance(turns, list):
                raise UserError(f"{where}: key 'conversations' must be a list of turns")
            names = record.get("image") or []
            if len(paths) != (len(names) if isinstance(names, list) else 1):
                raise UserError(f"{where}: key 'image' must be a path or a list of paths")
            seen.counts["turns"] += len(turns)
            if self.counts_tokens:
                self._row(*self.builder.tokenize(where, turns, len(paths), cut=lambda _: None), where, seen)
            else:
                self.builder.fill(where, turns, len(paths))
        except UserError as error:
            seen.problems.append(Problem(REFUSED, where, str(error)))

    def _picture(self, path: str, where: str, row: int, seen: Seen) -> None:
        from llava.data.images import open_image

        if path in self.missing:
            seen.problems.append(Problem(MISSING, where, f"{where}: image {path} is missing"))
        elif self.opens and self.first[path] == row:
            try:
                width, height = open_image(path, where).size
                seen.counts.update({"opened": 1, "pixels": width * height})
            except BrokenImage as error:
                seen.problems.append(Problem(BROKEN, where, str(error)))

    def _row(self, ids: list[int], labels: list[int], where: str, seen: Seen) -> None:
        tokens = np.where(np.array(ids) == IMAGE_TOKEN_INDEX, self.builder.tokens_per_image, 1)
        learnt = np.array([label not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX) for label in labels])
        ends = tokens.cumsum()
        seen.tokens.append(int(ends[-1]))
        seen.learnt.append(int(learnt.sum()))
        lost = learnt & (ends > self.builder.max_length)
        if lost.any():
            begins = learnt & ~np.concatenate([[False], learnt[:-1]])  # of the answers
            answer = begins.cumsum()
            hit = sorted({int(number) for number in answer[lost]})
            whole = len([n for n in hit if lost[learnt & (answer == n)].all()])
            seen.counts["answers cut"] += len(hit)
            seen.problems.append(
                Problem(
                    CUT,
                    where,
                    f"{where}: {ends[-1]} tokens; {len(hit)} of {answer[-1]} answers are cut, {whole} of them whole "
                    f"({int(lost.sum())} of {int(learnt.sum())} tokens to learn are lost)",
                )
            )


_walk: Walk | None = None  # in a worker


def _part(start: int) -> Seen:
    return _walk.part(start)


def walk_through(walk: Walk, workers: int) -> Seen:
    """All records of a file, with a progress bar.

    Raises:
        UserError: a worker was killed.
    """
    global _walk
    import multiprocessing

    seen, starts = Seen(), range(0, len(walk.file), AT_A_TIME)
    quiet = not sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        parts: Iterator[Seen] = map(walk.part, starts)
        if workers > 1 and len(starts) > 1:
            _walk = walk
            pool = ProcessPoolExecutor(min(workers, len(starts)), multiprocessing.get_context("fork"))
            stack.callback(pool.shutdown, cancel_futures=True)
            parts = pool.map(_part, starts)
        bar = stack.enter_context(
            # In a queued job's log a line now and then.
            tqdm(total=len(walk.file), desc=walk.file.path.name, unit=" records", mininterval=30 if quiet else 0.1)
        )
        try:
            for part in parts:
                seen.add(part)
                bar.update(part.counts["records"])
        except BrokenProcessPool:
            raise UserError("a worker was killed (out of memory?); pass a smaller --num_workers") from None
    return seen


def summary(seen: Seen, walk: Walk) -> str:
    """What a file held, a line a subject."""
    counts = seen.counts
    kinds = ", ".join(f"{kind} {counts[kind]:,}" for kind in ("one picture", "several pictures", "text only"))
    lines = [
        f"records   {counts['records']:,} ({kinds})",
        f"turns     {counts['turns']:,}, {counts['turns'] / counts['records']:.3g} a record",
        f"words     {_spread(seen.words)}",
    ]
    if walk.counts_tokens and seen.tokens:
        lines += [
            f"tokens    {_spread(seen.tokens)}; a picture has {walk.builder.tokens_per_image}",
            f"to learn  {_spread(seen.learnt)}",
            f"cut       {counts['answers cut']:,} answers at --model_max_length {walk.builder.max_length}",
        ]
    kinds = Counter(problem.kind for problem in seen.problems)
    pictures = f"pictures  {counts['pictures named']:,} named, {len(walk.first):,} different"
    gone = len(walk.missing)
    pictures += f"; {gone:,} missing"
    if walk.opens:
        mean = f", {counts['pixels'] / counts['opened'] / 1e6:.2g} megapixels on average" if counts["opened"] else ""
        pictures += f"; {counts['opened']:,} opened{mean}, {kinds[BROKEN]:,} broken"
    return "\n".join([*lines, pictures, f"refused   {kinds[REFUSED]:,} records"])


def _spread(values: list[int]) -> str:
    mean, (middle, high) = np.mean(values), np.percentile(values, [50, 95])
    return f"{np.sum(values):,}; a record {mean:.1f}, median {middle:.0f}, 95 % {high:.0f}, at most {max(values)}"


def tell(problems: list[Problem]) -> str:
    """Problems by kind, the first few of each, and how to mend them."""
    lines = []
    for kind, mend in MENDS.items():
        of_kind = [problem for problem in problems if problem.kind == kind]
        if of_kind:
            lines.append(f"{kind}: {len(of_kind):,} record(s); {mend}")
            lines += [f"  {problem.message}" for problem in of_kind[:SHOWN]]
            lines += [f"  ... and {len(of_kind) - SHOWN:,} more"] if len(of_kind) > SHOWN else []
    return "\n".join(lines)


@command_line
def main() -> None:
    args = parse_args()
    from llava.conversation import template
    from llava.data.examples import ExampleBuilder
    from llava.data.images import open_image
    from llava.data.mixture import sources_of
    from llava.files import atomic_write
    from llava.train.arguments import CaptionArguments, ModelArguments

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are forked
    data = CaptionArguments(data_path=args.data_path, image_folder=args.image_folder)
    if args.model_name_or_path:
        from llava.train.build import row_builder

        model = ModelArguments(args.model_name_or_path, version=args.version, vision_tower=args.vision_tower)
        builder = row_builder(model, args.model_max_length, args.cache_dir)
        note(f"rows are those of template {model.version}")
    else:
        builder = ExampleBuilder(None, template(args.version or "v1", "--version"), open_image, 0, None, 0)
    problems: list[Problem] = []
    for number, (path, folder) in enumerate(sources_of(data.data_path, data.image_folder)):
        walk = Walk(path, folder, builder, bool(args.model_name_or_path), args.open_images == "True")
        seen = walk_through(walk, args.num_workers)
        print(*([""] if number else []), path, summary(seen, walk), sep="\n", flush=True)
        problems += seen.problems
    if problems:
        print("", tell(problems), sep="\n")
    if args.report:
        with atomic_write(Path(args.report).expanduser()) as file:
            file.writelines(json.dumps(problem._asdict(), ensure_ascii=False) + "\n" for problem in problems)
    if problems:
        sys.exit(1)
    print("\nnothing is wrong")


if __name__ == "__main__":
    main()
