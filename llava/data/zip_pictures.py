"""Pictures straight from an archive that is never unpacked: LLaVA-CC3M's ``images.zip`` has 595,375 of them.

The archive's table of contents is read once into arrays, 24 bytes an entry and the names in one piece, where
``zipfile`` makes an object of some 700 bytes of each in every process. A picture is read with ``pread``: threads and
forked data workers share the file.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llava.errors import BrokenImage, UserError

ENTRY, ENTRY_SIZE = b"PK\x01\x02", 46
LOCAL, LOCAL_SIZE = b"PK\x03\x04", 30
END, END_SIZE = b"PK\x05\x06", 22
END64, LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
LONG = 0xFFFFFFFF  # of a field of 4 bytes: the value is elsewhere, in 8 (zip64)
STORED, DEFLATED = 0, 8


class ZipPictures:
    """What an archive holds, by name.

    Names may be given without the one folder in which all entries lie, as ``images/`` in some archives.

    Raises:
        UserError: no zip archive, or one whose end is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._file = -1
        self._owner = 0
        self._read_contents()

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __len__(self) -> int:
        return len(self._hashes)

    def missing(self, names: Iterable[str]) -> set[str]:
        """Which of ``names`` the archive has not."""
        names = list(names)
        wanted = np.fromiter((_hash(name.encode()) for name in names), np.uint64, len(names))
        at = np.searchsorted(self._hashes, wanted).clip(max=max(len(self) - 1, 0))
        known = self._hashes[at] == wanted if len(self) else np.zeros(len(names), bool)
        begins, ends = self._name_at[self._order[at]], self._name_at[self._order[at] + 1]
        return {
            name
            for name, found, begin, end in zip(names, known.tolist(), begins.tolist(), ends.tolist(), strict=True)
            if not (found and self._names[begin:end] == name.encode()) and name not in self
        }

    def read(self, name: str) -> bytes:
        """The bytes of an entry.

        Raises:
            BrokenImage: no such entry, damaged, or packed in a way that is not read here.
        """
        where = f"image {self.path}/{name}"
        entry = self._find(name)
        if entry is None:
            raise BrokenImage(f"{where} is missing", everywhere=False)
        offset, size, method = (int(column[entry]) for column in (self._offsets, self._sizes, self._methods))
        head = os.pread(self._opened(), LOCAL_SIZE, offset)
        if len(head) < LOCAL_SIZE or not head.startswith(LOCAL):
            raise BrokenImage(f"{where} is broken (the archive is damaged there)", everywhere=False)
        flags, names, extra = struct.unpack_from("<H", head, 6)[0], *struct.unpack_from("<HH", head, 26)
        data = os.pread(self._opened(), size, offset + LOCAL_SIZE + names + extra)
        if flags & 1 or method not in (STORED, DEFLATED):
            how = "encrypted" if flags & 1 else f"packed with method {method}"
            raise BrokenImage(f"{where} is {how}, which cannot be read; pack the archive anew", everywhere=False)
        if len(data) < size:
            raise BrokenImage(f"{where} is cut off", everywhere=False)
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS) if method == DEFLATED else data
        except zlib.error as error:
            raise BrokenImage(f"{where} is broken ({error})", everywhere=False) from None
        if zlib.crc32(data) != int(self._checksums[entry]):
            raise BrokenImage(f"{where} is broken (its checksum is another)", everywhere=False)
        return data

    def _find(self, name: str) -> int | None:
        for candidate in (name, self._folder + name) if self._folder else (name,):
            encoded = candidate.encode()
            wanted = np.uint64(_hash(encoded))  # searching for an int would make floats of the whole column
            at = int(np.searchsorted(self._hashes, wanted))
            while at < len(self._hashes) and self._hashes[at] == wanted:
                begin, end = self._name_at[self._order[at]], self._name_at[self._order[at] + 1]
                if self._names[begin:end] == encoded:
                    return int(self._order[at])
                at += 1
        return None

    def _opened(self) -> int:
        if self._owner != os.getpid():  # a process of its own reads through a file of its own
            self._file, self._owner = os.open(self.path, os.O_RDONLY), os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": -1, "_owner": 0}

    def _read_contents(self) -> None:
        file = self._opened()
        count, size, offset = _find_contents(self.path, file)
        contents = os.pread(file, size, offset)
        while len(contents) < size:  # the system gives at most 2 GB at a time
            more = os.pread(file, size - len(contents), offset + len(contents))
            if not more:
                raise UserError(f"{self.path}: its table of contents is cut off; download the archive again")
            contents += more
        offsets, sizes = np.empty(count, np.uint64), np.empty(count, np.uint64)
        checksums, methods = np.empty(count, np.uint32), np.empty(count, np.uint16)
        names: list[bytes] = []
        at = 0
        unpack = struct.Struct("<4sHHHHHHIIIHHHHHII").unpack_from
        for number in range(count):
            if at + ENTRY_SIZE > size:
                raise UserError(f"{self.path}: entry {number} of its table of contents is damaged; download it again")
            mark, _, _, _, method, _, _, crc, packed, whole, name, extra, comment, _, _, _, where = unpack(contents, at)
            if mark != ENTRY:
                raise UserError(f"{self.path}: entry {number} of its table of contents is damaged; download it again")
            begin = at + ENTRY_SIZE
            if LONG in (packed, whole, where):
                packed, where = _long(contents[begin + name : begin + name + extra], packed, whole, where)
            names.append(contents[begin : begin + name])
            offsets[number], sizes[number], checksums[number], methods[number] = where, packed, crc, method
            at = begin + name + extra + comment
        self._offsets, self._sizes, self._checksums, self._methods = offsets, sizes, checksums, methods
        hashes = np.fromiter(map(_hash, names), np.uint64, count)
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32)
        self._hashes = hashes[self._order]
        self._name_at = np.concatenate([[0], np.cumsum([len(name) for name in names], dtype=np.int64)])
        self._names = b"".join(names)
        folders = {name.split(b"/", 1)[0] for name in names if b"/" in name}
        whole = len(folders) == 1 and all(b"/" in name for name in names)
        self._folder = f"{next(iter(folders)).decode(errors='replace')}/" if whole else ""


