"""HA-DPO's own runs, recorded, followed by train_dpo.py; its order of the data; what --hadpo_compat cannot mean."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import logs_of, losses_of, succeed
from safetensors.torch import load_file
from transformers import TrainingArguments

from llava.data.collate import PackingCollator
from llava.errors import UserError
from llava.model.checkpoint import read_connector
from llava.train.arguments import DPOTrainingArguments, ModelArguments, PreferenceArguments
from llava.train.parsing import parse
from llava.train.sampler import UpstreamSampler, samples_of_whole_steps
from llava.train.trainable import choose_parts


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "train" / "dpo_trajectory.json").read_text())


@pytest.fixture(scope="module")
def dpo(golden):
    return json.loads((golden / "dpo" / "dpo_golden.json").read_text())


@pytest.fixture
def recipe(dpo_flags, golden):
    """HA-DPO's flags as its trajectories were recorded, from the adapter that it wrote itself."""
    return [
        *(*dpo_flags, "--lora_enable", True, "--lora_weight_path", golden / "tiny-llava-lora", "--lora_r", 8),
        *("--mm_projector_lr", 0, "--group_by_modality_length", True, "--max_grad_norm", 1.0),
    ]


COMPAT = ("--hadpo_compat", True)


@pytest.fixture
def order(monkeypatch):
    """The records, in the order in which batches are made of them."""
    seen = []
    original = PackingCollator.__call__

    def collate(self, examples):
        seen.extend(example.number for example in examples)
        return original(self, examples)

    monkeypatch.setattr(PackingCollator, "__call__", collate)
    return seen


def trained_in(folder):
    """LoRA and connector as saved, under the names of the recordings."""
    lora = {
        key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): value
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    return lora | torch.load(folder / "non_lora_trainables.bin", weights_only=True)


def rates_of(folder):
    return [log["learning_rate"] for log in logs_of(folder) if "loss" in log]


def test_hadpos_run_is_followed_step_by_step(run_script, recipe, recorded, golden, tmp_path, order):
    """Three epochs with cosine, warm-up over 3 % of 9 steps and clipping: every loss, rate and record, and the end."""
    want = recorded["B_trainer_cosine_3epochs"]
    losses = [step["loss_as_returned_by_training_step"] for step in want["steps"]]
    folder, killed = tmp_path / "out", tmp_path / "killed"
    flags = [*recipe, *COMPAT, "--num_train_epochs", 3]
    flags += ["--save_strategy", "steps", "--save_steps", 4, "--save_total_limit", 5]
    succeed(run_script("train_dpo", *flags, "--output_dir", folder))
    assert losses_of(folder) == pytest.approx(losses, rel=1e-4)
    assert rates_of(folder) == pytest.approx([step["lr_used"] for step in want["steps"]], rel=1e-6)
    assert order == want["order"]
    got, end = trained_in(folder), load_file(golden / "train" / "dpo_B_trainable_final.safetensors")
    assert got.keys() == end.keys()
    for key, value in end.items():
        torch.testing.assert_close(got[key], value, atol=2e-5, rtol=0)

    killed.mkdir()  # in the second epoch
    shutil.copy(folder / "run.json", killed)
    shutil.copytree(folder / "checkpoint-4", killed / "checkpoint-4")
    order.clear()
    succeed(run_script("train_dpo", *flags, "--output_dir", killed))
    assert order == want["order"][16:]
    assert losses_of(killed) == pytest.approx(losses, rel=1e-4)


def test_hadpos_run_with_accumulated_batches_is_followed(run_script, recipe, recorded, tmp_path, order):
    want = recorded["C_trainer_accum2_bs2_constant"]
    halves = [step["loss_as_returned_by_training_step"] for step in want["micro_steps"]]  # divided by 2 already
    flags = [*recipe, *COMPAT, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    succeed(run_script("train_dpo", *flags, "--lr_scheduler_type", "constant", "--output_dir", tmp_path))
    assert losses_of(tmp_path) == pytest.approx(
        [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)], rel=1e-4
    )
    assert order == want["order"]


