"""Answers on disk while they are made: every rank grows a file of its own by whole lines, and a killed run goes on.

pope_random.KEY.part0.jsonl   an answer a line; KEY is the beginning of a hash of what the answers depend on
pope_random.jsonl             all of them in the order of the questions, written at once when the last one is there
pope_random.made.json         the whole hash, and that of pope_random.jsonl: a run that finds both as they are is done
pope_random.earlier.jsonl     what pope_random.jsonl held before, where it was something else
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava.errors import UserError, note
from llava.files import atomic_write, sha256, whole_lines

Row = dict[str, Any]


class AnswerFile:
    """One set's answers. Those made under another ``key`` (what they depend on) are not used, and not touched.

    ``id_key`` is what tells the answers apart.
    """

    def __init__(self, path: Path, key: dict[str, Any], rank: int = 0, id_key: str = "question_id") -> None:
        self.path = path
        self.id_key = id_key
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.made = path.with_name(f"{path.stem}.made.json")
        self._parts_begin = f"{path.stem}.{self.key[:12]}.part"
        self.part = path.with_name(f"{self._parts_begin}{rank}.jsonl")

    def answered(self) -> dict[Any, Row]:
        """The answers that are there, of all ranks and earlier runs, by id."""
        files = [*self._parts(), *([self.path] if self._is_whole() else [])]
        return {row[self.id_key]: row for file in files for row in whole_lines(file)}

    def begin(self) -> None:
        """Make this rank's part ready to grow; all ranks have read what is there."""
        rows = list(whole_lines(self.part)) if self.part.is_file() else []
        with _writing(self.part):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Rewritten rather than appended to: a killed run may have left half a line at the end.
            with atomic_write(self.part) as file:
                file.writelines(map(_line, rows))

    def append(self, rows: Iterable[Row]) -> None:
        """Add answers; they are on their way to the disk when this returns."""
        with _writing(self.part), self.part.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))

    def finish(self, order: Iterable[Any]) -> list[Row]:
        """Write the answers to the questions ``order``, of all ranks, and remove the parts; for one rank to call.

        A run that is killed in here finds every answer again: the parts go last, and ``made`` is there before the file
        that it speaks of, so that the file that replaces another one is known from its first moment.

        Raises:
            UserError: an answer is missing, or a file cannot be written; the parts are still there.
        """
        rows = self.answered()
        missing = [number for number in order if number not in rows]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} answers are missing, the first of {self.id_key} {missing[0]} (has "
                "another run removed its files?); run the same command again, which asks only them",
                everywhere=False,
            )
        merged = [rows[number] for number in order]
        text = "".join(map(_line, merged))
        with _writing(self.path):
            with atomic_write(self.made) as file:
                file.write(self._made(hashlib.sha256(text.encode()).hexdigest()))
            if self.path.is_file() and self.path.read_text(encoding="utf-8") != text:
                earlier = self.path.with_name(f"{self.path.stem}.earlier.jsonl")
                os.replace(self.path, earlier)
                note(f"{self.path} held other answers, of an earlier run; they are kept in {earlier.name}")
            with atomic_write(self.path) as file:
                file.write(text)
            for file in [*self._parts(), *self._temporaries()]:
                file.unlink()
        return merged

    def _made(self, content: str) -> str:
        return json.dumps({"key": self.key, "sha256": content}, indent=2) + "\n"

    def _is_whole(self) -> bool:
        """Whether the final file is of this key, and nobody has changed it."""
        files = self.path.is_file() and self.made.is_file()
        return files and self.made.read_text(encoding="utf-8", errors="replace") == self._made(sha256(self.path))

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self._parts_begin)}*.jsonl"))

    def _temporaries(self) -> list[Path]:
        """What ``atomic_write`` was writing for this key when its process was killed."""
        names = [f"{re.escape(self._parts_begin)}\\d+.jsonl", re.escape(self.path.name), re.escape(self.made.name)]
        pattern = re.compile(rf"\.({'|'.join(names)})\.[a-z0-9_]{{8}}")
        return [file for file in self.path.parent.glob(".*") if pattern.fullmatch(file.name)]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room and run the same command again: "
            "the answers so far are kept",
            everywhere=False,
        ) from None


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