def _hash(name: bytes) -> int:
    """64 bits that are the same in every process (``hash`` is not)."""
    return zlib.crc32(name) << 32 | zlib.adler32(name)


def _long(extra: bytes, packed: int, whole: int, where: int) -> tuple[int, int]:
    """Packed size and offset from the zip64 field, in which stands what does not fit: whole, packed, offset."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            if whole == LONG:
                next(values)
            packed = next(values) if packed == LONG else packed
            where = next(values) if where == LONG else where
            break
        at += 4 + length
    return packed, where


def _find_contents(path: str, file: int) -> tuple[int, int, int]:
    """Number of entries, size and offset of an archive's table of contents.

    Raises:
        UserError: there is none.
    """
    length = os.fstat(file).st_size
    tail_at = max(0, length - END_SIZE - 65535 - 20)
    tail = os.pread(file, length - tail_at, tail_at)
    end = tail.rfind(END)
    if end < 0:
        begun = os.pread(file, 4, 0) in (LOCAL, END)
        why = "the end of the archive is missing; download it again" if begun else "no zip archive"
        raise UserError(f"{path}: {why}")
    count, size, offset = struct.unpack_from("<HII", tail, end + 10)
    locator = end - 20
    if locator >= 0 and tail[locator : locator + 4] == LOCATOR64:
        record = os.pread(file, 56, struct.unpack_from("<Q", tail, locator + 8)[0])
        if not record.startswith(END64):
            raise UserError(f"{path}: its end is damaged; download it again")
        count, size, offset = struct.unpack_from("<QQQ", record, 32)
    return count, size, offset


_OPEN: dict[str, ZipPictures] = {}


def archive_of(path: str) -> tuple[ZipPictures, str] | None:
    """The archive that ``path`` leads into, and the name there: "data/images.zip/a.jpg"; None for another path."""
    at = path.lower().find(".zip" + os.sep)
    if at < 0:
        return None
    archive, name = path[: at + 4], path[at + 5 :]
    if archive not in _OPEN:
        if not Path(archive).is_file():  # a folder that is called so
            return None
        _OPEN[archive] = ZipPictures(archive)
    return _OPEN[archive], name
