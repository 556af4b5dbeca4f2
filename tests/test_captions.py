"""Conversation data: upstream's pre-training file against recordings, text-only rows, rows of several pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import draw_picture, pixel_values

from llava.conversation import template
from llava.data.captions import Captions
from llava.data.examples import ExampleBuilder
from llava.data.images import ImageLoader
from llava.errors import UserError
from llava.model.builder import load_image_processor
from llava.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def builder(golden):
    tokenizer = load_tokenizer(golden / "tiny-llava-original")
    processor = load_image_processor(golden / "tiny-clip", None)

    def make(version="v1", aspect="pad", vocab_size=2000):
        loader = ImageLoader(processor, aspect)
        return ExampleBuilder(tokenizer, template(version), loader, 16, max_length=2048, vocab_size=vocab_size)

    return make


@pytest.fixture
def data(tmp_path, builder):
    """``data(*records)``: them as a data set over a folder with ``a.png`` and ``b.png``."""
    for name in ("a", "b"):
        draw_picture(tmp_path / f"{name}.png", name)

    def make(*records, skip=False, **options):
        (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
        return Captions(str(tmp_path / "data.json"), str(tmp_path), builder(**options), skip)

    return make


def record(question="Hello there", answer="Hi.", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def test_upstreams_pretraining_file_gives_the_recorded_ids_labels_and_pixels(golden, builder):
    captions = Captions(str(golden / "pretrain_data.json"), str(golden / "mini_vg"), builder("plain", "square"))
    with np.load(golden / "forward" / "forward_HADPO_tf4.31.0.npz") as forward:
        ids, labels, pixels = (forward[f"plain8|{name}"] for name in ("input_ids", "labels", "images"))
    assert len(captions) == 8
    for index, example in enumerate(captions):
        length = len(example.input_ids)
        assert example.input_ids == ids[index, :length].tolist()
        assert example.labels == labels[index, :length].tolist()
        assert not ids[index, length:].any()  # padding
        (picture,) = example.images.values()
        assert np.abs(pixel_values(captions.builder.load_image, picture).numpy() - pixels[index]).max() <= 1e-6


def test_pictures_are_found_below_the_image_folder(golden, builder):
    captions = Captions(str(golden / "pretrain_data.json"), str(golden / "mini_vg"), builder("plain"))
    assert captions[0].image_paths == (str(golden / "mini_vg" / "VG_100K" / "2315000.png"),)


def test_a_record_without_picture_is_text_only(data):
    example = data(record())[0]
    assert (example.image_paths, example.images) == ((), {})
    assert -200 not in example.input_ids


@pytest.mark.parametrize("image", ["", None, []])
def test_an_empty_image_key_is_text_only(data, image):
    assert data(record(image=image))[0].image_paths == ()


def test_a_record_of_several_pictures(data, tmp_path):
    both = record("First <image> then <image> and <image>.", image=["a.png", "b.png", "a.png"])
    example = data(both)[0]
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    assert example.image_paths == (a, b, a)
    assert list(example.images) == [a, b]
    assert example.input_ids.count(-200) == 3


def test_a_list_of_one_picture_is_one_picture(data):
    question = "What is it?\n<image>"
    assert data(record(question, image=["a.png"]))[0].input_ids == data(record(question, image="a.png"))[0].input_ids


def test_json_lines_are_read_too(golden, builder, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(record()) + "\n" + json.dumps(record()) + "\n")
    captions = Captions(str(tmp_path / "data.jsonl"), None, builder())
    assert len(captions) == 2
    assert captions.place(1).endswith("data.jsonl: line 2")


def test_modality_lengths_count_words_negative_without_picture(data):
    captions = data(
        record("<image>\nWhat is this?", "A red car.", image="a.png"),  # <image> What is this? A red car.
        record("Hello there", "Hi."),
        record("", "."),
        {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": " "}]},
    )
    # Upstream asserts that no length is 0.
    assert captions.modality_lengths == [7, -3, -1, -1]


def test_recorded_modality_lengths(golden, builder):
    captions = Captions(str(golden / "pretrain_data.json"), str(golden / "mini_vg"), builder("plain"))
    # "Render a clear and concise summary of the photo. <image>" and "a man riding a bicycle on a street".
    assert captions.modality_lengths[0] == 10 + 8
    assert min(captions.modality_lengths) > 0


def test_missing_pictures_are_found_before_training(data):
    lost = record("<image>\nx", image="gone.png")
    with pytest.raises(UserError, match=r"1 image\(s\) missing, in 2 of 3 records: .*gone\.png .*data\.json: record 0"):
        data(lost, record(), lost)
    assert len(data(lost, record(), lost, skip=True)) == 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"image": "a.png"}, r"data\.json: record 1: no key 'conversations'"),
        (record(image=3), r"data\.json: record 1: key 'image' must be a path or a list of paths, found 3"),
        (record(image=["a.png", 3]), r"data\.json: record 1: key 'image' must be a path or a list of paths, found 3"),
        ({"conversations": [{"from": "human"}]}, r"data\.json: record 1: turn 0: no key 'value'"),
        ({"conversations": ["hi"]}, r"data\.json: record 1: turn 0"),
        (record("<image>\nx"), r"data\.json: record 1: 1 <image> in the text for 0 image"),
        ({"conversations": []}, r"data\.json: record 1: .*remove the record"),
        (record(answer=""), r"data\.json: record 1: .*remove the record"),
    ],
)
def test_every_record_is_checked_before_the_first_is_trained_on(data, broken, message):
    with pytest.raises(UserError, match=message):
        data(record(), broken)


def test_going_on_without_pictures_does_not_go_on_without_records(data):
    # The whole data set is of another tokenizer: none of it may be trained on, however pictures are treated.
    captions = data(record(), record(), skip=True, vocab_size=200)
    with pytest.raises(UserError, match=r"data\.json: record 0: token id \d+ .* outside the model's vocabulary of 200"):
        captions[0]


def test_a_broken_picture_is_named_or_replaced_by_the_next_record(data, tmp_path, capsys):
    records = [record("<image>\nx", "Wide.", image="broken.png"), record("<image>\nx", "Red.", image="a.png")]
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:80])
    with pytest.raises(UserError, match=r"data\.json: record 0: image .*broken\.png is broken or truncated"):
        data(*records)[0]
    captions = data(*records, skip=True)
    assert captions[0].input_ids == captions[1].input_ids
    assert "broken.png" in capsys.readouterr().err


def test_an_answer_that_is_cut_away_is_warned_of_and_kept(golden, tmp_path, capsys):
    tokenizer = load_tokenizer(golden / "tiny-llava-original")
    short = ExampleBuilder(tokenizer, template("v1"), None, 16, max_length=8, vocab_size=2000)
    (tmp_path / "data.json").write_text(json.dumps([record()]))
    Captions(str(tmp_path / "data.json"), None, short)[0]
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert "data.json: record 0: the cut to 8 tokens leaves nothing to learn" in warning


def test_data_may_lie_in_the_home_directory(builder, tmp_path, monkeypatch):
    draw_picture(tmp_path / "a.png", "a")
    (tmp_path / "data.json").write_text(json.dumps([record("<image>\nx", image="a.png")]))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Captions("~/data.json", "~", builder())) == 1
