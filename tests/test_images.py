"""Pixel values against recordings of upstream's preprocessing, and pictures that are missing or broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_picture, pixel_values
from PIL import Image

from llava.data import images
from llava.data.images import ImageLoader, drop_missing, join, missing_files, open_image
from llava.errors import UserError
from llava.mm_utils import expand2square, preprocess_image, process_images
from llava.model.builder import load_image_processor

PICTURES = [
    "a_wide_97x41.png",
    "b_tall_33x120.png",
    "c_square_64x64.png",
    "d_wide_200x57.png",
    "e_tiny_5x9.png",
    "f_gray_80x61.png",
    "g_rgba_61x80.png",
    "h_big_511x340.png",
]
MEAN_COLOUR = (122, 116, 104)  # int(255 * CLIP's mean)


@pytest.fixture(scope="module")
def recorded(golden):
    with np.load(golden / "preproc" / "pixel_values_HADPO_tf4.31.0.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def processor(golden):
    return load_image_processor(golden / "tiny-clip", None)


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("name", PICTURES)
def test_pixel_values_are_the_recorded_ones(golden, processor, recorded, name, aspect):
    loader = ImageLoader(processor, aspect)
    pixels = pixel_values(loader, loader(str(golden / "images" / name), "record 0"))
    assert pixels.dtype == torch.float32
    whole = preprocess_image(open_image(golden / "images" / name), processor, aspect)
    assert torch.equal(pixels, whole)  # to the bit
    assert pixels.shape == (3, 56, 56)
    assert np.abs(pixels.numpy() - recorded[f"{name}|{aspect}"]).max() <= 1e-6


def test_every_recorded_picture_is_compared(golden, recorded):
    assert sorted(path.name for path in (golden / "images").iterdir()) == PICTURES
    assert {key.split("|")[0] for key in recorded} == set(PICTURES)


@pytest.mark.parametrize("name", ["a_wide_97x41.png", "h_big_511x340.png"])
def test_pixel_values_at_the_released_models_size(golden, recorded, name):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    loader = ImageLoader(processor, "pad")
    pixels = pixel_values(loader, loader(str(golden / "images" / name), "record 0"))
    assert np.abs(pixels.numpy() - recorded[f"{name}|pad336"]).max() <= 1e-6


@pytest.mark.parametrize("name", PICTURES)
def test_the_padded_square_is_the_recorded_one(golden, recorded, name):
    square = expand2square(open_image(golden / "images" / name), MEAN_COLOUR)
    assert np.array_equal(np.asarray(square), recorded[f"{name}|expand2square_uint8"])


def test_a_batch_of_pictures_follows_the_models_config(golden, processor, recorded):
    class Config:
        image_aspect_ratio = "pad"

    pictures = [Image.open(golden / "images" / name) for name in PICTURES]
    pixels = process_images(pictures, processor, Config)
    wanted = np.stack([recorded[f"{name}|pad"] for name in PICTURES])
    assert np.abs(pixels.numpy() - wanted).max() <= 1e-6


def test_the_blank_picture_has_the_processors_size(processor):
    blank = ImageLoader(processor, "pad").blank()
    assert blank.shape == (3, 56, 56)
    assert not blank.any()


def test_a_picture_is_decoded_once_while_it_is_remembered(golden, processor, monkeypatch):
    opened = []
    monkeypatch.setattr(images, "open_image", lambda path, where: opened.append(path) or open_image(path, where))
    loader = ImageLoader(processor, "pad")
    loader.KEPT = 2 * 3 * 56 * 56  # two pictures
    paths = [str(golden / "images" / name) for name in PICTURES[:3]]
    first = loader(paths[0], "")
    assert torch.equal(loader(paths[0], ""), first)
    for path in (paths[1], paths[0], paths[2], paths[0], paths[1]):
        loader(path, "")
    assert opened == [paths[0], paths[1], paths[2], paths[1]]  # the least recently used one goes


def test_a_truncated_picture_is_named_with_its_record_and_the_mend(golden, tmp_path):
    whole = (golden / "images" / "h_big_511x340.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"record 3: image .*cut\.png is broken or truncated") as error:
        open_image(tmp_path / "cut.png", "record 3")
    assert "--skip_missing_images" in error.value.mend


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "page.png").write_bytes(content)
    with pytest.raises(UserError, match=r"image .*page\.png is broken or truncated"):
        open_image(tmp_path / "page.png")


def test_a_truncated_jpeg_is_named(golden, tmp_path):
    Image.open(golden / "images" / "h_big_511x340.png").save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"image .*cut\.jpg is broken or truncated"):
        open_image(tmp_path / "cut.jpg")


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(UserError, match=r"record 3: image .*gone\.png is missing"):
        open_image(tmp_path / "gone.png", "record 3")


def test_an_error_met_while_training_is_told_by_the_rank_that_meets_it(tmp_path):
    with pytest.raises(UserError) as caught:
        open_image(tmp_path / "gone.png")
    assert not caught.value.everywhere


def test_missing_files_looks_into_every_folder(tmp_path):
    (tmp_path / "there").mkdir()
    draw_picture(tmp_path / "there" / "a.png", "a")
    there, gone, nowhere = (str(tmp_path / name) for name in ("there/a.png", "there/b.png", "nowhere/a.png"))
    assert missing_files([there, gone, nowhere, gone]) == {gone, nowhere}
    assert missing_files([there]) == set()
    assert missing_files([]) == set()


def test_missing_files_finds_pictures_in_the_working_directory(tmp_path, monkeypatch):
    draw_picture(tmp_path / "a.png", "a")
    monkeypatch.chdir(tmp_path)
    assert missing_files([join(None, "a.png"), join("", "b.png")]) == {"b.png"}


@pytest.fixture
def seven_lost(tmp_path):
    """Ten records, seven of them without their pictures (six distinct ones)."""
    for number in range(3):
        draw_picture(tmp_path / f"{number}.png", str(number))
    names = ["0", "5", "1", "6", "7", "8", "2", "9", "10", "10"]
    return [(f"data.json: record {i}", [str(tmp_path / f"{name}.png")]) for i, name in enumerate(names)]


def test_missing_pictures_are_counted_and_the_first_five_named(seven_lost, tmp_path):
    with pytest.raises(UserError) as caught:
        drop_missing(seven_lost, lambda paths: paths, skip=False)
    message = str(caught.value)
    assert message.startswith("6 image(s) missing, in 7 of 10 records: ")
    for name, record in [("5", 1), ("6", 3), ("7", 4), ("8", 5), ("9", 7)]:
        assert f"{tmp_path / name}.png (data.json: record {record})" in message
    assert "10.png" not in message
    assert ", ..." in message
    assert message.endswith("check --image_folder, or pass --skip_missing_images to go on without them")


def test_records_without_their_pictures_are_left_out_and_counted(seven_lost, capsys):
    kept = drop_missing(seven_lost, lambda paths: paths, skip=True)
    assert [where[-1] for where, _ in kept] == ["0", "2", "6"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: 6 image(s) missing, in 7 of 10 records: ")


def test_a_record_is_kept_only_with_all_of_its_pictures(tmp_path, capsys):
    draw_picture(tmp_path / "a.png", "a")
    records = [
        ("r0", [str(tmp_path / "a.png"), str(tmp_path / "b.png")]),
        ("r1", []),
        ("r2", [str(tmp_path / "a.png")]),
    ]
    assert [where for where, _ in drop_missing(records, lambda paths: paths, skip=True)] == ["r1", "r2"]


def test_leaving_out_missing_pictures_must_leave_something(seven_lost):
    lost = [record for record in seven_lost if record[0][-1] not in "026"]
    with pytest.raises(UserError, match=r"6 image\(s\) missing, in 7 of 7 records.*no record is left; check --vg_path"):
        drop_missing(lost, lambda paths: paths, skip=True, flag="--vg_path")


def test_paths_are_put_together_as_pathlib_does(tmp_path):
    names = ["a.jpg", "a/b.jpg", "/a", "./a.jpg", "a//b.jpg", "a/./b.jpg", "a/", "..", "../a.jpg", ".a", ""]
    for folder in ("data", "./data/", "data//x", ".", "/", "~", "~/x", "", None, tmp_path):
        for name in names:
            assert join(folder, name) == str((Path(folder or "") / name).expanduser()), (folder, name)
