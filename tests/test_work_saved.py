"""Runs that save work end where runs that do not would have: shared beginnings, kept log-probabilities and features."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import logs_of, losses_of, succeed

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.train import reference, trainer


@pytest.fixture
def run(run_script, dpo_flags, tmp_path):
    """``run(name, *flags)``: train_dpo on the recorded pairs; the folder it wrote and what it said."""

    def start(name, *flags):
        code, _, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / name)
        assert code == 0, err
        return tmp_path / name, err

    return start


LORA = ("--lora_enable", True, "--lora_r", 8, "--num_train_epochs", 2)


def same_training(got, want):
    """Losses, rewards and gradients of every step."""
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen")
    first, second = ([log for log in logs_of(folder) if "loss" in log] for folder in (got, want))
    assert len(first) == len(second) > 2
    for one, other in zip(first, second, strict=True):
        assert [one[n] for n in names] == pytest.approx([other[n] for n in names], rel=2e-4, abs=2e-4)
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_shared_beginnings_change_no_number(run):
    trees, _ = run("trees", *LORA)
    apart, said = run("apart", *LORA, "--prefix_sharing", False)
    assert "note: rows are computed one by one: --prefix_sharing False" in said
    same_training(trees, apart)
    eager, said = run("eager", *LORA, "--attn_implementation", "eager")
    assert "note: rows are computed one by one: attn_implementation eager takes no mask of trees" in said
    same_training(trees, eager)


@pytest.fixture
def asked(monkeypatch):
    """How often a reference was asked."""
    count = []
    for kind in (reference.SharedReference, reference.FirstPolicy, reference.CopiedReference):
        original = kind.forward_of
        monkeypatch.setattr(
            kind, "forward_of", lambda self, policy, original=original: count.append(1) or original(self, policy)
        )
    return count


@pytest.mark.parametrize(
    "flags",
    [LORA, ("--freeze_backbone", True, "--num_train_epochs", 2), ("--num_train_epochs", 2)],
    ids=["lora", "lm_head", "everything"],
)
def test_a_kept_reference_changes_no_number_and_is_asked_once(run, tmp_path, asked, flags, monkeypatch):
    plain, _ = run("plain", *flags)
    steps = len(losses_of(plain))
    assert len(asked) == steps
    asked.clear()
    monkeypatch.setattr(reference, "CopiedReference", None)  # no second model
    cached, _ = run("cached", *flags, "--reference", "cache")
    assert len(asked) == 2  # eight distinct pairs, four at a time
    same_training(cached, plain)
    (file,) = (tmp_path / "reference_cache").glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 1 + 8
    asked.clear()
    again, _ = run("again", *flags, "--reference", "cache")  # a later run of a sweep
    assert not asked
    assert losses_of(again) == losses_of(cached)


def test_a_copy_of_the_model_is_the_same_reference(run):
    plain, _ = run("plain", *LORA)
    copied, _ = run("copied", *LORA, "--reference", "copy")
    same_training(copied, plain)


def test_a_reference_file_that_was_cut_off_is_filled_up(run, tmp_path, asked):
    file = tmp_path / "reference.jsonl"
    flags = [*LORA, "--reference", "cache", "--reference_cache", file]
    first, _ = run("first", *flags)
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:20])  # the power failed while the fifth pair was written
    asked.clear()
    second, _ = run("second", *flags)
    assert len(asked) == 1
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())
    assert losses_of(second) == losses_of(first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--version", "v0"), "template v1 -> v0"),
        (("--image_aspect_ratio", "square"), "config"),
        (("--bf16", True), "dtype torch.float32, weights torch.float32 -> torch.bfloat16, weights torch.bfloat16"),
    ],
)
def test_a_reference_file_of_another_reference_is_refused(run, run_script, dpo_flags, tmp_path, change, named):
    file = tmp_path / "reference.jsonl"
    flags = [*LORA, "--reference", "cache", "--reference_cache", file]
    run("first", *flags)
    before = file.read_bytes()
    code, _, err = run_script("train_dpo", *dpo_flags, *flags, *change, "--output_dir", tmp_path / "second")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"{file}: made with another reference" in line and named in line
    assert line.endswith("pass another --reference_cache")
    assert file.read_bytes() == before


def test_other_weights_are_another_reference(run, run_script, dpo_flags, tmp_path, golden):
    shutil.copytree(golden / "tiny-llava-original", tmp_path / "copy")
    shutil.copytree(golden / "tiny-clip", tmp_path / "tiny-clip")
    flags = [*LORA, "--reference", "cache"]
    run("first", *flags)
    run("second", *flags, "--model_name_or_path", tmp_path / "copy")
    assert len(list((tmp_path / "reference_cache").iterdir())) == 1  # the same weights under another name
    shard = tmp_path / "copy" / "pytorch_model-00001-of-00003.bin"
    state = torch.load(shard, weights_only=True)
    torch.save({name: value + 1e-3 for name, value in state.items()}, shard)
    run("third", *flags, "--model_name_or_path", tmp_path / "copy")
    assert len(list((tmp_path / "reference_cache").iterdir())) == 2


def test_lines_that_cannot_be_read_are_passed_over(run, tmp_path, asked):
    """Two runs that grow one file, one of them killed in the middle of a line: the line behind is glued to it."""
    file = tmp_path / "reference.jsonl"
    flags = [*LORA, "--reference", "cache", "--reference_cache", file]
    first, _ = run("first", *flags)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], lines[2][:20] + lines[3], *lines[4:]]))
    asked.clear()
    second, _ = run("second", *flags)
    assert len(asked) == 1
    asked.clear()
    run("third", *flags)
    assert not asked
    assert losses_of(second) == losses_of(first)


def test_half_precision_does_not_round_kept_log_probabilities(monkeypatch):
    """DeepSpeed casts every floating tensor of a batch; at -150 a bfloat16 is a half apart from the next."""

    class Args:
        device = torch.device("cpu")

    dpo = trainer.DPOTrainer.__new__(trainer.DPOTrainer)
    dpo.args = Args()
    cast = {"images": torch.ones(1).bfloat16(), "reference_logps": torch.zeros(2).bfloat16()}
    monkeypatch.setattr(trainer.LlavaTrainer, "_prepare_inputs", lambda self, inputs: dict(cast))
    known = torch.tensor([-153.37, -87.61])
    got = dpo._prepare_inputs({"images": torch.ones(1), "reference_logps": known})
    assert torch.equal(got["reference_logps"], known) and got["images"].dtype == torch.bfloat16


def test_a_full_run_with_a_broken_picture_goes_on(run, run_script, dpo_flags, tmp_path, golden):
    shutil.copytree(golden / "mini_vg", tmp_path / "vg")
    broken = tmp_path / "vg" / "VG_100K" / "2315000.png"
    broken.write_bytes(broken.read_bytes()[:200])
    flags = ["--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 5, "--reference", "cache"]
    flags += ["--vg_path", tmp_path / "vg", "--skip_missing_images", True]
    out, _ = run("out", *flags)
    whole = losses_of(out)
    (tmp_path / "out" / "checkpoint-3").rename(tmp_path / "last")
    again, _ = run("out", *flags)  # from checkpoint-2
    assert losses_of(again)[-1] == pytest.approx(whole[-1], abs=1e-5)


def test_a_full_run_that_goes_on_needs_the_file_it_was_started_with(run, run_script, dpo_flags, tmp_path):
    flags = ["--save_strategy", "steps", "--save_steps", 2, "--reference", "cache", "--num_train_epochs", 1]
    run("out", *flags)
    shutil.rmtree(tmp_path / "out" / "checkpoint-2", ignore_errors=True)
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert checkpoints
    shutil.rmtree(tmp_path / "reference_cache")
    code, _, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and "8 of 12 pairs are missing, and the policy that would give them has been trained since" in err


def test_batches_by_picture_have_as_few_pictures_as_possible(run, monkeypatch):
    seen = []
    forward = CLIPVisionTower.forward
    monkeypatch.setattr(CLIPVisionTower, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    run("shuffled", "--lora_enable", True, "--mm_projector_lr", 0)
    shuffled, total = list(seen), len(seen)
    seen.clear()
    folder, _ = run("grouped", "--lora_enable", True, "--mm_projector_lr", 0, "--group_by_image", True)
    assert sum(seen) == 8 < sum(shuffled)  # eight distinct pictures; policy and reference share what is seen of them
    assert len(seen) == total == len(losses_of(folder)) == 3


def test_every_pair_comes_once_an_epoch_and_pictures_stay_together():
    pictures = [picture for picture in range(20) for _ in range(1 + picture % 7)]
    epoch = 0
    sampler = trainer.ImageSampler(pictures, 4, 3, lambda: epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(pictures)))
    batches = [order[start : start + 4] for start in range(0, len(order), 4)]
    in_batches = sum(len({pictures[i] for i in batch}) for batch in batches)
    least = sum(-(-(1 + picture % 7) // 4) for picture in range(20))  # every picture in as few batches as it needs
    assert in_batches <= least + 2
    assert list(sampler) == order
    epoch = 1
    assert list(sampler) != order


def test_kept_features_change_no_number_and_are_seen_once(run, run_script, dpo_flags, tmp_path, monkeypatch):
    plain, _ = run("plain", *LORA)
    seen = []
    forward = CLIPVisionTower.forward
    monkeypatch.setattr(CLIPVisionTower, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    kept, _ = run("kept", *LORA, "--feature_cache", tmp_path / "features")
    assert sum(seen) == 8
    assert len(list((tmp_path / "features").glob("*/*.safetensors"))) == 8
    same_training(kept, plain)
    seen.clear()
    again, _ = run("again", *LORA, "--feature_cache", tmp_path / "features")
    assert not seen
    assert losses_of(again) == losses_of(kept)
    damaged = sorted((tmp_path / "features").glob("*/*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    flags = [*LORA, "--feature_cache", tmp_path / "features", "--output_dir", tmp_path / "damaged"]
    code, _, err = run_script("train_dpo", *dpo_flags, *flags)
    assert code == 2 and f"{damaged}: cannot be read" in err and "remove the file" in err


def test_kept_features_serve_pretraining_with_text_only_rows_too(run_script, pretrain_flags, tmp_path, golden):
    records = json.loads((golden / "pretrain_data.json").read_text())
    for record in records[::3]:
        del record["image"]
        record["conversations"][0]["value"] = "What is it?"
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    flags = [*pretrain_flags, "--data_path", tmp_path / "mixed.json", "--version", "v1", "--max_steps", 2]
    flags += ["--per_device_train_batch_size", 2, "--train_type", "freeze_vision", "--save_strategy", "no"]
    succeed(run_script("train_pretrain", *flags, "--output_dir", tmp_path / "plain"))
    succeed(
        run_script(
            "train_pretrain", *flags, "--output_dir", tmp_path / "kept", "--feature_cache", tmp_path / "features"
        )
    )
    assert losses_of(tmp_path / "kept") == pytest.approx(losses_of(tmp_path / "plain"), abs=1e-5)
    apart = [*flags, "--output_dir", tmp_path / "apart", "--prefix_sharing", False]
    succeed(run_script("train_pretrain", *apart))
    assert losses_of(tmp_path / "apart") == pytest.approx(losses_of(tmp_path / "plain"), abs=1e-5)


def test_a_tower_that_trains_has_no_kept_features(run_script, pretrain_flags, tmp_path):
    flags = [*pretrain_flags, "--train_type", "none", "--feature_cache", tmp_path / "features"]
    code, _, err = run_script("train_pretrain", *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and "error: --feature_cache keeps what a frozen tower sees, but the vision tower trains" in err


def test_the_reference_takes_over_what_is_frozen(run, ran):
    """Only lm_head trains: one run of the decoder serves policy and reference."""
    folder, _ = run("out", "--freeze_backbone", True, "--freeze_mm_mlp_adapter", True)
    assert len(ran) == len(losses_of(folder)) == 3


def test_data_workers_live_on_between_epochs(run, monkeypatch):
    loaders = []
    original = trainer.LlavaTrainer.get_train_dataloader

    def watch(self):
        loaders.append(original(self))
        return loaders[-1]

    monkeypatch.setattr(trainer.LlavaTrainer, "get_train_dataloader", watch)
    plain, _ = run("plain", *LORA)
    workers = ("--dataloader_num_workers", 2)
    kept, _ = run("kept", *LORA, *workers, "--dataloader_prefetch_factor", 1, "--dataloader_pin_memory", True)
    ended, _ = run("ended", *LORA, *workers, "--dataloader_persistent_workers", False)
    alone, said = run("alone", *LORA, "--dataloader_persistent_workers", True)
    assert [loader.persistent_workers for loader in loaders] == [False, True, False, False]
    assert "--dataloader_persistent_workers has nothing to do here: --dataloader_num_workers is 0" in said
    for folder in (kept, ended, alone):
        assert losses_of(folder) == losses_of(plain)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reference", "none"], "--reference none: expected one of auto, cache, copy"),
        (["--reference_cache", "f.jsonl"], "--reference_cache has nothing to do with --reference auto; pass cache"),
        (["--group_by_image", True, "--group_by_modality_length", True], "both choose the order; pass one"),
        (["--group_by_image", True, "--train_sampling_strategy", "sequential"], "both choose the order; pass one"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(run_script, dpo_flags, tmp_path, flags, message):
    code, _, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and message in err.strip()
    assert not (tmp_path / "out").exists()