@pytest.mark.parametrize("compat", [True, False])
def test_whose_connector_the_reference_sees(run_script, recipe, dpo, golden, tmp_path, compat):
    """All 12 pairs at once; 0 to 7 are recorded with the reference's own connector too, 8 to 11 repeat 4 to 7."""
    policy = dpo["batch_all12"]
    if compat:
        reference = {side: policy[f"reference_{side}_logps"] for side in ("chosen", "rejected")}
    else:
        own = dpo["batch_unique8"]["NOT_UPSTREAM_reference_with_own_projector"]
        reference = {side: own[side] + own[side][4:] for side in ("chosen", "rejected")}
    flags = [*recipe, "--hadpo_compat", compat, "--per_device_train_batch_size", 12, "--num_train_epochs", 2]
    code, out, err = run_script("train_dpo", *flags, "--output_dir", tmp_path)
    assert code == 0, err
    log = logs_of(tmp_path)[0]
    for side in ("chosen", "rejected"):
        logps = sum(policy[f"policy_{side}_logps"]) / 12
        assert log[f"logps/{side}"] == pytest.approx(logps, abs=1e-3)
        assert log[f"rewards/{side}"] == pytest.approx(0.1 * (logps - sum(reference[side]) / 12), abs=2e-4)
    said = "without --lora_weight_path" + ", but seeing through the policy's connector" * compat
    assert f"reference: the policy as it was loaded, {said} (" in out
    # Ours: no warm-up, and a rate of 0 freezes; the connector that came with the adapter is saved as it was.
    given = torch.load(golden / "tiny-llava-lora" / "non_lora_trainables.bin", weights_only=True)
    after = trained_in(tmp_path)
    assert rates_of(tmp_path)[0] == (0 if compat else 1e-3)
    assert {torch.equal(after[key], value) for key, value in given.items()} == {not compat}
    assert (tmp_path / "adapter_config.json").read_text().count('"lora_dropout": 0.0') == 1
    for flag in ("mm_projector_lr", "group_by_modality_length"):
        assert (f"note: --{flag} has nothing to do with --hadpo_compat True" in err) is compat


def test_a_given_connector_is_where_policy_and_reference_start(run_script, dpo_flags, dpo, golden, tmp_path):
    """The recorded policy's connector under the base: that is what HA-DPO's reference computed."""
    torch.save(
        torch.load(golden / "tiny-llava-lora" / "non_lora_trainables.bin", weights_only=True), tmp_path / "c.bin"
    )
    flags = [*dpo_flags, "--lora_enable", True, "--pretrain_mm_mlp_adapter", tmp_path / "c.bin"]
    flags += ["--per_device_train_batch_size", 12, "--num_train_epochs", 2, "--output_dir", tmp_path / "out"]
    succeed(run_script("train_dpo", *flags))
    first, second = (log for log in logs_of(tmp_path / "out") if "loss" in log)
    for side in ("chosen", "rejected"):
        logps = sum(dpo["batch_all12"][f"reference_{side}_logps"]) / 12
        assert first[f"logps/{side}"] == pytest.approx(logps, abs=1e-3)
        assert first[f"rewards/{side}"] == pytest.approx(0, abs=1e-4)
        reference = second[f"logps/{side}"] - second[f"rewards/{side}"] / 0.1
        assert reference == pytest.approx(logps, abs=2e-3)  # though the connector has moved
    after, given = read_connector(tmp_path / "out" / "non_lora_trainables.bin"), read_connector(tmp_path / "c.bin")
    assert not any(torch.equal(after[key], value) for key, value in given.items())


# --- the order

# Recorded with accelerate 0.21.0 on 2 processes (gloo), 12 samples, batches of 2: [process][epoch][batch].
DEALT = [
    [[[6, 5], [2, 3], [7, 0]], [[7, 1], [9, 4], [11, 5]], [[11, 1], [5, 10], [7, 4]]],
    [[[9, 10], [8, 11], [1, 4]], [[2, 6], [10, 3], [8, 0]], [[8, 3], [6, 0], [2, 9]]],
]
# The same with 11 samples, the first epoch: the last batch is filled up from the beginning.
DEALT_UNEVEN = [[[8, 5], [1, 10], [3, 6]], [[4, 7], [2, 9], [0, 8]]]


