"""What trains and at which rate, what DPO compares with, and what a run on a frozen backbone says it has done."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import logs_of, losses_of, succeed
from safetensors.torch import load_file
from test_launch import BIN, launch

from llava.errors import UserError
from llava.model.builder import load_pretrained_model
from llava.train import trainer as trainers
from llava.train.arguments import DPOTrainingArguments, ModelArguments
from llava.train.trainable import choose_parts, part_of

BLOCK = ["--post_block", "interaction"]


@pytest.fixture
def chosen(tmp_path):
    """``chosen(flag=value, ...) -> parts``, as the scripts choose them."""

    def choose(**flags):
        of_model = {k: flags.pop(k) for k in list(flags) if k in ModelArguments.__dataclass_fields__}
        model_args = ModelArguments(model_name_or_path="x", **of_model)
        return choose_parts(model_args, DPOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **flags))

    return choose


def test_upstreams_flags_mean_what_tune_says(chosen):
    frozen = {"freeze_backbone": True}
    for flags, same in (
        ({"tune_lm_head": True}, "lm_head"),
        ({"tune_mm_mlp_adapter": True, "tune_lm_head": True}, "lm_head,projector"),
        ({"tune_post_decoder": True, "post_block": "mlp"}, "post_block"),
        ({"tune_post_interaction_block": True, "tune_lm_head": True}, "post_block, lm_head"),
        (
            {"tune_mm_mlp_adapter": True, "tune_lm_head": True, "tune_post_decoder": True},
            "projector,lm_head,post_block",
        ),
    ):
        want = chosen(tune=same)
        assert chosen(**flags) == chosen(**flags, **frozen) == want == set(same.replace(" ", "").split(","))
    assert chosen(tune="lora,post_block") == {"lora", "post_block"}
    assert chosen(tune="backbone,vision_tower") == {"backbone", "vision_tower"}


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"tune": ""}, ["nothing to train", "projector, lora"]),
        ({"tune": "lm_head,lm_head"}, ["'lm_head' is named twice"]),
        ({"tune": "head"}, ["no part 'head'", "lm_head"]),
        ({"tune": "lm_head", "tune_lm_head": True}, ["--tune and --tune_lm_head"]),
        ({"tune": "lm_head", "lora_enable": True}, ["--tune and --lora_enable"]),
        ({"tune": "lora,backbone"}, ["lora keeps the backbone frozen"]),
        ({"tune": "lm_head", "lm_head_lr": 0}, ["nothing is left to train"]),
        ({"tune": "lm_head", "post_block": "mlp"}, ["--post_block mlp", "add post_block to --tune"]),
        ({"tune": "lm_head,post_block", "post_block": "mlp", "post_block_lr": 0}, ["does not train"]),
        ({"tune_post_decoder": True, "tune_post_interaction_block": True}, ["one part twice"]),
        ({"tune_lm_head": True, "lora_enable": True}, ["--tune_lm_head", "contradicts --lora_enable"]),
    ],
)
def test_what_cannot_train(chosen, flags, parts):
    with pytest.raises(UserError) as refused:
        chosen(**flags)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_a_rate_without_its_part_is_said(chosen, capsys):
    chosen(tune="lm_head", mm_projector_lr=1e-5)
    assert "--mm_projector_lr has nothing to do here: projector does not train" in capsys.readouterr().err


def test_every_part_has_its_rate(run_script, dpo_flags, tmp_path, monkeypatch):
    """In the printed table, and in the optimizer."""
    seen = {}
    finish = trainers.DPOTrainer.finish

    def look(self, card):
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                name = names[id(p)]
                seen[part_of(name) + ("'s gate" if name.endswith("gate") else "")] = group["initial_lr"]
        finish(self, card)

    monkeypatch.setattr(trainers.DPOTrainer, "finish", look)
    flags = ["--tune", "projector,post_block,lm_head", *BLOCK, "--post_block_config", "gate=channel"]
    flags += ["--learning_rate", 5e-7, "--lm_head_lr", 3e-6, "--mm_projector_lr", 2e-5, "--max_steps", 1]
    out = succeed(run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / "out"))
    want = {"projector": 2e-5, "post_block": 1e-4, "post_block's gate": 1e-2, "lm_head": 3e-6}
    assert seen == pytest.approx(want)
    assert "| projector | 6,272 | 6,272 | 2e-05 |" in out
    assert "| post_block | 37,056 | 37,056 | 0.0001 (gate 0.01) |" in out
    assert "| lm_head | 128,000 | 128,000 | 3e-06 |" in out
    assert out.index("| lm_head |") < out.index("step 1/1")


@pytest.mark.parametrize("options", ["", "self_attention=false,keys=connector", "cross_attention=false,gate=scalar"])
def test_the_ways_to_compute_a_block_agree(run_script, dpo_flags, tmp_path, options):
    """Trees, separate rows, gradient checkpointing, the reference kept on disk: the same losses; policy = reference at
    first."""

    def losses(name, *flags):
        block = ["--tune", "post_block,lm_head", *BLOCK, *(("--post_block_config", options) if options else ())]
        flags = [*dpo_flags, *block, "--post_block_lr", 1e-3, *flags, "--output_dir", tmp_path / name]
        succeed(run_script("train_dpo", *flags))
        return losses_of(tmp_path / name)

    trees = losses("trees")
    assert trees[0] == pytest.approx(math.log(2), abs=1e-6)
    assert min(trees[1:]) < math.log(2) - 0.01
    assert losses("rows", "--prefix_sharing", False) == pytest.approx(trees, abs=1e-5)
    assert losses("checkpointed", "--gradient_checkpointing", True) == pytest.approx(trees, abs=1e-5)
    assert losses("kept", "--reference", "cache") == pytest.approx(trees, abs=1e-5)
    assert losses("copy", "--reference", "copy") == pytest.approx(trees, abs=1e-5)


@pytest.mark.parametrize("parts", ["lm_head", "post_block", "post_block,lm_head"])
def test_policy_and_reference_share_one_backbone_forward(run_script, dpo_flags, tmp_path, monkeypatch, ran, parts):
    monkeypatch.setattr(trainers, "report", lambda *_: {})
    block = BLOCK if "post_block" in parts else []
    succeed(run_script("train_dpo", *dpo_flags, "--tune", parts, *block, "--output_dir", tmp_path / "out"))
    assert len(ran) == len(losses_of(tmp_path / "out"))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_says_what_its_block_has_done(run_script, dpo_flags, tmp_path, bf16):
    flags = [*dpo_flags, "--tune", "post_block", *BLOCK, "--post_block_config", "gate=scalar", "--bf16", bf16]
    out, folder = [], tmp_path / "out"
    out = succeed(run_script("train_dpo", *flags, "--post_block_lr", 1e-3, "--output_dir", folder))
    effect = json.loads((folder / "run.json").read_text())["effect"]
    assert 0.01 < effect["gate"] < 1 and effect["hidden"] > 0.01 and effect["logits"] > 0.01
    assert 0 < effect["changed"] <= effect["answers"] == 12
    assert f"{effect['changed']} of 12 answers" in out
    code, out, err = run_script("train_dpo", *flags, "--post_block_lr", 1e-12, "--output_dir", tmp_path / "idle")
    assert code == 0 and "0 of 12 answers (0.0%)" in out
    assert "warning: the post block changed 0 of 12 answers" in err


def test_a_saved_block_answers_as_it_did_when_it_was_trained(run_script, dpo_flags, tmp_path, golden):
    """The reported change of hidden states is that between base and checkpoint, loaded anew."""
    folder = tmp_path / "out"
    flags = ["--tune", "post_block", *BLOCK, "--post_block_lr", 1e-3]
    succeed(run_script("train_dpo", *dpo_flags, *flags, "--output_dir", folder))
    ids = torch.tensor([[1, 5, -200, 9, 4]])
    model = load_pretrained_model(str(folder), None)[1]
    base = load_pretrained_model(str(golden / "tiny-llava-original"), None)[1]
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, before = model(ids, images=images).logits, base(ids, images=images).logits
        assert (logits - before).norm() / before.norm() > 0.01
        model.post_block = None
        assert torch.equal(model(ids, images=images).logits, before)


def test_reference_from_base_or_from_the_start(run_script, dpo_flags, tmp_path, golden):
    """After a fine-tuned block: the block as loaded (log 2 at first), or the model without it."""
    tuned = tmp_path / "tuned"
    block = ["--tune", "post_block", *BLOCK, "--post_block_lr", 1e-3]
    succeed(run_script("train_dpo", *dpo_flags, *block, "--output_dir", tuned))
    flags = [*dpo_flags, "--model_name_or_path", tuned, "--post_block_lr", 1e-3, "--max_steps", 2]
    flags += ["--per_device_train_batch_size", 12]

    def first(name, *more):
        out = succeed(run_script("train_dpo", *flags, *more, "--output_dir", tmp_path / name))
        return logs_of(tmp_path / name)[0], out

    start, out = first("start", "--tune", "post_block")
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "reference: the policy as it was loaded (--reference_from start)" in out
    base, out = first("base", "--tune", "post_block", "--reference_from", "base")
    assert "reference: the whole model that the policy's deltas stand on (--reference_from base)" in out
    untuned, _ = first("untuned", "--tune", "lm_head", "--model_name_or_path", golden / "tiny-llava-original")
    assert base["logps/chosen"] == pytest.approx(start["logps/chosen"], abs=1e-3)
    # rewards = beta (policy - reference): what the first run's training has moved.
    moved = 0.1 * (start["logps/chosen"] - untuned["logps/chosen"])
    assert abs(moved) > 1e-3
    assert base["rewards/chosen"] == pytest.approx(moved, abs=1e-4)
    moved = 0.1 * (start["logps/rejected"] - untuned["logps/rejected"])
    assert base["rewards/rejected"] == pytest.approx(moved, abs=1e-4)
    # Only the head trains, the block that differs from the base is frozen; and a LoRA over it.
    for name, parts in (("head", "lm_head"), ("lora", "lora")):
        log, _ = first(name, "--tune", parts, "--reference_from", "base")
        assert log["rewards/chosen"] == pytest.approx(base["rewards/chosen"], abs=1e-4)
    kept, _ = first("kept", "--tune", "post_block", "--reference_from", "base", "--reference", "cache")
    assert kept["rewards/chosen"] == pytest.approx(base["rewards/chosen"], abs=1e-4)


@pytest.mark.parametrize("kept", [False, True])
def test_in_bf16_a_second_stage_begins_at_the_reference(run_script, dpo_flags, tmp_path, kept):
    """The block is no longer fresh: policy and reference must round alike, from the kept states too."""
    flags = [*dpo_flags, "--bf16", True, "--post_block_lr", 3e-3]
    flags += ["--tune", "post_block", "--cache_hidden", tmp_path / "hidden"][: 4 if kept else 2]
    succeed(run_script("train_dpo", *flags, *BLOCK, "--output_dir", tmp_path / "first"))
    again = ["--model_name_or_path", tmp_path / "first", "--max_steps", 1, "--output_dir", tmp_path / "second"]
    succeed(run_script("train_dpo", *flags, *again))
    log = logs_of(tmp_path / "second")[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert log["rewards/margins"] == 0


def test_in_bf16_a_second_stage_begins_where_the_first_has_ended(run_script, dpo_flags, tmp_path):
    """Steps too small for bf16 to tell from the base: what was saved in float32 is gone on with in float32."""
    flags = [*dpo_flags, "--bf16", True, "--tune", "lm_head"]
    succeed(run_script("train_dpo", *flags, "--learning_rate", 1e-5, "--output_dir", tmp_path / "first"))
    again = ["--model_name_or_path", tmp_path / "first", "--learning_rate", 1e-30, "--output_dir", tmp_path / "second"]
    succeed(run_script("train_dpo", *flags, *again))
    first, second = (load_file(tmp_path / name / "delta.safetensors")["lm_head.weight"] for name in ("first", "second"))
    assert torch.equal(first, second)
    assert not torch.equal(first, first.bfloat16().float())


def test_the_block_is_told_from_what_trains_beside_it(run_script, dpo_flags, tmp_path):
    """An idle block beside a busy LoRA is idle; the LoRA is not taken for its work."""
    flags = ["--tune", "lora, post_block", *BLOCK, "--post_block_lr", 1e-12, "--lora_r", 4, "--learning_rate", 1e-2]
    code, out, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / "out")
    assert code == 0, err
    assert "changed hidden states by 0.00%, logits by 0.00%, 0 of 12 answers (0.0%)" in out
    assert "the post block changed 0 of 12 answers" in err
    assert "--lora_r" not in err


def test_a_rate_that_nothing_has_is_said(run_script, dpo_flags, tmp_path):
    flags = ["--tune", "post_block", *BLOCK, "--learning_rate", 3e-6, "--max_steps", 1]
    _, _, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / "out")
    assert "--learning_rate has nothing to do here" in err and "--post_block_lr 0.0001" in err


ZERO3 = """
--model_name_or_path {golden}/tiny-llava-original --vg_path {golden}/mini_vg
--desc_data_path {golden}/hadpo_data/desc_data.json --pope_data_path {golden}/hadpo_data/pope_data.json
--model_max_length 2048 --output_dir {out} --per_device_train_batch_size {batch} --gradient_accumulation_steps 1
--num_train_epochs 2 --learning_rate 1e-3 --post_block_lr 1e-3 --warmup_steps 0 --beta 0.1 --save_strategy steps
--save_steps 4 --save_total_limit 9 --report_to none --tune {tune}
"""


GATED = [*BLOCK, "--post_block_config", "gate=channel,align=linear"]


def on_one(golden, folder, tune, *more):
    flags = ZERO3.format(golden=golden, out=folder, batch=4, tune=tune).split()
    launch(BIN / "python", "train_dpo.py", *flags, *more)
    return [log["loss"] for log in started(folder)]


def on_two(golden, folder, tune, *more):
    flags = ZERO3.format(golden=golden, out=folder, batch=2, tune=tune).split()
    zero3 = [BIN / "deepspeed", "--num_gpus", 2, "--master_port", 29881, "train_dpo.py"]
    launch(*zero3, *flags, "--deepspeed", "zero_configs/zero3.json", *more)
    return [log["loss"] for log in started(folder)]


def started(folder):
    return [log for log in logs_of(folder) if "loss" in log]


def farthest(one, two):
    """How far two deltas are apart."""
    one, two = (load_file(folder / "delta.safetensors") for folder in (one, two))
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


@pytest.mark.slow
def test_under_zero3_on_two_processes_as_on_one(golden, tmp_path):
    """Losses, what the run says of its block, and what it saves."""
    one, two = tmp_path / "one", tmp_path / "two"
    want = on_one(golden, one, "post_block,projector", *GATED)
    assert on_two(golden, two, "post_block,projector", *GATED) == pytest.approx(want, abs=1e-4)
    assert farthest(one, two) < 1e-4
    effects = [json.loads((folder / "run.json").read_text())["effect"] for folder in (one, two)]
    assert effects[1] == pytest.approx(effects[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("tune", "block"), [("post_block,projector", GATED), ("lm_head", [])])
def test_under_zero3_stopped_gone_on_with_and_stacked(golden, tmp_path, tune, block):
    two, killed = tmp_path / "two", tmp_path / "killed"
    on_two(golden, two, tune, *block)
    killed.mkdir()
    shutil.copy(two / "run.json", killed)
    shutil.copytree(two / "checkpoint-4", killed / "checkpoint-4")
    on_two(golden, killed, tune, *block)
    assert farthest(two, killed) < 1e-5
    top = ["--model_name_or_path", two, "--reference_from", "base", "--num_train_epochs", 1]
    want = on_one(golden, tmp_path / "top1", tune, *top)
    assert abs(want[0] - math.log(2)) > 1e-3
    assert on_two(golden, tmp_path / "top", tune, *top) == pytest.approx(want, abs=1e-4)
