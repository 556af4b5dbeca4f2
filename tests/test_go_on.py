"""Training that goes on from what another run has left: the loss is the one that the run would have had."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, logs_of, losses_of, succeed

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import content_hash, read_connector, weight_files

STEADY = ("--lr_scheduler_type", "constant", "--warmup_steps", 0, "--save_total_limit", 5)
KEEP = ("--save_strategy", "steps", "--save_steps", 2)
LORA = ("--lora_r", 8, "--lora_alpha", 16, "--lora_dropout", 0.0)


@pytest.fixture
def train(run_script, dpo_flags, pretrain_flags, tmp_path):
    """``train(script, name, steps, *flags)``: so many steps over all records at once; the folder."""

    def run(script, name, steps, *flags):
        every = {"train_dpo": (*dpo_flags, "--per_device_train_batch_size", 12), "train_pretrain": pretrain_flags}
        flags = [*every[script], *STEADY, *KEEP, *flags, "--num_train_epochs", steps, "--output_dir", tmp_path / name]
        succeed(run_script(script, *flags))
        return tmp_path / name

    return run


DPO, PRETRAIN, ON = "train_dpo", "train_pretrain", "--model_name_or_path"
FROM_BASE = ("--reference_from", "base")
SAVED = {  # what trains, and how a new run starts from it
    "LoRA and connector": (DPO, ("--lora_enable", True, *LORA), "--lora_weight_path", ()),
    "LoRA, block and head": (
        DPO,
        ("--tune", "lora,post_block,lm_head", "--post_block", "mlp", *LORA),
        "--lora_weight_path",
        ("--tune", "lora,post_block,lm_head", *LORA),
    ),
    "head": (DPO, ("--tune", "lm_head"), ON, ("--tune", "lm_head", *FROM_BASE)),
    "block": (DPO, ("--tune", "post_block", "--post_block", "mlp"), ON, ("--tune", "post_block", *FROM_BASE)),
    "connector": (PRETRAIN, ("--train_type", "projector"), ON, ("--train_type", "projector")),
    "supervised LoRA": (PRETRAIN, ("--train_type", "use_lora", *LORA), "--lora_weight_path", ()),
    "whole model": (PRETRAIN, ("--train_type", "none"), ON, ("--train_type", "none")),
}


@pytest.mark.parametrize("saved", SAVED)
def test_a_new_run_goes_on_with_the_loss_the_old_one_would_have_had(train, saved):
    script, flags, by, again = SAVED[saved]
    folder = train(script, "whole", 3, *flags)
    first, _, third = losses_of(folder)
    assert abs(first - third) > 1e-3
    new = train(script, "new", 1, *(again or flags), by, folder / "checkpoint-2")
    assert losses_of(new)[0] == pytest.approx(third, abs=1e-5)
    if saved in ("LoRA and connector", "whole model"):
        ended = train(script, "ended", 2, *flags)
        new = train(script, "newer", 1, *(again or flags), by, ended)
        assert losses_of(new)[0] == pytest.approx(third, abs=1e-5)


@pytest.mark.parametrize("to", ["hf", "original"])
def test_a_new_run_goes_on_from_an_export(train, run_script, tmp_path, to):
    """With the LoRA folded in and the connector in its place."""
    folder = train(PRETRAIN, "whole", 3, "--train_type", "use_lora", *LORA)
    out = tmp_path / "export"
    succeed(run_script("llava.model.export", "--to", to, "--model-path", folder / "checkpoint-2", "--out", out))
    new = train(PRETRAIN, "new", 1, "--train_type", "use_lora", *LORA, ON, out)
    assert losses_of(new)[0] == pytest.approx(losses_of(folder)[2], abs=1e-5)


# --- --lora_weight_path


def rewards_of(folder):
    return [(log["rewards/chosen"], log["rewards/rejected"]) for log in logs_of(folder) if "loss" in log]


def test_the_reference_is_what_is_below_the_adapter(train, golden, tmp_path):
    """The adapter brings a connector and a head; the base's log-probabilities are recorded."""
    recorded = json.loads((golden / "dpo" / "dpo_golden.json").read_text())["batch_unique8"]
    base = recorded["NOT_UPSTREAM_reference_with_own_projector"]  # items 8 to 11 repeat 4 to 7
    parts = ("--tune", "lora,projector,lm_head")
    adapter = train(DPO, "adapter", 2, *parts, *LORA, "--reference", "cache")
    again = (*parts, "--lora_weight_path", adapter)
    folder = train(DPO, "auto", 2, *again)
    for log in (log for log in logs_of(folder) if "loss" in log):
        for side in ("chosen", "rejected"):
            reference = log[f"logps/{side}"] - log[f"rewards/{side}"] / 0.1
            assert reference == pytest.approx((sum(base[side]) + sum(base[side][4:])) / 12, abs=2e-3)
            assert abs(log[f"rewards/{side}"]) > 0.01
    for kind in ("copy", "cache"):
        same = train(DPO, kind, 2, *again, "--reference", kind)
        for got, want in zip(rewards_of(same), rewards_of(folder), strict=True):
            assert got == pytest.approx(want, abs=2e-4)
    assert len(list((tmp_path / "reference_cache").iterdir())) == 1  # the adapter's own run has filled it
    card = json.loads((folder / "delta.json").read_text())
    assert [entry["path"] for entry in card["base"]] == [str(golden / "tiny-llava-original")]
    assert card["parts"] == ["lm_head", "lora", "projector"]