def dealt(length, process, epoch, seed=42):
    """The batches of one of two processes, as today's accelerate deals them."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    sampler = UpstreamSampler(length, length, 2, seed, lambda: epoch)
    return list(BatchSamplerShard(BatchSampler(sampler, 2, False), 2, process))


@pytest.mark.parametrize("process", [0, 1])
def test_several_processes_get_upstreams_batches(process):
    assert [dealt(12, process, epoch) for epoch in range(3)] == DEALT[process]
    assert dealt(12, process, 0, seed=7) == DEALT[process][0]  # upstream's does not hang on the seed
    assert dealt(11, process, 0) == DEALT_UNEVEN[process]


def whole(length, batch=2, world=1, steps=2, epochs=1.0, max_steps=-1):
    return samples_of_whole_steps(
        length,
        SimpleNamespace(
            train_batch_size=batch,
            world_size=world,
            gradient_accumulation_steps=steps,
            num_train_epochs=epochs,
            max_steps=max_steps,
        ),
    )


def test_batches_that_fill_no_step_are_not_seen():
    """transformers 4.31: ``len(loader) // gradient_accumulation_steps`` steps an epoch."""
    assert whole(12, epochs=3) == 12  # 6 batches, 3 steps
    assert whole(11, epochs=3) == 11
    assert whole(14) == 12 and whole(13) == 12
    assert whole(20, world=2) == 16  # 5 batches each
    assert whole(14, epochs=5, max_steps=3) == 12
    for case in ({"epochs": 2}, {"max_steps": 4}):
        with pytest.raises(
            UserError, match=r"--upstream_order: 7 batches .* no multiple of --gradient_accumulation_steps"
        ):
            whole(14, **case)
    with pytest.raises(
        UserError, match="7 batches an epoch are fewer than --gradient_accumulation_steps 8; lower that"
    ):
        whole(14, steps=8)


def test_pretraining_in_upstreams_order(run_script, pretrain_flags, tmp_path, golden):
    """LLaVA's own recorded run of batches of 2 over two epochs, with cosine, warm-up and clipping."""
    recorded = json.loads((golden / "train" / "pretrain_trajectory.json").read_text())
    steps = recorded["B_pretrain_sh_cosine_warmup_clip_bs2_2epochs"]["steps"]
    flags = [*pretrain_flags, "--tune_mm_mlp_adapter", True, "--upstream_order", True, "--output_dir", tmp_path]
    flags += ["--pretrain_mm_mlp_adapter", golden / "train" / "mm_projector_init.bin"]
    flags += ["--per_device_train_batch_size", 2, "--num_train_epochs", 2, "--max_grad_norm", 1.0]
    flags += ["--lr_scheduler_type", "cosine", "--warmup_ratio", 0.03, "--weight_decay", 0.0]
    succeed(run_script("train_pretrain", *flags))
    assert losses_of(tmp_path) == pytest.approx([step["loss_as_returned_by_training_step"] for step in steps], rel=1e-4)
    assert rates_of(tmp_path) == pytest.approx([step["lr_used"] for step in steps], rel=1e-6)
    want = read_connector(golden / "train" / "pretrain_B" / "mm_projector.bin")
    for key, value in read_connector(tmp_path / "mm_projector.bin").items():
        torch.testing.assert_close(value, want[key], atol=2e-5, rtol=0)


# --- what the flag means, and cannot mean


@pytest.fixture
def chosen(tmp_path):
    """``chosen(*flags) -> (training arguments, parts)`` with --hadpo_compat True."""
    (tmp_path / "pairs.jsonl").write_text("")

    def choose(*flags):
        classes = (ModelArguments, PreferenceArguments, DPOTrainingArguments)
        given = ["--model_name_or_path", "x", "--data_path", tmp_path / "pairs.jsonl", "--report_to", "none"]
        model_args, _, train_args = parse(classes, [str(flag) for flag in (*given, *COMPAT, *flags)])
        return train_args, choose_parts(model_args, train_args)

    return choose


LORA = ("--lora_enable", True)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ([], 100),
        (["--warmup_ratio", 0.5], 100),  # HA-DPO's --warmup_steps is 100 unless it is given
        (["--warmup_steps", 0], 4),  # 3 % of 101, rounded up
        (["--warmup_steps", 0, "--warmup_ratio", 0.1], 11),
        (["--warmup_steps", 0, "--warmup_ratio", 0], 0),
        (["--warmup_steps", 7], 7),
    ],
)
def test_the_warm_up_is_hadpos(chosen, capsys, flags, steps):
    assert chosen(*LORA, *flags)[0].get_warmup_steps(101) == steps
    assert ("--warmup_ratio has nothing to do" in capsys.readouterr().err) is (flags[:1] == ["--warmup_ratio"])


