"""Reading what users hand in and writing what they keep: clear errors, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llava.errors import UserError, warn

LFS_POINTER = b"version https://git-lfs"


def existing(path: str | os.PathLike[str] | None, flag: str, *, directory: bool = False) -> Path:
    """The path a flag names, which must exist and be a file (or a directory)."""
    if not path:
        raise UserError(f"{flag} is missing: pass the path of a {'folder' if directory else 'file'}")
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"{flag} {path}: no such {'folder' if directory else 'file'}")
    if found.is_dir() != directory:
        raise UserError(f"{flag} {path}: expected a {'folder' if directory else 'file'}")
    return found


def _json_error(path: Path, error: json.JSONDecodeError, offset: int = 0, line: int | None = None) -> UserError:
    byte = offset + len(error.doc[: error.pos].encode())
    at = f"line {line if line is not None else error.lineno}, byte {byte}"
    return UserError(f"{path}: broken JSON at {at}: {error.msg}; mend that place or download the file again")


def _decode(path: Path, raw: bytes, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {offset + error.start}; save the file as UTF-8") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """One JSON document."""
    path = Path(path).expanduser()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return json.loads(_decode(path, raw))
    except json.JSONDecodeError as error:
        refuse_pointer(path)
        raise _json_error(path, error) from None


def refuse_pointer(path: Path) -> None:
    """Raise ``UserError`` for a file that git-LFS has left in the place of a large one."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path}: a git-LFS pointer and not the file itself; run git lfs pull, or download it")


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """One JSON document that is an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_jsonl(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, Any]]]:
    """JSON lines as ``(line number from 1, object)``; blank lines are skipped, anything else must be an object."""
    path = Path(path).expanduser()
    rows: list[tuple[int, dict[str, Any]]] = []
    offset = 0
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for number, raw in enumerate(lines, 1):
        text = _decode(path, raw, offset)
        if text.strip():
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise _json_error(path, error, offset, number) from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number}: expected one JSON object a line, found {type(row).__name__}")
            rows.append((number, row))
        offset += len(raw)
    return rows


def whole_lines(path: Path) -> Iterator[Any]:
    """JSON lines of a file that grows, up to the first line that was cut off."""
    # Split at "\n" alone: a text may hold U+2028, at which str.splitlines would cut it in two.
    for line in path.read_bytes().decode(errors="replace").split("\n")[:-1]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def read_records(path: str | os.PathLike[str]) -> list[tuple[str, dict[str, Any]]]:
    """A JSON list of objects, or JSON lines of them, as ``(where, record)``; ``where`` names a record in messages.

    An empty list is refused: nothing that reads records has any use for one.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        records = [(f"{path}: line {number}", row) for number, row in read_jsonl(path)]
    else:
        content = read_json(path)
        if not isinstance(content, list):
            raise UserError(f"{path}: expected a JSON list of records, found {type(content).__name__}")
        records = []
        for index, row in enumerate(content):
            if not isinstance(row, dict):
                raise UserError(f"{path}: record {index}: expected an object, found {type(row).__name__}")
            records.append((f"{path}: record {index}", row))
    if not records:
        raise UserError(f"{path}: holds no records; expected at least one")
    return records


def field(where: str, record: dict[str, Any], key: str, kind: type | tuple[type, ...], mend: str = "") -> Any:
    """``record[key]``, which must be there and be of ``kind``."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(k.__name__ for k in kinds)
    tail = f"; {mend}" if mend else ""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with '{key}', found {type(record).__name__}{tail}")
    if key not in record:
        keys = ", ".join(map(str, record)) or "none"
        raise UserError(f"{where}: no key '{key}' (a {wanted} is expected; found the keys: {keys}){tail}")
    value = record[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{where}: key '{key}' must be a {wanted}, found {type(value).__name__}{tail}")
    return value


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """A file that appears whole or not at all: written beside its place, flushed to disk, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears whole or not at all, in the place of an older one: filled beside it, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


_CLAIMED: dict[Path, IO[str]] = {}  # a lock lives as long as its file is open


def claim_folder(folder: str | os.PathLike[str], name: str = "run") -> None:
    """Make sure that no other process writes to a run's folder until this one ends, however it ends.

    Runs of another ``name`` may. The lock is the kernel's own (POSIX): a killed process has none, nor has a data worker
    that outlives it. Where the file system has no locks, nothing is claimed.

    Raises:
        UserError: another process holds the folder.
    """
    path = Path(folder).resolve() / f"{name}.lock"
    if path in _CLAIMED:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{folder} is being written by {holder}; wait for it, or choose another --output_dir", everywhere=False
            ) from None
        warn(f"{path}: this file system has no locks ({error.strerror}); do not start the same run twice")
        return
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    file.write(f"process {os.getpid()} on {socket.gethostname()}{f' (job {job})' if job else ''}\n")
    file.flush()
    _CLAIMED[path] = file


def leftovers(path: Path) -> list[Path]:
    """What ``atomic_write`` or ``atomic_folder`` was filling for ``path`` when its process was killed; or still is."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")  # tempfile's names
    return sorted(found for found in path.parent.glob(".*") if pattern.fullmatch(found.name))


def publish(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a finished temporary file its name, readable as the umask allows (mkstemp's 0600 hides it from a group)."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """A JSON document, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
        file.write("\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
