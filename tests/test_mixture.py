"""Sources with weights: which records are seen and how often, by hand; and each once when a run goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter

import pytest
from conftest import draw_picture

from llava.conversation import template
from llava.data.captions import Captions
from llava.data.examples import ExampleBuilder
from llava.data.images import ImageLoader
from llava.data.mixture import Mixture, open_records
from llava.errors import UserError
from llava.model.builder import load_image_processor
from llava.tokenization import load_tokenizer
from llava.train.sampler import ModalityLengthSampler


@pytest.fixture(scope="module")
def builder(golden):
    loader = ImageLoader(load_image_processor(golden / "tiny-clip", None), "pad")
    tokenizer = load_tokenizer(golden / "tiny-llava-original")
    return ExampleBuilder(tokenizer, template("v1"), loader, 16, max_length=2048, vocab_size=2000)


def turns(question, answer="Hi."):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.fixture
def mix(tmp_path, builder):
    """``mix(text, seed)``: a mixture of ten conversations (``ten``) and three with pictures (``three``)."""
    (tmp_path / "ten.json").write_text(json.dumps([turns("a " * n) for n in range(10)]))
    pictured = [{**turns("<image> a b"), "image": f"{name}.png"} for name in "xyz"]
    (tmp_path / "three.json").write_text(json.dumps(pictured))
    for name in "xyz":
        draw_picture(tmp_path / f"{name}.png", name)

    def make(text, seed=0):
        text = text.replace("ten", str(tmp_path / "ten.json")).replace("three", str(tmp_path / "three.json"))
        (tmp_path / "mix.yaml").write_text(text)
        return open_records(str(tmp_path / "mix.yaml"), str(tmp_path), builder, seed=seed)

    return make


def numbers(data):
    """Record numbers in their own files, in order."""
    return [int(data.place(index).split()[-1]) for index in range(len(data))]


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        ("all", list(range(10))),
        ("first:3", [0, 1, 2]),
        ("end:3", [7, 8, 9]),
        ("first:25%", [0, 1, 2]),  # 2.5, rounded up
        ("end:10%", [9]),
        ("first:100%", list(range(10))),
        ("first:99", list(range(10))),
    ],
)
def test_which_records_are_used(mix, strategy, wanted):
    assert numbers(mix(f"datasets: [{{json_path: ten, sampling_strategy: '{strategy}'}}]")) == wanted


def test_drawn_records_are_different_ones_and_the_seed_decides(mix):
    text = "datasets: [{json_path: ten, sampling_strategy: 'random:4'}]"
    seen = {tuple(numbers(mix(text, seed))) for seed in range(8)}
    assert all(len(set(rows)) == 4 and list(rows) == sorted(rows) for rows in seen)
    assert len(seen) > 4
    assert numbers(mix(text, 3)) == numbers(mix(text, 3))


@pytest.mark.parametrize(("weight", "often"), [(1, {1: 10}), (2, {2: 10}), (0.5, {1: 5}), (2.3, {2: 7, 3: 3})])
def test_how_often_records_are_seen(mix, weight, often):
    data = mix(f"datasets: [{{json_path: ten, weight: {weight}}}]")
    assert Counter(Counter(numbers(data)).values()) == often


def test_sources_behind_each_other(mix, tmp_path):
    data = mix("datasets:\n- {json_path: ten, sampling_strategy: 'end:2'}\n- {json_path: three, weight: 2}\n")
    assert isinstance(data, Mixture) and len(data) == 8
    assert numbers(data) == [8, 9, 0, 1, 2, 0, 1, 2]
    # "a " eight and nine times and "Hi."; "<image> a b" and "Hi.".
    assert data.modality_lengths == [-9, -10, 4, 4, 4, 4, 4, 4]
    assert data.picture_paths == [str(tmp_path / f"{name}.png") for name in "xyzxyz"]
    assert data.files == [tmp_path / "mix.yaml", tmp_path / "ten.json", tmp_path / "three.json"]
    assert [data[index].number for index in range(8)] == list(range(8))
    alone = Captions(str(tmp_path / "three.json"), str(tmp_path), data.builder)[1]
    assert data[6].input_ids == alone.input_ids and data[6].image_paths == alone.image_paths
    assert list(data[6].images) == [str(tmp_path / "y.png")]
    assert [line.split()[1:] for line in data.table().splitlines()] == [
        ["records", "used", "weight", "an", "epoch"],
        ["10", "2", "1", "2"],
        ["3", "3", "2", "6"],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", r"mix\.yaml: expected the key 'datasets' with a list of sources, found list"),
        ("datasets: []", r"'datasets' is empty"),
        ("datasets: [", r"broken YAML at line 1"),
        ("data: []", r"no key 'datasets'"),
        ("datasets: [{json_path: ten}]\nweight: 2", r"mix\.yaml: unknown key 'weight'; the only one known"),
        ("datasets: [ten]", r"source 0: expected an object with 'json_path', found str"),
        ("datasets: [{}]", r"source 0: no key 'json_path'"),
        ("datasets: [{json_path: ten}, {json_path: none.json}]", r"source 1: json_path none\.json: no such file"),
        ("datasets: [{json_path: ten, wieght: 2}]", r"source 0: unknown key 'wieght'; known keys: json_path, image"),
        ("datasets: [{json_path: ten, weight: 0}]", r"source 0: weight 0: expected a positive number"),
        ("datasets: [{json_path: ten, weight: .nan}]", r"source 0: weight nan: expected a positive number"),
        ("datasets: [{json_path: ten, weight: two}]", r"source 0: key 'weight' must be a int or float, found str"),
        ("datasets: [{json_path: ten, weight: 0.01}]", r"source 0: none of its 10 records is left"),
        ("datasets: [{json_path: ten, sampling_strategy: 'last:3'}]", r"sampling_strategy 'last:3': expected all, fi"),
        ("datasets: [{json_path: ten, sampling_strategy: 'first:0'}]", r"sampling_strategy 'first:0': expected"),
        ("datasets: [{json_path: ten, sampling_strategy: 'first:1.5'}]", r"sampling_strategy 'first:1\.5': expected"),
        ("datasets: [{json_path: ten, sampling_strategy: 'first:101%'}]", r"sampling_strategy 'first:101%': expected"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(mix, text, message):
    with pytest.raises(UserError, match=message):
        mix(text)


def test_the_order_by_kind_and_length_is_the_recorded_one():
    # Recorded with the sampler as it was written over lists, before it was put into arrays.
    lengths = [(i * 7919) % 37 + 1 if i % 3 else -((i * 7919) % 23 + 1) for i in range(40)]
    wanted = [32, 29, 28, 23, 17, 14, 10, 5, 36, 6, 9, 15, 21, 24, 33, 0, 34, 26, 16, 13, 11, 7, 2, 38]
    wanted += [35, 31, 25, 20, 19, 8, 4, 1, 22, 3, 39, 12, 18, 27, 30, 37]
    assert list(ModalityLengthSampler(lengths, 8, 5, lambda: 1)) == wanted
    lengths = [(i * 7919) % 37 + 1 if i % 3 else -((i * 7919) % 23 + 1) for i in range(5000)]
    order = str(list(ModalityLengthSampler(lengths, 64, 42, lambda: 2)))
    assert hashlib.sha256(order.encode()).hexdigest().startswith("51888a450fb0df6374b4824ea6d03fb1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [(), ("--group_by_modality_length", True), ("--dataloader_num_workers", 2)],
    ids=["random", "kinds", "workers"],
)
def test_a_killed_run_goes_on_with_the_samples_it_has_not_seen(
    run_script, pretrain_flags, golden, tmp_path, monkeypatch, flags
):
    from llava.train.trainer import LlavaTrainer

    (tmp_path / "mix.yaml").write_text(
        f"datasets:\n- {{json_path: {golden / 'pretrain_data.json'}, weight: 1.5}}\n"
        f"- {{json_path: {golden / 'pretrain_data.json'}, sampling_strategy: 'first:4'}}\n"
    )
    steps, made = [], []
    step, make = LlavaTrainer.training_step, Mixture.make
    monkeypatch.setattr(Mixture, "make", lambda self, index: made.append(index) or make(self, index))

    def watched(self, model, inputs, *args):
        if len(steps) == kill_at:
            raise KeyboardInterrupt
        steps.append(inputs["records"].tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(LlavaTrainer, "training_step", watched)
    every = [*pretrain_flags, "--data_path", tmp_path / "mix.yaml", "--per_device_train_batch_size", 2]
    every += ["--num_train_epochs", 2, "--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 9, *flags]
    kill_at = None
    code, out, err = run_script("train_pretrain", *every, "--output_dir", tmp_path / "whole")
    assert code == 0, err
    assert "16 records" in out and "an epoch" in out
    whole, steps[:] = list(steps), []
    assert len(whole) == 16  # two epochs of 8
    for epoch in (whole[:8], whole[8:]):
        assert sorted(itertools.chain(*epoch)) == list(range(16))
    card = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert set(card["data"]) == {str(tmp_path / "mix.yaml"), str(golden / "pretrain_data.json")}

    for kill_at, begins in ((7, 0), (14, 6)):  # in the middle of the first epoch, then of the second
        steps[:] = whole[:begins]
        with pytest.raises(KeyboardInterrupt):
            run_script("train_pretrain", *every, "--output_dir", tmp_path / "killed")
        assert steps == whole[:kill_at]
    kill_at, made[:] = None, []
    steps[:] = whole[:12]
    code, out, err = run_script("train_pretrain", *every, "--output_dir", tmp_path / "killed")
    assert code == 0, err
    assert steps == whole
    if "--dataloader_num_workers" not in flags:
        assert made == list(itertools.chain(*whole[12:]))  # what was seen before is not read again
