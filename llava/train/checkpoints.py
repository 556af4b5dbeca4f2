"""Checkpoints of a run on disk: which are whole, which one a run goes on from, when an older one may go.

``checkpoint-N`` is filled as ``.unfinished/checkpoint-N``. When every rank has written its files, they are looked
through and listed with their sizes in ``complete.json``, and only then does the folder get its name. A kill, a full
disk or a node that fails leaves no half of one; a file that is lost or cut off later is noticed by its size.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.errors import UserError, warn
from llava.files import read_object, write_json
from llava.run_card import AFRESH, queued_again
from llava.run_card import FILE as RUN_CARD
from llava.train.caches import rank_0s

MANIFEST = "complete.json"
STAGING = ".unfinished"
REMOVED = ".removed"


def checkpoint_name(step: int) -> str:
    """Name of the folder that holds the state after ``step`` optimizer steps."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoints_of(output_dir: Path) -> dict[int, Path]:
    """Folders that are called checkpoints, by step, the newest first; whole or not."""
    found = {
        int(match[1]): folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)) and folder.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))


def seal(folder: Path, run: str | None) -> None:
    """Write the manifest of a folder that every rank has filled.

    Raises:
        OSError: a file is not what was written (``fault``).
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what gets a name is on the disk
        if problem := _cut_off(path):
            raise OSError(f"{path.relative_to(folder)}: {problem}")
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_json(folder / MANIFEST, {"run": run, "files": sizes})


def fault(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, in a few words; None where it is one."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}"
    try:
        sizes = read_object(manifest)["files"]
    except (UserError, KeyError):
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if problem := _cut_off(path):
            return f"{name}: {problem}"
    return None


def _cut_off(path: Path) -> str | None:
    """What the format of a weight file says about its end; reads a few bytes."""
    if path.suffix in (".pt", ".pth", ".bin"):
        return None if zipfile.is_zipfile(path) else "its end is missing"
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8 or path.stat().st_size < 8 + struct.unpack("<Q", head)[0]:
                return "its end is missing"
    return None


def newest_whole(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of the run that ``run.json`` is about; one line about each that is passed over.

    Checkpoints of an earlier run in the same folder are left alone: this run was started afresh.

    Raises:
        UserError: there are checkpoints, and none is whole: beginning anew must be the user's choice.
    """
    run = read_object(output_dir / RUN_CARD).get("run") if (output_dir / RUN_CARD).is_file() else None
    faults, whole = {}, []
    for folder in checkpoints_of(output_dir).values():
        if problem := fault(folder):
            faults[folder] = problem
        elif run is None or _run_of(folder) in (run, None):
            whole.append(folder)
            if _has_optimizer(folder):
                break
    else:
        folder = whole[0] if whole else None  # which cannot be gone on from, as will be said
    for passed, problem in faults.items():
        if folder is None and (passed / TRAINER_STATE_NAME).is_file():
            raise UserError(
                f"{passed} may not be whole: {problem}; pass --resume_from_checkpoint {passed} where you know better, "
                "or False to start afresh"
            )
        warn(f"{passed} is passed over: {problem}")
    return folder


def checkpoint_to_resume(args: Any) -> str | None:
    """The folder to go on from: the newest whole one of ``--output_dir``, or what ``--resume_from_checkpoint`` says.

    ``False`` starts afresh. A folder that is named is taken as it is where it has no manifest (another program's). A
    job that Slurm has queued again has used up what the flag says, and goes on. Rank 0 looks, for all: another rank
    might see something else through a network folder.

    Raises:
        UserError: the folder that the flag names is no whole checkpoint, or the checkpoint has no optimizer state.
    """
    found = rank_0s(_to_resume(args) if args.process_index == 0 else None)
    if found is not None and not Path(found).is_dir():
        raise UserError(
            f"{found} cannot be seen from here; --output_dir must be a folder that all nodes share", everywhere=False
        )
    return found


