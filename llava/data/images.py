"""Pictures from disk: all checked before training starts, opened with errors that name the file."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file

from llava.data.zip_pictures import ZipPictures, archive_of
from llava.errors import BrokenImage, UserError, warn
from llava.files import sha256
from llava.mm_utils import pad_to_square

SHOWN = 5  # how many missing files a message names


def open_image(path: str | os.PathLike[str], where: str = "") -> Image.Image:
    """An RGB picture, decoded whole.

    Raises:
        BrokenImage: missing, truncated or not a picture; the message names the file (and ``where``, the record).
    """
    prefix = f"{where}: " if where else ""
    try:
        with Image.open(_source(os.fspath(path))) as image:
            return image.convert("RGB")
    except BrokenImage as error:  # of an archive
        raise BrokenImage(f"{prefix}{error}", everywhere=False) from None
    except FileNotFoundError:
        raise BrokenImage(f"{prefix}image {path} is missing", everywhere=False) from None
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{prefix}image {path} is broken or truncated ({error})", everywhere=False) from None


# Under which a picture may lie whose record says ".jpg": LLaVA's script for OCR-VQA keeps what the server sends.
OTHER_ENDINGS = (".jpg", ".png", ".gif", ".jpeg", ".webp")


def _source(path: str) -> str | io.BytesIO:
    """What Pillow opens for a path: the file, one that differs in its ending, or bytes of an archive."""
    if found := archive_of(path):
        archive, name = found
        return io.BytesIO(archive.read(name))
    if not os.path.exists(path):
        stem = os.path.splitext(path)[0]
        return next((other for ending in OTHER_ENDINGS if os.path.exists(other := stem + ending)), path)
    return path


def picture_hash(path: str) -> str:
    """Hex SHA-256 of a picture's file, or of its bytes in an archive."""
    source = _source(path)
    return sha256(source) if isinstance(source, str) else hashlib.sha256(source.getvalue()).hexdigest()


def missing_files(paths: Iterable[str]) -> set[str]:
    """Which of ``paths`` lead to no picture. Every folder is listed once: half a million files cost seconds, also on
    NFS. A file of the same name with another ending of a picture counts.
    """
    by_folder: dict[str, set[str]] = defaultdict(set)
    in_archives: dict[ZipPictures, list[str]] = defaultdict(list)
    missing: set[str] = set()
    for path in paths:
        if ".zip" in path and (found := archive_of(path)):
            in_archives[found[0]].append(found[1])
            continue
        folder, name = os.path.split(path)
        by_folder[folder].add(name)
    for archive, names in in_archives.items():
        missing |= {os.path.join(archive.path, name) for name in archive.missing(names)}
    for folder, names in by_folder.items():
        place = folder or "."
        present = set(os.listdir(place)) if os.path.isdir(place) else set()
        missing |= {
            os.path.join(folder, name)
            for name in names - present
            if not any(os.path.splitext(name)[0] + ending in present for ending in OTHER_ENDINGS)
        }
    return missing


def drop_missing(
    records: list[tuple[str, Any]], images_of: Any, skip: bool, flag: str = "--image_folder"
) -> list[tuple[str, Any]]:
    """Records whose pictures all exist.

    ``records`` are ``(where, record)`` pairs and ``images_of(record)`` the record's image paths.

    Raises:
        UserError: pictures are missing and ``skip`` is false (counted, the first few named), or none is left.
    """
    missing = missing_files(path for _, record in records for path in images_of(record))
    if not missing:
        return records
    kept, lost, named = [], 0, []
    for where, record in records:
        gone = [path for path in images_of(record) if path in missing]
        if not gone:
            kept.append((where, record))
            continue
        lost += 1
        if gone[0] not in {path for path, _ in named} and len(named) < SHOWN:
            named.append((gone[0], where))
    names = ", ".join(f"{path} ({where})" for path, where in named) + (", ..." if len(missing) > len(named) else "")
    found = f"{len(missing)} image(s) missing, in {lost} of {len(records)} records: {names}"
    if not skip:
        raise UserError(f"{found}; check {flag}, or pass --skip_missing_images to go on without them")
    if not kept:
        raise UserError(f"{found}; no record is left; check {flag}")
    warn(f"{found}; going on without them")
    return kept


class ImageLoader:
    """Path -> the picture as the model's processor crops it, (3, H, W) uint8.

    Bytes travel to the device; ``levels`` says what each means there. Pictures used a moment ago (by another pair of
    the batch, or on a small set in the last epoch) are not decoded again.
    """

    KEPT = 256 * 2**20  # bytes of pictures a process remembers

    def __init__(self, image_processor: Any, image_aspect_ratio: str | None) -> None:
        self.image_processor = image_processor
        self.image_aspect_ratio = image_aspect_ratio
        self._recent: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._features: dict[str, str] = {}
        self._flag = ""
        self._no_features: torch.Tensor | None = None

    def use_features(self, files: dict[str, str], flag: str, blank: torch.Tensor | None = None) -> None:
        """From now on give features, (T, D), for the pictures with a file of them; where there is no picture ``blank``.

        ``flag`` is what had them kept.
        """
        self._features, self._flag, self._no_features = files, flag, blank
        self._recent.clear()

    def __call__(self, path: str, where: str) -> torch.Tensor:
        if path in self._features:
            return self._kept(path)
        if path in self._recent:
            self._recent.move_to_end(path)
            return self._recent[path]
        picture = open_image(path, where)
        if self.image_aspect_ratio == "pad":
            picture = pad_to_square(picture, self.image_processor)
        as_bytes = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        pixels = self.image_processor.preprocess(picture, **as_bytes)["pixel_values"][0]
        self._recent[path] = pixels
        while len(self._recent) * pixels.nbytes > self.KEPT:
            self._recent.popitem(last=False)
        return pixels

    def _kept(self, path: str) -> torch.Tensor:
        try:
            return load_file(self._features[path])["features"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{self._flag}: {self._features[path]}: cannot be read ({error}); remove the file", everywhere=False
            ) from None

    def levels(self) -> torch.Tensor:
        """What the processor makes of each byte, by channel, to the bit: (3, 256) float32."""
        ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        untouched = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        return self.image_processor.preprocess(Image.fromarray(ramp), **untouched)["pixel_values"][0, :, 0]

    def blank(self) -> torch.Tensor:
        """What stands in for a picture where a batch has none, (3, H, W); in place of features, (T, D)."""
        if self._no_features is not None:
            return self._no_features
        if self._features:
            return torch.zeros_like(self._kept(next(iter(self._features))))
        size = self.image_processor.crop_size
        return torch.zeros(3, size["height"], size["width"], dtype=torch.uint8)


def join(folder: str | os.PathLike[str] | None, name: str) -> str:
    """Path of ``name`` under ``folder``, as text."""
    if folder and name and not _UNUSUAL.search(name):  # half a million of them, without pathlib's objects
        return os.path.join(_expanded(os.fspath(folder)), name)
    return str((Path(folder or "") / name).expanduser())


# What pathlib would write otherwise: "/a", "~a", "./a", "a//b", "a/./b", "a/".
_UNUSUAL = re.compile(r"\A[/~]|(?:\A|/)\.?(?:/|\Z)")


@functools.lru_cache(maxsize=64)
def _expanded(folder: str) -> str:
    expanded = str(Path(folder).expanduser())
    return "" if expanded == "." else expanded