@pytest.mark.parametrize(
    ("flag", "value", "effective"),
    [
        ("mm_projector_lr", 1e-5, None),
        ("weight_decay", 0.05, 0.0),
        ("lora_dropout", 0.05, 0.0),
        ("group_by_modality_length", True, False),
        ("optim", "sgd", "adamw_torch"),
    ],
)
def test_flags_that_do_nothing_in_hadpo(chosen, capsys, flag, value, effective):
    train_args, parts = chosen(*LORA, f"--{flag}", value)
    assert getattr(train_args, flag) == effective and parts == {"lora", "projector"}
    assert f"note: --{flag} has nothing to do with --hadpo_compat True" in capsys.readouterr().err
    train_args, parts = chosen(*LORA, "--freeze_mm_mlp_adapter", True)
    assert getattr(train_args, flag) == effective and parts == {"lora"}
    assert "--hadpo_compat" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["backbone, lm_head, projector would train", "pass --lora_enable True"]),
        (["--tune", "lora,lm_head"], ["lm_head, lora would train"]),
        (["--tune", "projector"], ["projector would train"]),
        ([*LORA, "--reference", "cache"], ["--reference cache", "pass auto"]),
        ([*LORA, "--reference", "copy"], ["--reference copy", "pass auto"]),
        ([*LORA, "--reference_from", "base"], ["--reference_from is not HA-DPO's"]),
        ([*LORA, "--loss_type", "ipo"], ["--loss_type is not HA-DPO's"]),
        ([*LORA, "--label_smoothing", 0.1], ["--label_smoothing is not HA-DPO's"]),
        ([*LORA, "--group_by_image", True], ["--group_by_image is not HA-DPO's"]),
        ([*LORA, "--train_sampling_strategy", "sequential"], ["--train_sampling_strategy is not HA-DPO's"]),
        ([*LORA, "--cache_hidden", "x"], ["--cache_hidden is not HA-DPO's"]),
        ([*LORA, "--warmup_ratio", 1], ["--warmup_ratio 1: expected 0 or more and less than 1"]),
        (["--freeze_backbone", True, "--lora_weight_path", "."], ["adapter_config.json"]),
    ],
)
def test_what_hadpo_compat_cannot_mean(chosen, flags, parts):
    with pytest.raises(UserError) as error:
        chosen(*flags)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("other", ["group_by_image", "group_by_modality_length"])
def test_only_one_flag_chooses_the_order(other):
    with pytest.raises(UserError, match="both choose the order"):
        DPOTrainingArguments(report_to="none", upstream_order=True, **{other: True})


@pytest.mark.parametrize(
    ("compat", "given", "clipping", "norm", "said"),
    [
        (True, {}, "auto", 0, "nor is this run"),
        (True, {"gradient_clipping": "auto"}, "auto", 0.5, "and this run is"),
        (False, {}, "auto", 0.5, None),
        (False, {"gradient_clipping": 0.5}, 0.5, 0.5, None),
    ],
)
def test_what_deepspeed_clips(monkeypatch, capsys, compat, given, clipping, norm, said):
    # Its own would switch DeepSpeed on for the whole process.
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: setattr(self, "_n_gpu", 1))
    config = {"zero_optimization": {"stage": 2}, **given}
    args = DPOTrainingArguments(report_to="none", hadpo_compat=compat, deepspeed=config, max_grad_norm=0.5)
    assert args.deepspeed["gradient_clipping"] == clipping and args.max_grad_norm == norm
    err = capsys.readouterr().err
    assert said in err if said else "--max_grad_norm" not in err


@pytest.mark.slow
@pytest.mark.parametrize("clips", [True, False])
def test_hadpos_run_under_zero3(golden, recorded, tmp_path, clips):
    """The recorded run was clipped; under DeepSpeed's own default it would be, and HA-DPO's own run was not."""
    from test_launch import ROOT, launch

    config = json.loads((ROOT / "zero_configs" / "zero3.json").read_text())
    if not clips:
        del config["gradient_clipping"]
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    flags = f"""
        --lora_enable True --lora_weight_path {golden}/tiny-llava-lora --hadpo_compat True --mm_projector_lr 0
        --model_name_or_path {golden}/tiny-llava-original --vg_path {golden}/mini_vg --image_aspect_ratio pad
        --desc_data_path {golden}/hadpo_data/desc_data.json --pope_data_path {golden}/hadpo_data/pope_data.json
        --model_max_length 2048 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --num_train_epochs 3
        --learning_rate 1e-3 --warmup_steps 0 --beta 0.1 --save_strategy no --report_to none
        --deepspeed {tmp_path}/zero3.json --output_dir {tmp_path}/out
    """
    launch(sys.executable, "train_dpo.py", *flags.split())
    steps = recorded["B_trainer_cosine_3epochs"]["steps"]
    off = [
        loss / step["loss_as_returned_by_training_step"] - 1
        for loss, step in zip(losses_of(tmp_path / "out"), steps, strict=True)
    ]
    assert max(map(abs, off[:2])) < 1e-4  # the first update has a rate of 0
    assert (max(map(abs, off)) < 1e-4) is clips


def test_a_frozen_connector_lets_the_reference_be_kept(chosen):
    train_args, parts = chosen(*LORA, "--freeze_mm_mlp_adapter", True, "--reference", "cache")
    assert parts == {"lora"} and train_args.reference == "cache"
