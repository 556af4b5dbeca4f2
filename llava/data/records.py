"""Big files of records, read once: what is kept of them is where every record begins and what it holds."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import gc
import hashlib
import itertools
import json
import os
import re
import struct
import time
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.images import join, missing_files
from llava.data.supervision import ROLES
from llava.errors import UserError, note
from llava.files import atomic_write, read_records

KEPT_FROM = 16 * 2**20  # bytes; the index of a smaller file is made faster than it is worth keeping
WINDOW = 4 * 2**20  # bytes that are parsed at once
EDGE = 64 * 2**10  # bytes at either end of a file that tell it from another of its size and time
MAGIC = b"LLAVA-INDEX-1\n"

# What the turns of a record are known to be: anything, good in a conversation, good in every template.
UNKNOWN, CONVERSATION, PAIR = 0, 1, 2

_GAP = re.compile(r"[ \t\n\r]*")
_BEHIND = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")
_UNTIDY = re.compile(rb"(?:^|[\0/])\.?(?=[\0/]|$)")  # an empty part of a path, or "."
_DECODER = json.JSONDecoder()
_COLUMNS = {
    "begins": "<i8",
    "ends": "<i8",
    "lines": "<i8",
    "words": "<i4",
    "pictures": "<i4",
    "shapes": "|u1",
    "name_ends": "<i8",
    "names": "|u1",
}


class _Unreadable(Exception):
    """The file is not what was expected; ``read_records`` says what is wrong with it."""


class _Columns:
    """What is known of records, one entry a record; ``name_ends`` and ``names`` have one a picture."""

    def __init__(self) -> None:
        self.begins, self.ends, self.lines = array("q"), array("q"), array("q")
        self.words, self.pictures, self.shapes = array("i"), array("i"), array("B")
        self.name_ends, self.names = array("q"), bytearray()

    def add(self, record: dict[str, Any], begin: int, end: int) -> None:
        """A record that stands in the bytes from ``begin`` to ``end``."""
        words = marks = role = count = 0
        shape, said, kept = CONVERSATION, False, len(self.name_ends)
        names: list[str] = []
        try:
            turns = record["conversations"]
            image = record.get("image")
            if image:
                names = [image] if image.__class__ is str else image
                count = len(names)
                if names.__class__ is not list:
                    shape, names = UNKNOWN, []
            for turn in turns:
                value = turn["value"]
                words += len(value.split())
                if ROLES[turn["from"]] != role:
                    shape = UNKNOWN
                if role:
                    said = said or value != ""
                    if DEFAULT_IMAGE_TOKEN in value:
                        shape = UNKNOWN
                else:
                    marks += value.count(DEFAULT_IMAGE_TOKEN)
                role ^= 1
            if not said or (marks != count and (marks or count != 1)):
                shape = UNKNOWN
            elif count == 1 and shape == CONVERSATION and len(turns) == 2:
                shape = PAIR
            for name in names:
                self.names += name.encode("utf-8", "surrogatepass")
                self.names.append(0)
                self.name_ends.append(len(self.names))
        except (KeyError, TypeError, AttributeError):
            # It is refused when it is looked at; names may have been kept up to one that is no text.
            shape = UNKNOWN
            del self.name_ends[kept:]
            del self.names[self.name_ends[-1] if kept else 0 :]
        self.begins.append(begin)
        self.ends.append(end)
        self.words.append(words)
        self.pictures.append(len(self.name_ends) - kept)
        self.shapes.append(shape)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.frombuffer(getattr(self, name), dtype=kind) for name, kind in _COLUMNS.items()}


def _scan_list(file: int, size: int) -> _Columns:
    """What the records of a JSON list are.

    Raises:
        _Unreadable: no list of objects.
    """
    opening = re.match(rb"(?:\xef\xbb\xbf)?[ \t\n\r]*\[", os.pread(file, EDGE, 0))
    if opening is None:
        raise _Unreadable
    columns = _Columns()
    add, scan = columns.add, _DECODER.scan_once
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, fed, window = "", opening.end(), WINDOW
    here = fed  # the byte at which ``text[at]`` stands
    while True:
        block = os.pread(file, window, fed)
        fed += len(block)
        last = not block or fed >= size
        try:
            text += decoder.decode(block, last)
        except UnicodeDecodeError:
            raise _Unreadable from None
        ascii_ = text.isascii()
        at = 0
        before = len(columns.begins)
        while True:
            start = at + len(_GAP.match(text, at)[0])
            here, at = here + start - at, start
            try:
                record, end = scan(text, at)
            except (StopIteration, json.JSONDecodeError):
                break
            behind = _BEHIND.match(text, end)
            if behind is None:
                break
            if record.__class__ is not dict:
                raise _Unreadable
            after = here + (end - at if ascii_ else len(text[at:end].encode()))
            add(record, here, after)
            here, at = after + behind.end() - end, behind.end()
            if behind[1] == "]":
                if text[at:].strip(" \t\n\r") or any(
                    os.pread(file, WINDOW, place).strip(b" \t\n\r") for place in range(fed, size, WINDOW)
                ):
                    raise _Unreadable
                return columns
        if last:
            raise _Unreadable
        text = text[at:]
        window = WINDOW if len(columns.begins) > before else 2 * window


def _scan_lines(file: int) -> _Columns:
    """What the records of JSON lines are; lines end where ``llava.files.read_jsonl`` ends them.

    Raises:
        _Unreadable: a line that is no object.
    """
    columns = _Columns()
    rest, here, number = b"", 0, 0
    while True:
        block = os.pread(file, WINDOW, here + len(rest))
        last = not block
        raw = rest + block
        cut = len(raw) if last else raw.rfind(b"\n") + 1
        for line in raw[:cut].splitlines(keepends=True):
            number += 1
            try:
                text = line.decode("utf-8-sig" if here == 0 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except (UnicodeDecodeError, json.JSONDecodeError):
                raise _Unreadable from None
            if row.__class__ is dict:
                columns.add(row, here, here + len(line))
                columns.lines.append(number)
            elif text.strip():
                raise _Unreadable
            here += len(line)
        rest = raw[cut:]
        if last:
            return columns


class RecordFile:
    """A JSON list of records, or JSON lines of them, of which only an index is held: ``file[i]`` reads record i.

    The first opening reads the file once and keeps the index beside it (else in ``$XDG_CACHE_HOME/llava``), those that
    follow map it: processes share it. What ``llava.files.read_records`` refuses is refused with its message.

    Columns, one entry a record: ``begins``, ``ends`` (bytes), ``lines`` (JSON lines only; from 1), ``words`` (of all
    turns), ``pictures`` (how many), ``shapes`` (what its turns are known to be). ``name_ends`` and ``names`` hold the
    pictures' names behind each other as UTF-8, each closed by a zero byte.

    Raises:
        UserError: the file cannot be read, or is not made of records.
    """

    begins: np.ndarray
    ends: np.ndarray
    lines: np.ndarray
    words: np.ndarray
    pictures: np.ndarray
    shapes: np.ndarray
    name_ends: np.ndarray
    names: np.ndarray

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._file = -1
        self._index: Path | None = None
        self._open()

    def _open(self) -> None:
        try:
            self._file = os.open(self.path, os.O_RDONLY)
            size = os.fstat(self._file).st_size
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
        if size < KEPT_FROM:
            self._take(self._scan(size).arrays())
            return
        with self._alone():  # the other processes of a run find the index of the first
            key = self._key(size)
            places = self._places()
            if not any(self._load(place, key) for place in places):
                self._make(size, key, places)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: each process makes the index
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _scan(self, size: int) -> _Columns:
        """The columns, by reading the whole file."""
        collects = gc.isenabled()
        gc.disable()  # it would look at every record's parts again and again
        try:
            columns = _scan_lines(self._file) if self.path.suffix == ".jsonl" else _scan_list(self._file, size)
        except _Unreadable:
            columns = None
        finally:
            if collects:
                gc.enable()
        if columns is None or not columns.begins:
            read_records(self.path)  # says what is wrong with it
            raise UserError(f"{self.path}: changed while it was read; start again")
        return columns

    def _make(self, size: int, key: str, places: list[Path]) -> None:
        start = time.perf_counter()
        arrays = self._scan(size).arrays()
        took = f"{self.path.name}: {len(arrays['begins']):,} records read in {time.perf_counter() - start:.1f} s"
        for place in places:
            try:
                _write_index(place, key, arrays)
            except OSError:
                continue  # the next place is tried, and none is reported below
            note(f"{took}; index kept in {place}")
            if self._load(place, key):
                return
        else:
            note(f"{took}; no index kept: neither {' nor '.join(str(place.parent) for place in places)} can be written")
        self._take(arrays)

    def _places(self) -> list[Path]:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava"
        name = hashlib.sha256(str(self.path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return [self.path.with_name(f"{self.path.name}.index"), cache / f"{name}-{self.path.name}.index"]

    def _key(self, size: int) -> str:
        """What an index must be of: size, time of the last change, and both ends of the file."""
        digest = hashlib.sha256(os.pread(self._file, EDGE, 0) + os.pread(self._file, EDGE, max(size - EDGE, 0)))
        return f"{size} {os.fstat(self._file).st_mtime_ns} {digest.hexdigest()}"

    def _load(self, place: Path, key: str) -> bool:
        """Whether ``place`` holds this file's index, which is taken; one that does not is made again."""
        if not place.is_file():
            return False
        arrays = _read_index(place, key)
        if arrays is None:
            note(f"{place} is not of this {self.path.name} or damaged; it is made again")
            return False
        self._index = place
        self._take(arrays)
        return True

    def _take(self, arrays: dict[str, np.ndarray]) -> None:
        for name, values in arrays.items():
            setattr(self, name, values)
        self._name_starts = np.concatenate([[0], np.cumsum(self.pictures, dtype=np.int64)])

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_file": -1}
        if self._index is not None:  # mapped again: a data worker that is not forked shares it too
            state = {name: value for name, value in state.items() if name not in _COLUMNS}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._index is not None:
            self._open()
        else:
            self._file = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record ``index``, as it stands in the file.

        Raises:
            UserError: the file was changed after it was opened.
        """
        begin, end = int(self.begins[index]), int(self.ends[index])
        try:
            record = json.loads(os.pread(self._file, end - begin, begin).decode("utf-8-sig"))
        except (OSError, ValueError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{self.where(index)}: the file has changed while it is in use; start again")
        return record

    def where(self, index: int) -> str:
        """Name of a record in messages, as ``llava.files.read_records`` gives it."""
        if len(self.lines):
            return f"{self.path}: line {self.lines[index]}"
        return f"{self.path}: record {index}"

    def names_of(self, index: int) -> list[str]:
        """Names of a record's pictures."""
        first, behind = self._name_starts[index], self._name_starts[index + 1]
        ends = [int(self.name_ends[first - 1]) if first else 0, *self.name_ends[first:behind].tolist()]
        return [_text(self.names[a : b - 1].tobytes()) for a, b in itertools.pairwise(ends)]

    def all_names(self) -> list[str]:
        """Every record's pictures' names, behind each other."""
        names = _text(self.names.tobytes()).split("\0")[:-1]
        if len(names) == len(self.name_ends):
            return names
        return [name for index in range(len(self)) for name in self.names_of(index)]  # one has a zero byte in it

    def paths(self, folder: str | None) -> Iterator[str]:
        """``join(folder, name)`` of every name."""
        names, base = self.all_names(), join(folder, "")
        if not folder or base == "." or _UNTIDY.search(self.names[:-1].tobytes()):
            return (join(folder, name) for name in names)
        start = base if base.endswith("/") else f"{base}/"
        return (start + name for name in names)