def test_what_came_with_the_adapter_is_used_and_saved_though_it_does_not_train(train, golden):
    """And a run that was stopped goes on with it."""
    flags = ("--tune", "lora", "--lora_weight_path", golden / "tiny-llava-lora")
    folder = train(DPO, "whole", 3, *flags)
    coarse = train(DPO, "coarse", 1, *flags, "--bf16", True)
    given = read_connector(golden / "tiny-llava-lora" / "non_lora_trainables.bin")
    after = read_connector(folder / "non_lora_trainables.bin")
    assert given.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in given.items())
    after = read_connector(coarse / "non_lora_trainables.bin")  # not by way of bfloat16
    assert all(torch.equal(after[key], value) for key, value in given.items())
    state = load_pretrained_model(str(folder), None)[1].state_dict()
    assert all(torch.equal(state[key], value) for key, value in given.items())
    killed = folder.with_name("killed")
    killed.mkdir()
    shutil.copy(folder / "run.json", killed)
    shutil.copytree(folder / "checkpoint-2", killed / "checkpoint-2")
    assert train(DPO, "killed", 3, *flags) == killed
    assert losses_of(killed) == pytest.approx(losses_of(folder), abs=1e-6)


def test_an_adapter_that_is_folded_in_does_not_train_on(run_script, dpo_flags, golden, tmp_path):
    lora = golden / "tiny-llava-lora"
    flags = [*dpo_flags, ON, f"{golden / 'tiny-llava-original'},{lora}", "--lora_enable", True]
    code, _, err = run_script("train_dpo", *flags, "--lora_weight_path", lora, "--output_dir", tmp_path / "out")
    assert code == 2 and f"{lora} is in --model_name_or_path" in err


def test_a_connector_from_elsewhere_is_the_references(train, golden, capsys):
    flags = ("--lora_enable", True, "--lora_weight_path", golden / "tiny-llava-lora", "--mm_projector_lr", 0)
    plain = train(DPO, "plain", 1, *flags)
    other = train(DPO, "other", 1, *flags, "--pretrain_mm_mlp_adapter", golden / "train" / "mm_projector_init.bin")
    one, two = (next(log for log in logs_of(folder) if "loss" in log) for folder in (plain, other))
    assert one["logps/chosen"] == pytest.approx(two["logps/chosen"], abs=1e-4)
    assert abs(one["rewards/chosen"] - two["rewards/chosen"]) > 0.01