def _to_resume(args: Any) -> str | None:
    wanted = args.resume_from_checkpoint
    if queued_again() and (own := newest_whole(Path(args.output_dir))):
        wanted = str(own)  # killed before it had one, it begins where the flag says once more
    if wanted in AFRESH:
        return None
    if wanted in (None, "True", "true"):
        found = newest_whole(Path(args.output_dir))
        if found is None:
            return None
        wanted = str(found)
    folder = Path(wanted)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint of a run ({TRAINER_STATE_NAME} is missing)")
    if (folder / MANIFEST).is_file() and (problem := fault(folder)):
        raise UserError(f"--resume_from_checkpoint {wanted}: not whole, {problem}; choose another one")
    if not _has_optimizer(folder):
        raise UserError(
            f"{wanted} holds no optimizer state (--save_only_model), so the run cannot go on from it; choose another "
            "--output_dir, or pass --resume_from_checkpoint False to start afresh"
        )
    return wanted


def _has_optimizer(folder: Path) -> bool:
    """Whether a run can go on from it: ``--save_only_model`` leaves that out."""
    return (folder / "optimizer.pt").is_file() or any(folder.glob("global_step*"))


def publish_checkpoint(staged: Path, run: str | None) -> Path:
    """Give a filled folder its name, once it is proved whole."""
    seal(staged, run)
    final = staged.parent.parent / staged.name
    if final.exists():
        remove(final)
    staged.rename(final)
    if problem := fault(final):
        raise OSError(f"{final}: {problem}")
    shutil.rmtree(staged.parent)
    return final


def rotate(output_dir: Path, newest: Path, limit: int | None, best: str | None, run: str | None) -> None:
    """Delete this run's older checkpoints but ``limit`` of all (``--save_total_limit``); never ``newest`` nor ``best``,
    nor the newest that the run can go on from.

    ``newest`` is whole (``publish_checkpoint``).
    """
    if not limit or limit < 0:
        return
    older = [f for f in checkpoints_of(output_dir).values() if not fault(f) and _run_of(f) == run]
    kept = {newest.name} | ({Path(best).name} if best else set())
    kept |= {folder.name for folder in [f for f in older if _has_optimizer(f)][:1]}
    for folder in older:
        if folder.name in kept:
            continue
        if len(kept) < limit:
            kept.add(folder.name)
        else:
            remove(folder)


def _run_of(folder: Path) -> str | None:
    return read_object(folder / MANIFEST).get("run") if (folder / MANIFEST).is_file() else None


def remove(folder: Path) -> None:
    """Delete a folder; from the first moment it is no checkpoint by name."""
    doomed = folder.with_name(f"{REMOVED}-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def sweep(output_dir: Path) -> None:
    """Remove what a killed run left unfinished: staged and half-deleted checkpoints, files without their names."""
    for folder in (output_dir / STAGING, *output_dir.glob(f"{REMOVED}-*")):
        shutil.rmtree(folder, ignore_errors=True)
    for path in output_dir.glob(".*"):
        # Of atomic_write and of write_tensors, while they write what a run writes.
        if path.is_file() and re.fullmatch(r"\.[\w-]+\.(json|bin|safetensors)\.([a-z0-9_]{8}|tmp)", path.name):
            path.unlink(missing_ok=True)


def room_for(output_dir: Path) -> None:
    """Refuse to begin a checkpoint that will not fit, going by the one before.

    Raises:
        UserError: less is free than the newest checkpoint takes.
    """
    before = next(iter(checkpoints_of(output_dir).values()), None)
    if before is None:
        return
    needed = sum(path.stat().st_size for path in before.rglob("*") if path.is_file())
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise no_room(output_dir, f"{needed:,} bytes are needed, {free:,} are free")


def no_room(output_dir: Path, why: str) -> UserError:
    """The error of an output folder that takes no more."""
    whole = next((folder for folder in checkpoints_of(output_dir).values() if not fault(folder)), None)
    kept = f"{whole.name} is untouched" if whole else "there is no checkpoint yet"
    return UserError(
        f"{output_dir}: no more can be written ({why}); {kept}; make room and give the same command again",
        everywhere=False,
    )


def write_failure(error: Exception) -> str | None:
    """What a writer's exception says of the disk, None where it is about something else.

    safetensors and torch's writer of archives have errors of their own for a full disk.
    """
    said = " ".join(str(error).split())
    if isinstance(error, OSError):
        return said if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, None) else None
    if isinstance(error, SafetensorError):
        return said if re.search(r"I/?O|Io|os error", said) else None
    return said[:200] if re.search(r"PytorchStreamWriter|inline_container|file write", said) else None
