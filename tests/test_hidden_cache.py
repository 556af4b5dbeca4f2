"""Hidden states kept on disk: the same training without the backbone, once computed and read ever after."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from conftest import ROOT, logs_of, losses_of, succeed
from test_launch import BIN, SMALL, launch

from llava.data.packing import pack
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.train import hidden_cache

HEAD = ("--tune", "lm_head", "--num_train_epochs", 2)
NAMES = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen")


@pytest.fixture
def run(run_script, dpo_flags, tmp_path):
    """``run(name, *flags)``: train_dpo on the recorded pairs; the folder it wrote and what it said."""

    def start(name, *flags):
        code, out, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / name)
        assert code == 0, err
        return tmp_path / name, out

    return start


@pytest.fixture
def pretrain(run_script, pretrain_flags, tmp_path, golden):
    """``pretrain(name, *flags)``: train_pretrain of the LLaVA on captions, every third without a picture."""
    records = json.loads((golden / "pretrain_data.json").read_text())
    for record in records[::3]:
        del record["image"]
        record["conversations"][0]["value"] = "What is it?"
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    flags = [*pretrain_flags, "--data_path", tmp_path / "mixed.json", "--version", "v1", "--num_train_epochs", 2]
    flags += ["--per_device_train_batch_size", 2, "--model_name_or_path", golden / "tiny-llava-original"]

    def start(name, *more):
        return tmp_path / name, succeed(run_script("train_pretrain", *flags, *more, "--output_dir", tmp_path / name))

    return start


def same_training(got, want, names=NAMES):
    first, second = ([log for log in logs_of(folder) if "loss" in log] for folder in (got, want))
    assert len(first) == len(second) > 2
    for one, other in zip(first, second, strict=True):
        assert [one[n] for n in names] == pytest.approx([other[n] for n in names], rel=2e-4, abs=2e-4)
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def kept(tmp_path, kind="after", suffix=".bin"):
    return sorted((tmp_path / "hidden").glob(f"*/{kind}/*{suffix}"))


def test_kept_hidden_states_change_no_number_and_are_computed_once(run, tmp_path, ran, monkeypatch):
    plain, _ = run("plain", *HEAD)
    flags = (*HEAD, "--cache_hidden", tmp_path / "hidden")
    ran.clear()
    filled, said = run("filled", *flags)
    assert len(ran) == 2  # eight distinct pairs, four at a time
    assert "hidden states: 8 records need about" in said and str(tmp_path / "hidden") in said
    same_training(filled, plain)
    (data,), (index,) = kept(tmp_path), kept(tmp_path, suffix=".jsonl")
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    assert len(lines) == 8 and sum(line["rows"] for line in lines) * 64 * 4 == data.stat().st_size
    ran.clear()
    monkeypatch.setattr(CLIPVisionTower, "forward", None)
    monkeypatch.setattr("llava.data.images.open_image", None)  # pictures are not decoded either
    again, said = run("again", *flags)
    assert not ran and losses_of(again) == losses_of(filled)
    assert f"hidden states: 12 records from {data.parent}\n" in said
    workers, _ = run("workers", *flags, "--dataloader_num_workers", 2, "--reference", "cache")
    assert not ran
    same_training(workers, plain)


@pytest.mark.parametrize(
    "flags",
    [
        ("--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2),
        ("--reference", "copy"),
        ("--reference", "cache", "--group_by_image", True),
        ("--bf16", True),
    ],
    ids=["accumulation", "copy", "cache", "bf16"],
)
def test_kept_hidden_states_go_with_other_flags(run, tmp_path, flags):
    plain, _ = run("plain", *HEAD, *flags)
    filled, _ = run("filled", *HEAD, *flags, "--cache_hidden", tmp_path / "hidden")
    if "--bf16" in flags:
        assert losses_of(filled) == pytest.approx(losses_of(plain), abs=1e-3)
        assert sum(file.stat().st_size for file in kept(tmp_path)) % (64 * 2) == 0
    else:
        same_training(filled, plain)


def test_held_out_pairs_and_resuming(run, tmp_path, golden):
    row = {"image": str(golden / "images" / "a_wide_97x41.png"), "prompt": "Is there a dog?"}
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({**row, "chosen": "No.", "rejected": "Yes, a dog."}) + "\n")
    flags = (*HEAD, "--eval_data_path", held_out, "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2)
    plain, _ = run("plain", *flags)
    flags = (*flags, "--cache_hidden", tmp_path / "hidden", "--save_total_limit", 9)
    filled, _ = run("filled", *flags)
    evals = [[log["eval_loss"] for log in logs_of(folder) if "eval_loss" in log] for folder in (filled, plain)]
    assert evals[0] == pytest.approx(evals[1], abs=1e-5) and len(evals[0]) > 2
    whole = losses_of(filled)
    shutil.rmtree(filled / "checkpoint-6")
    again, said = run("filled", *flags)  # from checkpoint-4
    assert "hidden states: 13 records from" in said
    assert losses_of(again) == pytest.approx(whole, abs=1e-6)


def test_one_data_set_may_be_complete_where_another_is_not(run, tmp_path, golden):
    """Held-out pairs that come later, also some that are trained on; a run killed between the two."""
    row = {"image": str(golden / "images" / "a_wide_97x41.png"), "prompt": "Is there a dog?"}
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({**row, "chosen": "No.", "rejected": "Yes, a dog."}) + "\n")
    flags = (*HEAD, "--cache_hidden", tmp_path / "hidden")
    run("filled", *flags)
    _, said = run("measured", *flags, "--eval_data_path", held_out)
    assert "hidden states: 1 records need about" in said
    pope = golden / "hadpo_data" / "pope_data.json"
    other = (*HEAD, "--cache_hidden", tmp_path / "other", "--eval_data_path", pope)
    _, said = run("both", *other)
    assert "hidden states: 8 records need about" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_and_text_alone(pretrain, tmp_path, ran, workers):
    flags = ("--tune", "lm_head", "--dataloader_num_workers", workers)
    plain, _ = pretrain("plain", *flags)
    filled, _ = pretrain("filled", *flags, "--cache_hidden", tmp_path / "hidden")
    assert losses_of(filled) == pytest.approx(losses_of(plain), abs=1e-5)
    ran.clear()
    pretrain("again", *flags, "--cache_hidden", tmp_path / "hidden")
    assert not ran


def test_records_that_lose_their_labels_to_the_cut(pretrain, tmp_path):
    flags = ("--tune", "lm_head", "--model_max_length", 48, "--per_device_train_batch_size", 1)
    plain, _ = pretrain("plain", *flags)
    filled, _ = pretrain("filled", *flags, "--cache_hidden", tmp_path / "hidden")
    rows = [json.loads(line)["rows"] for line in kept(tmp_path, suffix=".jsonl")[0].read_text().splitlines()]
    assert 0 in rows and max(rows) > 0
    assert losses_of(filled) == pytest.approx(losses_of(plain), abs=1e-5)


def test_what_a_killed_run_left_is_gone_on_with(run, tmp_path, ran):
    flags = (*HEAD, "--cache_hidden", tmp_path / "hidden")
    first, _ = run("first", *flags)
    (data,), (index,) = kept(tmp_path), kept(tmp_path, suffix=".jsonl")
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:6]) + lines[6][:20])  # the power failed while the line was written
    data.write_bytes(data.read_bytes()[: json.loads(lines[5])["offset"] + 8])  # and one came before its data
    ran.clear()
    second, said = run("second", *flags)
    assert len(ran) == 1 and "hidden states: 3 records need about" in said
    assert losses_of(second) == pytest.approx(losses_of(first), abs=1e-5)
    assert len(kept(tmp_path)) == 2  # files of its own
    ran.clear()
    run("third", *flags)
    assert not ran


def test_a_file_that_becomes_shorter_while_it_is_read(run, run_script, dpo_flags, tmp_path, monkeypatch):
    flags = (*HEAD, "--cache_hidden", tmp_path / "hidden")
    run("first", *flags)
    (data,) = kept(tmp_path)
    tables = hidden_cache._tables

    def cut(*args):
        found = tables(*args)
        data.write_bytes(data.read_bytes()[:100])
        return found

    monkeypatch.setattr(hidden_cache, "_tables", cut)
    code, _, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / "second")
    assert code == 2 and f"{data}: cannot be read (it has become shorter); start the run again" in err


def test_every_model_has_a_folder_of_its_own(run, run_script, dpo_flags, tmp_path, golden):
    flags = (*HEAD, "--cache_hidden", tmp_path / "hidden")
    run("first", *flags)
    shutil.copytree(golden / "tiny-llava-original", tmp_path / "copy")
    shutil.copytree(golden / "tiny-clip", tmp_path / "tiny-clip")
    run("second", *flags, "--model_name_or_path", tmp_path / "copy")
    assert len(kept(tmp_path)) == 1  # the same weights under another name
    shard = tmp_path / "copy" / "pytorch_model-00001-of-00003.bin"
    state = torch.load(shard, weights_only=True)
    torch.save({name: value + 1e-3 for name, value in state.items()}, shard)
    run("third", *flags, "--model_name_or_path", tmp_path / "copy")
    run("fourth", *flags, "--image_aspect_ratio", "square")
    assert len({file.parent for file in kept(tmp_path)}) == 3
    for file in (tmp_path / "hidden").glob("*/key.json"):
        key = json.loads(file.read_text())
        assert key["template"] == "v1" and key["hidden"] == "64 x torch.float32"
        file.write_text(json.dumps({**key, "template": "v0"}))
    code, _, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and "hidden states of another model (template v0 -> v1); pass another --cache_hidden" in err


def test_a_later_stage_on_the_head_finds_the_same_hidden_states(run, pretrain, tmp_path, ran):
    flags = ("--tune", "lm_head", "--cache_hidden", tmp_path / "hidden")
    first, _ = pretrain("first", *flags)
    ran.clear()
    pretrain("second", *flags, "--model_name_or_path", first)
    assert not ran and len(kept(tmp_path)) == 1


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(run_script, dpo_flags, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hidden_cache.shutil, "disk_usage", lambda path: usage(10**6, 10**6, 2000))
    flags = (*HEAD, "--cache_hidden", tmp_path / "hidden", "--output_dir", tmp_path / "out")
    code, _, err = run_script("train_dpo", *dpo_flags, *flags)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and "--cache_hidden: 8 records need about 0.0" in line and "0.00 MB are free" in line
    assert str(tmp_path / "hidden") in line and not (tmp_path / "hidden").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora_enable", True), "but lora, projector would train; leave it out, or choose with --tune"),
        (("--tune", "projector,lm_head"), "but projector would train"),
        (("--tune", "lm_head", "--prefix_sharing", False), "--prefix_sharing False"),
        (("--tune", "lm_head", "--attn_implementation", "eager"), "attn_implementation eager takes no mask of trees"),
    ],
)
def test_what_cannot_be_kept_is_refused(run_script, dpo_flags, tmp_path, flags, message):
    flags = (*flags, "--cache_hidden", tmp_path / "hidden", "--output_dir", tmp_path / "out")
    code, _, err = run_script("train_dpo", *dpo_flags, *flags)
    assert code == 2 and "error: --cache_hidden keeps what" in err and message in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(run_script, dpo_flags, tmp_path):
    (tmp_path / "file").write_text("")
    flags = (*HEAD, "--cache_hidden", tmp_path / "file", "--output_dir", tmp_path / "out")
    code, _, err = run_script("train_dpo", *dpo_flags, *flags)
    assert code == 2 and f"{tmp_path / 'file'}" in err and "cannot be written" in err


def test_a_broken_picture_is_skipped_as_without(run, tmp_path, golden):
    shutil.copytree(golden / "mini_vg", tmp_path / "vg")
    broken = tmp_path / "vg" / "VG_100K" / "2315000.png"
    broken.write_bytes(broken.read_bytes()[:200])
    flags = (*HEAD, "--vg_path", tmp_path / "vg", "--skip_missing_images", True)
    plain, _ = run("plain", *flags)
    filled, _ = run("filled", *flags, "--cache_hidden", tmp_path / "hidden")
    same_training(filled, plain)
    again, _ = run("again", *flags, "--cache_hidden", tmp_path / "hidden")
    assert losses_of(again) == losses_of(filled)


def test_an_owners_rows_are_one_tree_whatever_else_is_in_the_batch():
    picture = (-200, 0)
    rows = [[1, picture, 5, 6], [1, picture, 5, 8], [1, picture, 5, 7], [1, picture, 9], [1, 2]]
    labels = [[-100, *row[1:]] if isinstance(row[1], int) else [-100, -100, *row[2:]] for row in rows]
    packed = pack(rows, labels, tokens_per_image=3, owners=[4, 7, 4, 7, 9])
    sizes = [end - start for start, _, end, _ in packed["trees"]]
    assert sizes == [1 + 3 + 1 + 2, 1 + 3 + 2 + 1, 2]
    alone = pack(rows[:3:2], labels[:3:2], tokens_per_image=3, owners=[0, 0])
    assert alone["input_ids"].tolist() == packed["input_ids"].tolist()[: sizes[0]]


INTERACTION = ("--post_block", "interaction")
BLOCKS = {
    "queries": ("--tune", "post_block", "--post_block", "mlp"),
    "rows": ("--tune", "post_block,lm_head", *INTERACTION, "--post_block_config", "cross_attention=false"),
    "tower": ("--tune", "post_block", *INTERACTION),
    "connector": ("--tune", "post_block", *INTERACTION, "--post_block_config", "keys=connector,self_attention=false"),
}
KIND = {"queries": "queries", "rows": "rows", "tower": "rows", "connector": "queries"}
FAST = ("--post_block_lr", 1e-2, "--num_train_epochs", 2)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_post_block_trains_on_kept_hidden_states(run, tmp_path, ran, monkeypatch, block):
    flags = (*BLOCKS[block], *FAST)
    plain, _ = run("plain", *flags)
    filled, _ = run("filled", *flags, "--cache_hidden", tmp_path / "hidden")
    same_training(filled, plain)
    assert losses_of(plain)[-1] < losses_of(plain)[0] - 1e-3
    assert len(kept(tmp_path, KIND[block])) == 1
    features = list((tmp_path / "hidden").glob("*/*/*.safetensors"))
    assert {file.parent.name for file in features} == {block} - {"queries", "rows"}
    assert len(features) in (0, 8)
    ran.clear()
    monkeypatch.setattr("llava.train.trainer.report", lambda *_: None)  # it answers questions, with all of the model
    monkeypatch.setattr(CLIPVisionTower, "forward", None)
    monkeypatch.setattr("llava.data.images.open_image", None)
    flags = (*flags, "--cache_hidden", tmp_path / "hidden")
    again, _ = run("again", *flags, "--dataloader_num_workers", 2)
    assert not ran and losses_of(again) == losses_of(filled)
    cached, _ = run("cached", *flags, "--reference", "cache", "--gradient_accumulation_steps", 2)
    assert not ran and len(losses_of(cached)) == 4


@pytest.mark.parametrize("block", ["tower", "connector"])
def test_a_post_block_that_looks_at_pictures_trains_on_captions_and_text_alone(pretrain, tmp_path, block):
    flags = (*BLOCKS[block], *FAST)
    plain, _ = pretrain("plain", *flags)
    filled, _ = pretrain("filled", *flags, "--cache_hidden", tmp_path / "hidden")
    assert losses_of(filled) == pytest.approx(losses_of(plain), abs=1e-5)
    both = (*flags, "--feature_cache", tmp_path / "features", "--cache_hidden", tmp_path / "again")
    again, _ = pretrain("again", *both)
    assert losses_of(again) == pytest.approx(losses_of(plain), abs=1e-5)


def test_text_alone_in_front_of_a_block_that_looks_at_pictures(pretrain, tmp_path):
    records = json.loads((tmp_path / "mixed.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps([record for record in records if "image" not in record]))
    flags = (*BLOCKS["tower"], *FAST, "--data_path", tmp_path / "text.json")
    plain, _ = pretrain("plain", *flags)
    filled, _ = pretrain("filled", *flags, "--cache_hidden", tmp_path / "hidden")
    assert losses_of(filled) == pytest.approx(losses_of(plain), abs=1e-5)


def test_a_later_stage_on_the_same_block_finds_the_same_hidden_states(run, pretrain, tmp_path, ran, monkeypatch):
    monkeypatch.setattr("llava.train.trainer.report", lambda *_: None)
    flags = (*FAST, "--cache_hidden", tmp_path / "hidden", "--model_max_length", 2048)
    first, _ = pretrain("first", *BLOCKS["queries"], *flags)
    ran.clear()
    pretrain("second", "--tune", "post_block", *flags, "--model_name_or_path", first)
    assert not ran and len(kept(tmp_path, "queries")) == 1
    pretrain("third", "--tune", "lm_head", *flags, "--model_name_or_path", first)  # behind the block as it is now
    pretrain("fourth", "--tune", "lm_head", *flags, "--model_name_or_path", tmp_path / "second")
    assert len({file.parent for file in kept(tmp_path)}) == 2
    plain, _ = pretrain("plain", "--tune", "lm_head", *FAST, "--model_name_or_path", first)
    assert losses_of(tmp_path / "third") == pytest.approx(losses_of(plain), abs=1e-5)


def test_a_reference_whose_hidden_states_are_others_is_refused(run, run_script, dpo_flags, pretrain, tmp_path):
    first, _ = pretrain("first", "--tune", "projector,lm_head")
    flags = ("--model_name_or_path", first, "--reference_from", "base", *HEAD, "--cache_hidden", tmp_path / "hidden")
    code, _, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and "error: --reference_from base: deltas changed projector, so" in err
    first, _ = pretrain("head", *BLOCKS["tower"], *FAST)
    flags = ("--model_name_or_path", first, "--reference_from", "base", "--tune", "post_block", *FAST)
    plain, _ = run("plain", *flags)
    filled, _ = run("filled", *flags, "--cache_hidden", tmp_path / "hidden")
    same_training(filled, plain)


@pytest.mark.slow
def test_two_processes_fill_and_read_under_zero3(run_script, golden, tmp_path):
    flags = SMALL.replace("--lora_enable True --lora_r 8 --lora_alpha 16", " ".join(map(str, BLOCKS["tower"])))
    two = flags.format(golden=golden, out=tmp_path / "two", batch=2).split()
    zero3 = ("--deepspeed", ROOT / "zero_configs" / "zero3.json", "--cache_hidden", tmp_path / "hidden")
    launch(BIN / "deepspeed", "--num_gpus", 2, "--master_port", 29881, "train_dpo.py", *two, *zero3)
    one = flags.format(golden=golden, out=tmp_path / "one", batch=4).split()
    succeed(run_script("train_dpo", *one))
    assert len(kept(tmp_path, "rows")) == 2  # each process its own
    assert len(list((tmp_path / "hidden").glob("*/tower/*.safetensors"))) == 8
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-4)


def test_several_runs_fill_one_folder_at_once(tmp_path):
    tensors = [torch.arange(12.0).view(3, 4), torch.ones(1, 4), torch.empty(0, 4)]
    with hidden_cache.Writer(tmp_path) as one, hidden_cache.Writer(tmp_path) as other:
        one.add("a", tensors[0])
        other.add("b", tensors[1])
        one.add("c", tensors[2])
        assert hidden_cache.places_in(tmp_path, 16) == {}
    held = hidden_cache.places_in(tmp_path, 16)
    assert held == {**one.written, **other.written} and held.keys() == {"a", "b", "c"}
    ((files, table),) = hidden_cache._tables([["c", "b", "missing", "a"]], held)
    kept_states = hidden_cache.KeptStates(tmp_path, files, table, 4, torch.float32)
    assert kept_states(2) is None
    for index, tensor in ((0, tensors[2]), (1, tensors[1]), (3, tensors[0])):
        assert torch.equal(kept_states(index), tensor)
    assert "_maps" in (state := kept_states.__getstate__()) and not state["_maps"]  # a worker maps for itself