def missing_pictures(file: RecordFile, folder: str | None) -> set[str]:
    """Paths of the pictures of ``file`` that do not exist under ``folder``."""
    return missing_files(file.paths(folder))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _write_index(place: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    checksum = 0
    for values in arrays.values():
        checksum = zlib.crc32(values, checksum)
    header = {"key": key, "checksum": checksum, "columns": {name: len(values) for name, values in arrays.items()}}
    head = json.dumps(header).encode()
    head += b" " * (-(len(MAGIC) + 4 + len(head)) % 8)
    with atomic_write(place, "wb") as file:
        file.write(MAGIC + struct.pack("<I", len(head)) + head)
        for values in arrays.values():
            file.write(values.tobytes() + bytes(-values.nbytes % 8))


def _read_index(place: Path, key: str) -> dict[str, np.ndarray] | None:
    """The columns, mapped; None where ``place`` is not the index that ``key`` asks for, whole."""
    try:
        raw = np.memmap(place, dtype=np.uint8, mode="r")
        lead = len(MAGIC) + 4
        if raw[: len(MAGIC)].tobytes() != MAGIC:
            return None
        (length,) = struct.unpack("<I", raw[len(MAGIC) : lead].tobytes())
        header = json.loads(raw[lead : lead + length].tobytes())
        at, checksum = lead + length, 0
        arrays: dict[str, np.ndarray] = {}
        for name, kind in _COLUMNS.items():
            size = header["columns"][name] * np.dtype(kind).itemsize
            if at + size > len(raw):
                return None
            arrays[name] = raw[at : at + size].view(kind).view(np.ndarray)
            checksum = zlib.crc32(arrays[name], checksum)
            at += size + -size % 8
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
    return arrays if (header["key"], header["checksum"]) == (key, checksum) else None
