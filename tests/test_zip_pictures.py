"""Pictures from an archive, and under another ending than their record says."""

from __future__ import annotations

import pickle
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import draw_picture
from PIL import Image

from llava.data import zip_pictures
from llava.data.images import join, missing_files, open_image
from llava.data.zip_pictures import ZipPictures
from llava.errors import BrokenImage, UserError


@pytest.fixture
def drawn(tmp_path):
    folder = tmp_path / "drawn"
    folder.mkdir()
    for number in range(20):
        draw_picture(folder / f"{number}.png", str(number))
    return folder


def packed(path, drawn, prefix="", how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as archive:
        for file in sorted(drawn.iterdir()):
            archive.write(file, prefix + file.name)
    return path


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "images/"])
def test_a_picture_of_an_archive_is_that_of_the_folder(tmp_path, drawn, how, prefix):
    archive = packed(tmp_path / "images.zip", drawn, prefix, how)
    for file in drawn.iterdir():
        path = join(str(archive), file.name)
        assert open_image(path).tobytes() == open_image(file).tobytes()
    assert missing_files([join(str(archive), "3.png")]) == set()
    gone = join(str(archive), "99.png")
    assert missing_files([gone, join(str(archive), "3.png")]) == {gone}
    assert ZipPictures(archive).missing(["99.png", *(file.name for file in drawn.iterdir())]) == {"99.png"}
    with pytest.raises(BrokenImage, match=r"record 7: image .*images.zip/99.png is missing"):
        open_image(gone, "record 7")


def test_zip64_offsets_and_sizes_are_read(tmp_path, drawn, monkeypatch):
    """Beyond 4 GB the values stand in a field of their own; zipfile writes it from a limit that can be lowered."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 5)
    archive = packed(tmp_path / "big.zip", drawn)
    monkeypatch.undo()
    assert zip_pictures.END64 in archive.read_bytes()
    assert struct.pack("<I", zip_pictures.LONG) in archive.read_bytes()
    opened = ZipPictures(archive)
    assert len(opened) == 20
    for file in drawn.iterdir():
        assert opened.read(file.name) == file.read_bytes()


def test_threads_and_other_processes_read_the_same(tmp_path, drawn):
    opened = ZipPictures(packed(tmp_path / "images.zip", drawn))
    names = [f"{number % 20}.png" for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened.read, names)) == [(drawn / name).read_bytes() for name in names]
    copy = pickle.loads(pickle.dumps(opened))
    assert copy.read("5.png") == (drawn / "5.png").read_bytes()


def test_damaged_archives_are_named(tmp_path, drawn):
    archive = packed(tmp_path / "images.zip", drawn)
    whole = archive.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "the end of the archive is missing; download it again"),
        (b"something else", "no zip archive"),
    ):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=message):
            ZipPictures(archive)
    archive.write_bytes(whole)
    opened = ZipPictures(archive)
    at = whole.index((drawn / "0.png").read_bytes()) + 60
    archive.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(BrokenImage, match="its checksum is another"):
        opened.read("0.png")


def test_a_folder_may_be_called_zip(tmp_path, drawn):
    folder = tmp_path / "odd.zip"
    drawn.rename(folder)
    assert open_image(folder / "1.png").mode == "RGB"
    assert missing_files([str(folder / "1.png"), str(folder / "77.png")]) == {str(folder / "77.png")}


def test_other_endings_and_other_contents(tmp_path):
    """OCR-VQA: records say .jpg, the server sent .gif and .png, under their own names or under .jpg."""
    draw_picture(tmp_path / "source.png", "x")
    source = Image.open(tmp_path / "source.png")
    frames = [source.convert("P"), source.rotate(90).convert("P")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    source.convert("RGBA").save(tmp_path / "b.png")
    source.save(tmp_path / "c.jpg", format="PNG")
    names = [str(tmp_path / f"{name}.jpg") for name in "abcd"]
    assert missing_files(names) == {names[3]}
    expected = source.convert("RGB").tobytes()
    assert [open_image(name).tobytes() for name in names[1:3]] == [expected, expected]
    assert open_image(names[0]).size == source.size  # the first frame
    with pytest.raises(BrokenImage, match=r"d.jpg is missing"):
        open_image(names[3])
