"""POPE's own sampling of questions from object annotations: three sets over the same pictures, for development too.

    python -m llava.eval.pope_questions --annotations data/coco2014/annotations/instances_val2014.json \
        --exclude ./data/POPE --pictures 500 --seed 0 --out ./data/pope_dev

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (EMNLP 2023), section 5, and the program
that made the published files: of every picture with at least three kinds of objects, the first three in annotation
order are asked for, and behind each a kind that is not there: drawn evenly (random), the most frequent one over the
pictures (popular), or the one seen most often together with the kind just asked for (adversarial).

Hyperparameters that are chosen on the published questions make numbers that look better than they are. ``--exclude``
names these questions, and none of their pictures is drawn.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from llava.command_line import OneLineParser
from llava.errors import UserError, command_line, note
from llava.eval.pope import read_labels, read_questions_of
from llava.files import atomic_write, existing, field, read_object, sha256, write_json

LEAST_KINDS = 3  # also the number of questions of either answer per picture
MADE = "made.json"  # how the questions beside it were made


def question(kind: str) -> str:
    """POPE's wording, as today's files have it: "an" before the letters a, e, i, o, u."""
    return f"Is there {'an' if kind[0] in 'aeiou' else 'a'} {kind} in the image?"


def askable(objects: Mapping[str, Sequence[str]]) -> list[str]:
    """Pictures with kinds enough to be asked about, sorted."""
    return sorted(name for name, kinds in objects.items() if len(kinds) >= LEAST_KINDS)


def sample(objects: Mapping[str, Sequence[str]], pictures: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Questions by set name, records in the format of ``coco_pope_{set}.json``.

    ``objects`` are the distinct kinds of every picture by file name. Frequencies are counted over the drawn
    ``pictures``, as POPE does; all pictures with kinds enough are drawn where there are fewer. Unlike POPE's, the
    draw has a seed, and kinds of one frequency come in alphabetical order.

    Raises:
        UserError: the drawn pictures show too few kinds to ask one of them for three that it does not show.
    """
    rng = random.Random(seed)
    eligible = askable(objects)
    drawn = rng.sample(eligible, min(pictures, len(eligible)))
    frequency = Counter(kind for name in drawn for kind in objects[name])
    together = Counter(pair for name in drawn for pair in permutations(objects[name], 2))
    vocabulary = sorted(frequency)

    def evenly(_: str) -> list[str]:
        return rng.sample(vocabulary, len(vocabulary))

    by_frequency = sorted(vocabulary, key=lambda kind: -frequency[kind])
    by_company = {
        kind: sorted((other for other in vocabulary if together[kind, other]), key=lambda o: -together[kind, o])
        for kind in vocabulary
    }
    orders: dict[str, Callable[[str], list[str]]] = {
        "random": evenly,
        "popular": lambda _: by_frequency,
        "adversarial": by_company.__getitem__,
    }
    return {name: _ask(drawn, objects, order, evenly) for name, order in orders.items()}