def test_a_run_does_not_write_over_its_connector(train, run_script, dpo_flags, tmp_path):
    connector = train(PRETRAIN, "pretrain", 1, "--train_type", "projector") / "mm_projector.bin"
    flags = [*dpo_flags, "--lora_enable", True, "--pretrain_mm_mlp_adapter", connector]
    code, _, err = run_script("train_dpo", *flags, "--output_dir", connector.parent)
    assert code == 2 and "choose another --output_dir" in err and connector.is_file()


def test_a_run_from_before_a_flag_is_not_gone_on_with_otherwise(train, run_script, dpo_flags):
    folder = train(DPO, "run", 2, "--tune", "lm_head")
    change(folder / "run.json", lambda card: [card["arguments"].pop(key) for key in ("loss_type", "loss_weights")])
    flags = [*dpo_flags, "--per_device_train_batch_size", 12, *STEADY, *KEEP, "--tune", "lm_head"]
    flags += ["--num_train_epochs", 2, "--output_dir", folder]
    code, _, err = run_script("train_dpo", *flags, "--loss_type", "ipo")
    assert code == 2 and "loss_type ['sigmoid'] -> ['ipo']" in err
    succeed(run_script("train_dpo", *flags))


@pytest.fixture
def adapter(golden, tmp_path):
    """The recorded adapter as if our own run on the recorded base had written it."""
    folder = tmp_path / "runs" / "checkpoint-9"
    shutil.copytree(golden / "tiny-llava-lora", folder)
    base = golden / "tiny-llava-original"
    card = {"format": 1, "parts": ["lora", "projector"]}
    card["base"] = [{"path": str(base), "sha256": content_hash(weight_files(base))}]
    (folder / "delta.json").write_text(json.dumps(card))
    return folder


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def put_on_the_tower(folder):
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    key = next(iter(state))
    name = key.replace("model.layers.0.", "model.vision_tower.vision_tower.vision_model.encoder.layers.0.")
    torch.save({**state, name: state[key]}, folder / "adapter_model.bin")


REFUSED = {
    "another rank": (["--lora_r", 16], None, ["--lora_r 16", "has 8; leave --lora_r out"]),
    "another rank, with dashes": (["--lora-r", 16], None, ["--lora_r 16", "has 8; leave --lora_r out"]),
    "another alpha": (["--lora_alpha", 32], None, ["--lora_alpha 32", "has 16; leave --lora_alpha out"]),
    "no LoRA": (["--lora_enable", False], None, ["no LoRA trains; add --lora_enable True"]),
    "no adapter": (["--lora_weight_path", "."], None, ["--lora_weight_path", "adapter_config.json"]),
    "over itself": (["--output_dir", "runs"], None, ["--output_dir runs", "choose another --output_dir"]),
    "another base": (
        [],
        lambda folder: change(folder / "delta.json", lambda card: card["base"][0].update(path="/a/b", sha256="c0ffee")),
        ["was trained on /a/b with sha256 c0ffee", "tiny-llava-original with sha256"],
    ),
    "a connector twice": (
        ["--hadpo_compat", True, "--pretrain_mm_mlp_adapter", GOLDEN / "train" / "mm_projector_init.bin"],
        None,
        ["--pretrain_mm_mlp_adapter", "has nothing to do", "leave one of them out"],
    ),
    "on the tower": ([], put_on_the_tower, ["changes the vision tower (first: ", "python -m llava.model.export"]),
    "no pictures": (
        ["--model_name_or_path", "tiny-vicuna"],
        lambda folder: (folder / "delta.json").unlink(),
        ["tiny-vicuna without the adapter, a language model", "--pretrain_mm_mlp_adapter"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_gone_on_with(run_script, dpo_flags, golden, tmp_path, adapter, case):
    flags, spoil, parts = REFUSED[case]
    if spoil is not None:
        spoil(adapter)
    (tmp_path / "tiny-vicuna").symlink_to(golden / "tiny-vicuna")
    common = [*dpo_flags, "--lora_enable", True, "--lora_weight_path", adapter, "--output_dir", tmp_path / "out"]
    code, _, err = run_script("train_dpo", *common, "--vision_tower", golden / "tiny-clip", *flags)
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in line
