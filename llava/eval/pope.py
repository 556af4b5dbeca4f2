"""POPE scoring: read yes or no out of answers, join them to the labels by question id, count, and print a table row.

POPE asks "Is there a X in the image?" in three sets of 3000 questions (random, popular, adversarial negatives).
The parser and the formulas are those of RUCAIBox/POPE ``evaluate.py`` (3df3ba1), which LLaVA's ``eval_pope.py``
copies. Both pair answers with labels by line order; here they are joined by ``question_id``.

This module and everything it imports stay free of torch: scoring runs on a login node.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llava.errors import UserError
from llava.files import field, read_jsonl, read_records

SETS = ("random", "popular", "adversarial")

# llava_pope_test.jsonl: 1.. adversarial, 10000001.. random, 20000001.. popular.
LLAVA_ID_STEP = 10_000_000
LLAVA_SETS = ("adversarial", "random", "popular")
LLAVA_SUFFIX = "Answer the question using a single word or phrase."


class Protocol(NamedTuple):
    """How questions are asked: in which template, and what is written behind them. Numbers of two do not compare."""

    template: str
    suffix: str


PROTOCOLS = {
    "hadpo": Protocol("llava_v1", ""),  # HA-DPO's pope_eval.py
    "llava": Protocol("vicuna_v1", f"\n{LLAVA_SUFFIX}"),  # LLaVA's eval/pope.sh
}

EOS = "</s>"
UNNAMED = ""  # the set of an answers file whose rows do not say which set they belong to


@dataclass(frozen=True)
class Label:
    """One row of a label file. ``where`` is its file and line, for messages."""

    label: str
    question: str | None
    where: str


@dataclass(frozen=True)
class Answer:
    """One row of an answers file. ``where`` is its file and line, for messages."""

    text: str
    question: str | None
    where: str


@dataclass(frozen=True)
class Confusion:
    """Counts with 'yes' as the positive class; ``unparsed`` of them said neither yes nor no and count as yes.

    The metrics are fractions with the formulas of POPE's ``evaluate.py``; 0.0 where that divides by zero. Counts
    that are means over several runs need not be whole.
    """

    tp: float
    fp: float
    tn: float
    fn: float
    unparsed: int = 0

    @property
    def accuracy(self) -> float:
        return _ratio(self.tp + self.tn, self.tp + self.tn + self.fp + self.fn)

    @property
    def precision(self) -> float:
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.tp + self.fp, self.tp + self.tn + self.fp + self.fn)

    def as_dict(self) -> dict[str, float | int]:
        """Fractions first, then counts, as ``evaluate_pope.py --json`` writes them."""
        metrics = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        counts = ("tp", "fp", "tn", "fn", "unparsed")
        return {name: getattr(self, name) for name in metrics + counts}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _first_sentence(text: str) -> str:
    # HA-DPO's answers keep the end token, and upstream's parser reads 'No</s>' as yes. A space, because it ends a word.
    return text.replace(EOS, " ").split(".")[0]


def parse_answer(text: str) -> str:
    """'yes' or 'no', by POPE's ``evaluate.py``: 'No', 'not' or 'no' before the first full stop means no, all else yes.

    Only ``</s>`` is handled differently: it is taken out first. Everything else is left as odd as upstream has it
    ('NO', 'no!' and 'No' before a newline count as yes), so that numbers stay comparable with published ones.
    """
    words = _first_sentence(text).replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def is_parsed(text: str) -> bool:
    """Whether the first sentence holds the word yes, no or not at all, in any case and beside any punctuation."""
    words = re.findall(r"[^\W_]+", _first_sentence(text).lower())
    return not {"yes", "no", "not"}.isdisjoint(words)


def set_of(path: str | os.PathLike[str]) -> str:
    """'random', 'popular' or 'adversarial' from a file's name ('adv' is HA-DPO's short form); otherwise its stem."""
    stem = Path(path).stem
    return _set_name(stem) or stem


def _set_name(text: str) -> str | None:
    words = ["adversarial" if word == "adv" else word for word in re.findall(r"[a-z]+", text.lower())]
    # The last one: 'random_init_pope_adv' is the adversarial set.
    return next((word for word in reversed(words) if word in SETS), None)


def read_labels(path: str | os.PathLike[str]) -> dict[int, Label]:
    """A label file by question id: JSON lines (also when called ``.json``, as POPE's coco files) or a JSON list.

    Rows hold ``question_id``, ``label`` and, in every released file, ``image`` and ``text``.
    Raises ``UserError`` for an empty file, a missing key, a label other than yes or no, and a repeated id.
    """
    labels: dict[int, Label] = {}
    for where, row in _rows(Path(path)):
        number = _question_id(where, row)
        label = field(where, row, "label", str)
        if label not in ("yes", "no"):
            # Upstream takes anything but 'no' for yes, also 'No'.
            raise UserError(f"{where}: label {label!r} is neither 'yes' nor 'no'; write one of them, in lower case")
        _refuse_repeated(number, where, labels)
        labels[number] = Label(label, _optional_text(where, row, "text"), where)
    return labels


def read_questions_of(path: str | os.PathLike[str]) -> dict[int, tuple[str, str]]:
    """Picture and question of a label file by question id, in file order; ``read_labels`` has checked the ids."""
    return {
        _question_id(where, row): (field(where, row, "image", str), field(where, row, "text", str))
        for where, row in _rows(Path(path))
    }


def read_answers(path: str | os.PathLike[str]) -> dict[str, dict[int, Answer]]:
    """An answers file, by set and question id. Rows hold ``question_id`` and ``answer`` (HA-DPO) or ``text`` (LLaVA).

    Most files hold one set and do not name it: it comes under ``UNNAMED``. LLaVA's one file for all three sets is
    known by ids of 10000000 and more, or by a ``category`` key. The set is then the row's category, or else told by
    the id's offset, and the ids are taken modulo 10000000, which makes them those of the set's label file.
    Raises ``UserError`` for an empty file, a missing key, and an id repeated within a set.
    """
    rows = [(where, row, _question_id(where, row)) for where, row in _rows(Path(path))]
    merged = any(number >= LLAVA_ID_STEP or "category" in row for _, row, number in rows)
    sets: dict[str, dict[int, Answer]] = {}
    for where, row, number in rows:
        answers = sets.setdefault(_row_set(where, row, number) if merged else UNNAMED, {})
        if merged:
            number %= LLAVA_ID_STEP
        _refuse_repeated(number, where, answers)
        text = field(where, row, "text" if "text" in row and "answer" not in row else "answer", str)
        question = _optional_text(where, row, "question" if "question" in row else "prompt")
        answers[number] = Answer(text, question, where)
    return sets


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    # Only a .json may be a list, so only a .json is opened twice: `--answers <(cat part*.jsonl)` can be read once.
    if path.suffix == ".json" and _starts_with_bracket(path):
        return read_records(path)
    rows = [(f"{path}: line {number}", row) for number, row in read_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: holds no records; expected at least one")
    return rows


def _starts_with_bracket(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError:
        return False  # the reader that follows says what is wrong


def _question_id(where: str, row: dict[str, Any]) -> int:
    value = field(where, row, "question_id", (int, str))
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{where}: question_id {value[:40]!r} is not a number") from None


def _optional_text(where: str, row: dict[str, Any], key: str) -> str | None:
    return field(where, row, key, str) if key in row else None


def _row_set(where: str, row: dict[str, Any], number: int) -> str:
    if "category" in row:
        category = field(where, row, "category", str)
        return _set_name(category) or category
    if not 0 <= number // LLAVA_ID_STEP < len(LLAVA_SETS):
        raise UserError(f"{where}: question_id {number} lies outside LLaVA's three sets; give the row a 'category'")
    return LLAVA_SETS[number // LLAVA_ID_STEP]


def _refuse_repeated(number: int, where: str, earlier: dict[int, Label] | dict[int, Answer]) -> None:
    if number in earlier:
        raise UserError(f"{where}: question_id {number} was already used at {earlier[number].where}; keep one of them")


def answers_of(
    sets: dict[str, dict[int, Answer]], set_name: str, answers_file: str | os.PathLike[str]
) -> dict[int, Answer]:
    """The answers to one set out of ``read_answers``'s result. Raises ``UserError`` if the file holds other sets."""
    if UNNAMED in sets:
        return sets[UNNAMED]
    if set_name in sets:
        return sets[set_name]
    only = next(iter(sets))
    if len(sets) == 1 and (set_name not in SETS or only not in SETS):
        return sets[only]  # one of the names says nothing, so it cannot contradict the other
    held = ", ".join(sorted(sets))
    raise UserError(f"{answers_file}: holds no answers of the set '{set_name}', only of: {held}; pass their label file")


def pair_files(
    answers: dict[Path, dict[str, dict[int, Answer]]], label_files: list[Path]
) -> list[tuple[str, Path, Path]]:
    """``(set, answers file, label file)`` of every label file, in the table's order.

    ``answers`` maps each answers file to its ``read_answers``. One answers file and one label file belong together
    whatever they are called; one merged answers file serves any number of label files; otherwise the sets told from
    the names must match one to one. Raises ``UserError`` if they do not.
    """
    labels = _by_set("--labels", label_files)
    if len(answers) > 1:
        named = _by_set("--answers", list(answers))
        if named.keys() != labels.keys():
            raise UserError(
                f"--answers ({_listed(named)}) and --labels ({_listed(labels)}) do not pair one to one; "
                "pass one of each per set, with random, popular or adversarial in the name"
            )
    else:
        (file,) = answers
        if len(labels) > 1 and UNNAMED in answers[file]:
            raise UserError(
                f"{file}: holds one set, but --labels names {_listed(labels)}; pass an answers file for each"
            )
        named = dict.fromkeys(labels, file)
    order = sorted(labels, key=lambda name: SETS.index(name) if name in SETS else len(SETS))
    return [(name, named[name], labels[name]) for name in order]


def _by_set(flag: str, files: list[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for file in files:
        name = set_of(file)
        if name in named:
            raise UserError(f"{flag}: {named[name]} and {file} are both the set '{name}'; pass one file per set")
        named[name] = file
    return named


def _listed(files: dict[str, Path]) -> str:
    return ", ".join(f"{name}: {file}" for name, file in files.items())


def score(
    labels: dict[int, Label],
    answers: dict[int, Answer],
    labels_file: str | os.PathLike[str],
    answers_file: str | os.PathLike[str],
) -> Confusion:
    """The confusion counts of one set; the file names are for messages only.

    Raises ``UserError`` if the two sides do not hold the same ids, or differ in the text of a question: POPE exists
    in two versions that use the same ids for other questions (random: 2910 rows at e3e3926, 3000 today).
    """
    _check_same_questions(labels, answers, answers_file)
    _check_same_ids(labels, answers, labels_file, answers_file)
    counts = Counter((label.label, parse_answer(answers[number].text)) for number, label in labels.items())
    return Confusion(
        tp=counts["yes", "yes"],
        fp=counts["no", "yes"],
        tn=counts["no", "no"],
        fn=counts["yes", "no"],
        unparsed=sum(not is_parsed(answer.text) for answer in answers.values()),
    )


def _check_same_questions(
    labels: dict[int, Label], answers: dict[int, Answer], answers_file: str | os.PathLike[str]
) -> None:
    shared = [(number, answer, labels[number]) for number, answer in answers.items() if number in labels]
    for number, answer, label in shared:
        asked, expected = _plain(answer.question), _plain(label.question)
        if asked is not None and expected is not None and asked != expected:
            raise UserError(
                f"{answer.where}: question_id {number} asks {asked!r}, but {label.where} asks {expected!r}: "
                "not the same POPE set or version; pass the label file the answers were made from"
            )
    # LLaVA keeps the answer under the key that label and question files use for the question.
    if shared and all(_plain(answer.text) == _plain(label.question) for _, answer, label in shared):
        raise UserError(f"{answers_file}: its answers are the questions; pass the file that the model's run wrote")


def _plain(question: str | None) -> str | None:
    """The question as today's label files have it: no suffix, no 'imange' (a typo of the files of e3e3926)."""
    if question is None:
        return None
    return question.strip().removesuffix(LLAVA_SUFFIX).strip().replace("imange", "image")


def _check_same_ids(
    labels: dict[int, Label],
    answers: dict[int, Answer],
    labels_file: str | os.PathLike[str],
    answers_file: str | os.PathLike[str],
) -> None:
    if unanswered := sorted(labels.keys() - answers.keys()):
        raise UserError(
            f"{answers_file}: no answer to {len(unanswered)} of the {len(labels)} questions of {labels_file} "
            f"({_few(unanswered)}); finish the run that writes it, or pass the label file it was made from"
        )
    if unlabelled := sorted(answers.keys() - labels.keys()):
        raise UserError(
            f"{answers_file}: {len(unlabelled)} of its {len(answers)} answers have no label in {labels_file} "
            f"({_few(unlabelled)}); pass the label file the answers were made from"
        )


def _few(ids: list[int]) -> str:
    return f"question_id {', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''}"


def table_header() -> str:
    """The two head lines of the Markdown results table."""
    columns = ("Model", "Set", "HA-DPO", "Accuracy", "Precision", "Recall", "F1 Score", "Yes Ratio (%)")
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(model: str, set_name: str, hadpo: str, confusion: Confusion) -> str:
    """One Markdown row: percent, rounded to two decimals (HA-DPO's README cuts them off: up to 0.01 lower)."""
    c = confusion
    numbers = (f"{100 * value:.2f}" for value in (c.accuracy, c.precision, c.recall, c.f1, c.yes_ratio))
    names = (name.replace("|", "\\|") for name in (model, set_name, hadpo))
    return f"| {' | '.join((*names, *numbers))} |"