def _ask(
    drawn: Iterable[str],
    objects: Mapping[str, Sequence[str]],
    order: Callable[[str], list[str]],
    otherwise: Callable[[str], list[str]],
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for name in drawn:
        shown = set(objects[name])
        asked: set[str] = set()
        for there in objects[name][:LEAST_KINDS]:
            absent = _first_outside(order(there), shown | asked)
            # All that is ever seen with this kind may be in the picture: POPE then draws evenly.
            absent = absent or _first_outside(otherwise(there), shown | asked)
            if absent is None:
                raise UserError(
                    f"{name}: shows {len(shown)} kinds of objects, and the drawn pictures show too few others to ask "
                    f"for {LEAST_KINDS} that are not there; draw more pictures"
                )
            asked.add(absent)
            for kind, label in ((there, "yes"), (absent, "no")):
                number = len(records) + 1
                records.append({"question_id": number, "image": name, "text": question(kind), "label": label})
    return records


def _first_outside(order: Iterable[str], taken: Collection[str]) -> str | None:
    return next((kind for kind in order if kind not in taken), None)


def read_annotations(path: Path) -> dict[str, list[str]]:
    """Distinct kinds of objects of every picture of a COCO instances file, in annotation order, by file name.

    Raises:
        UserError: not such a file, or a record that refers to a picture or a category that it does not hold.
    """
    content = read_object(path)
    mend = "pass COCO's instances_*.json"
    rows = {key: field(str(path), content, key, list, mend) for key in ("images", "annotations", "categories")}

    names: dict[int, str] = {}
    for index, row in enumerate(rows["categories"]):
        where = f"{path}: categories, record {index}"
        name = field(where, row, "name", str, mend)
        if not name:
            raise UserError(f"{where}: an empty 'name'; {mend}")
        names[field(where, row, "id", int, mend)] = name

    pictures: dict[int, str] = {}
    for index, row in enumerate(rows["images"]):
        where = f"{path}: images, record {index}"
        number = field(where, row, "id", int, mend)
        if number in pictures:
            raise UserError(f"{where}: the id {number} is there twice; {mend}")
        # pope_eval.py looks for pictures in val2014.
        pictures[number] = field(where, row, "file_name", str, mend).removeprefix("val2014/")
    objects: dict[str, dict[str, None]] = {name: {} for name in pictures.values()}
    if len(objects) < len(pictures):
        twice = next(name for name, count in Counter(pictures.values()).items() if count > 1)
        raise UserError(f"{path}: images: the file name {twice} is there twice; {mend}")

    for index, row in enumerate(rows["annotations"]):
        where = f"{path}: annotations, record {index}"
        picture, category = (field(where, row, key, int, mend) for key in ("image_id", "category_id"))
        if picture not in pictures or category not in names:
            unknown = f"image_id {picture}" if picture not in pictures else f"category_id {category}"
            raise UserError(f"{where}: the file holds no record of its {unknown}; {mend}")
        objects[pictures[picture]][names[category]] = None
    return {name: list(kinds) for name, kinds in objects.items()}


def question_files(given: str) -> list[Path]:
    """The label files that a path stands for: one, a folder of ``coco_pope_*.json``, or POPE's repository.

    Raises:
        UserError: none is there.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        for folder in (path, path / "output" / "coco"):
            if files := sorted(folder.glob("coco_pope_*.json")):
                return files
        raise UserError(f"--exclude {given}: no coco_pope_*.json there (nor in output/coco)")
    return [existing(given, "--exclude")]


def pictures_of(files: Iterable[Path]) -> set[str]:
    """The pictures, as ``same_picture`` names them, that label files ask about."""
    asked = set()
    for file in files:
        read_labels(file)  # checks what read_questions_of takes for granted
        asked |= {same_picture(image) for image, _ in read_questions_of(file).values()}
    return asked


def same_picture(name: str) -> str:
    """What a picture's file names in COCO's editions have in common: its number.

    COCO_val2014_000000310196.jpg is 000000310196.jpg in COCO 2017. Other names stand for themselves, without folder.
    """
    file = Path(name).name
    numbered = re.fullmatch(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})\.\w+", file)
    return numbered[1] if numbered else file


def write_questions(folder: Path, sets: Mapping[str, Sequence[Mapping[str, Any]]], made: Mapping[str, Any]) -> None:
    """``coco_pope_{set}.json`` of every set, then ``made.json``; what is there with the same questions stays.

    Raises:
        UserError: the folder holds other questions.
    """
    texts = {f"coco_pope_{name}.json": "".join(json.dumps(r) + "\n" for r in rows) for name, rows in sets.items()}
    for name, text in texts.items():
        if (folder / name).exists() and (folder / name).read_bytes() != text.encode():
            raise UserError(f"--out {folder}: its {name} holds other questions; choose another folder, or remove them")
    if (folder / MADE).exists() and all((folder / name).exists() for name in texts):
        note(f"{folder} holds the very same questions already")
        return
    for name, text in texts.items():
        with atomic_write(folder / name) as file:
            file.write(text)
    write_json(folder / MADE, made)


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m llava.eval.pope_questions",
        description="POPE's questions about other pictures: a development set.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--annotations", required=True, metavar="FILE", help="COCO's instances_val2014.json (or another instances_*)")
    add(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="draw no picture that these questions ask about: folder of coco_pope_*.json, POPE's repository, or a file",
    )
    add("--pictures", type=int, default=500, help="how many to ask about, six questions a set each (default: 500)")
    add("--seed", type=int, default=0, help="of the draw (default: 0)")
    add("--out", required=True, metavar="FOLDER", help="where coco_pope_{random,popular,adversarial}.json go")
    return parser.parse()


@command_line
def main() -> None:
    args = parse_args()
    if args.pictures < 1:
        raise UserError(f"--pictures {args.pictures}: expected at least 1")
    out = Path(args.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {args.out}: is a file; pass a folder")
    annotations = existing(args.annotations, "--annotations")
    excluded_by = [file for given in args.exclude for file in question_files(given)]
    asked = pictures_of(excluded_by)
    if not asked:
        note("without --exclude, pictures of the published questions may be drawn: no set to tune on")

    objects = read_annotations(annotations)
    left = {name: kinds for name, kinds in objects.items() if same_picture(name) not in asked}
    eligible = askable(left)
    if len(eligible) < args.pictures:
        raise UserError(
            f"{annotations}: {len(eligible)} pictures show at least {LEAST_KINDS} kinds of objects and are not "
            f"excluded, but --pictures asks for {args.pictures}; ask for fewer, or exclude less"
        )
    sets = sample(left, args.pictures, args.seed)
    made = {
        "annotations": {"path": str(annotations.resolve()), "sha256": sha256(annotations)},
        "exclude": [{"path": str(file.resolve()), "sha256": sha256(file)} for file in excluded_by],
        "seed": args.seed,
        "pictures": args.pictures,
        "excluded": len(objects) - len(left),
        "eligible": len(eligible),
    }
    try:
        write_questions(out, sets, made)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from None
    print(
        f"{out}: {args.pictures} of {len(eligible)} pictures, {2 * LEAST_KINDS * args.pictures} questions a set; "
        f"{len(objects) - len(left)} of the annotated pictures were excluded"
    )


if __name__ == "__main__":
    main()
