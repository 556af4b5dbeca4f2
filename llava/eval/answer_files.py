"""Answers on disk while they are made: every rank grows a file of its own by whole lines, and a killed run goes on.

pope_random.KEY.part0.jsonl   first line {"key": ...}, a hash of what the answers depend on; then an answer a line
pope_random.jsonl             all of them in the order of the questions, written at once when the last one is there
pope_random.earlier.jsonl     what that file held before, where it was something else
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llava.errors import UserError, note
from llava.files import atomic_write, whole_lines


class AnswerFile:
    """One set's answers. ``barrier`` waits for all ranks; ``key`` decides whether earlier parts can be used."""

    def __init__(self, path: Path, key: dict[str, Any], rank: int, barrier: Callable[[], None]) -> None:
        self.path = path
        self.rank = rank
        self.barrier = barrier
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.part = path.with_name(f"{path.stem}.{self.key[:12]}.part{rank}.jsonl")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be written ({error.strerror}); pass --output_dir") from None

    def resume(self) -> dict[int, dict[str, Any]]:
        """Answers that earlier runs with the same key left behind, by question id; other runs' parts are left alone."""
        rows = {part: list(whole_lines(part))[1:] for part in self._parts()}
        self.barrier()
        try:
            # Rewritten rather than appended to: a killed run may have left half a line at the end.
            with atomic_write(self.part) as file:
                file.writelines(_line(row) for row in [{"key": self.key}, *rows.get(self.part, [])])
        except OSError as error:
            raise UserError(f"{self.part}: cannot be written ({error.strerror}); pass --output_dir") from None
        return {row["question_id"]: row for part in rows.values() for row in part}

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.{self.key[:12]}.part*.jsonl"))

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add answers; they are on their way to the disk when this returns."""
        with self.part.open("a", encoding="utf-8") as file:
            file.write("".join(_line(row) for row in rows))

    def merge(self, order: list[int]) -> list[dict[str, Any]]:
        """All ranks' answers in ``order`` of the question ids; rank 0 writes the file and removes the parts."""
        self.barrier()
        parts = self._parts()
        rows = {row["question_id"]: row for part in parts for row in list(whole_lines(part))[1:]}
        merged = [rows[number] for number in order if number in rows]
        self.barrier()
        if self.rank == 0:
            text = "".join(map(_line, merged))
            if self.path.is_file() and self.path.read_text(encoding="utf-8") != text:
                earlier = self.path.with_name(f"{self.path.stem}.earlier.jsonl")
                os.replace(self.path, earlier)
                note(f"{self.path} held other answers, of an earlier run; they are kept in {earlier.name}")
            with atomic_write(self.path) as file:
                file.write(text)
            for part in parts:
                part.unlink()
        self.barrier()
        return merged


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
