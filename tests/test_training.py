"""The training scripts on the recorded tiny models, in this process: what trains, what is logged, what is saved."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import logs_of, losses_of, succeed
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import read_connector, read_model_weights


def changed_parts(golden, folder, base="tiny-llava-original"):
    """Parts of the model whose weights differ from the base's."""
    from llava.train.trainable import part_of

    before = load_pretrained_model(str(golden / base), None)[1].state_dict()
    after = load_pretrained_model(str(folder), str(golden / base))[1].state_dict()
    assert before.keys() == after.keys()
    return {part_of(key) for key, value in after.items() if not torch.equal(value, before[key])}


TRL_METRICS = {
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
}


def test_dpo_with_lora_starts_at_log_two_and_logs_trls_metrics(run_script, dpo_flags, tmp_path, golden):
    out = succeed(
        run_script(
            "train_dpo",
            *dpo_flags,
            "--lora_enable",
            True,
            "--output_dir",
            tmp_path / "out",
            "--report_to",
            "tensorboard",
        )
    )
    assert "| lora | 157,696 | 157,696 |" in out
    logs = logs_of(tmp_path / "out")
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logs[0].keys() >= TRL_METRICS
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert logs[2]["rewards/margins"] > 0
    events = list((tmp_path / "out" / "runs").rglob("events.out.tfevents*"))
    assert events
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(events[0].parent))
    board.Reload()
    margins = [point.value for point in board.Scalars("train/rewards/margins")]
    assert margins == pytest.approx([log["rewards/margins"] for log in logs[:3]], abs=1e-6)


def test_first_step_log_probabilities_are_ha_dpos_reference(run_script, dpo_flags, tmp_path, golden):
    """At the first step policy and reference are the base; HA-DPO recorded the base's log-probabilities."""
    recorded = json.loads((golden / "dpo" / "dpo_golden.json").read_text())["batch_unique8"]
    want = recorded["NOT_UPSTREAM_reference_with_own_projector"]  # items 0..7; 8..11 repeat 4..7
    twice = [*range(8), *range(4, 8)]
    chosen = sum(want["chosen"][i] for i in twice) / 12
    rejected = sum(want["rejected"][i] for i in twice) / 12
    flags = [*dpo_flags, "--per_device_train_batch_size", 12, "--lora_enable", True, "--output_dir", tmp_path / "out"]
    succeed(run_script("train_dpo", *flags))
    log = logs_of(tmp_path / "out")[0]
    assert log["logps/chosen"] == pytest.approx(chosen, abs=1e-3)
    assert log["logps/rejected"] == pytest.approx(rejected, abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "parts", "files"),
    [
        (["--lora_enable", True], {"projector", "backbone"}, {"adapter_model.safetensors", "non_lora_trainables.bin"}),
        (["--lora_enable", True, "--mm_projector_lr", 0], {"backbone"}, {"adapter_model.safetensors"}),
        (["--tune_mm_mlp_adapter", True], {"projector"}, {"mm_projector.bin"}),
        (["--freeze_backbone", True], {"projector", "lm_head"}, {"delta.safetensors", "delta.json"}),
        ([], {"projector", "backbone", "lm_head"}, {"model.safetensors"}),
        (["--freeze_mm_mlp_adapter", True], {"backbone", "lm_head"}, {"model.safetensors"}),
    ],
)
def test_every_mode_of_dpo_trains_its_parts_and_saves_what_loads_again(
    run_script, dpo_flags, tmp_path, golden, flags, parts, files
):
    folder = tmp_path / "out"
    succeed(run_script("train_dpo", *dpo_flags, *flags, "--output_dir", folder))
    present = {path.name for path in folder.iterdir()}
    assert present >= files | {"config.json", "tokenizer.model", "preprocessor_config.json", "run.json"}
    assert changed_parts(golden, folder) == parts
    assert losses_of(folder)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_saved_lora_is_exactly_what_was_trained(run_script, dpo_flags, tmp_path, golden):
    folder = tmp_path / "out"
    flags = ["--lora_enable", True, "--lora_r", 8, "--lora_alpha", 16]
    succeed(run_script("train_dpo", *dpo_flags, *flags, "--output_dir", folder))
    adapter = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["base_model_name_or_path"] == str(golden / "tiny-llava-original")
    assert not any("vision_tower" in key for key in adapter)
    base = read_model_weights(golden / "tiny-llava-original")
    merged = load_pretrained_model(str(folder), str(golden / "tiny-llava-original"))[1].state_dict()
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        a, b = (adapter[f"base_model.model.model.layers.1.{name}.lora_{x}.weight"] for x in "AB")
        want = base[f"model.layers.1.{name}.weight"] + 16 / 8 * b @ a
        torch.testing.assert_close(merged[f"model.layers.1.{name}.weight"], want)
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    assert set(others) == {f"base_model.model.model.mm_projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}
    for key, value in others.items():
        torch.testing.assert_close(merged[key.removeprefix("base_model.model.")], value)


def test_accumulated_batches_are_one_batch(run_script, dpo_flags, tmp_path):
    def losses(name, batch, steps):
        flags = [*dpo_flags, "--lora_enable", True, "--output_dir", tmp_path / name]
        flags += ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps]
        succeed(run_script("train_dpo", *flags))
        return [(log["loss"], log["grad_norm"]) for log in logs_of(tmp_path / name) if "loss" in log]

    whole, parts = losses("whole", 4, 1), losses("parts", 2, 2)
    for a, b in zip(whole, parts, strict=True):
        assert b == pytest.approx(a, abs=1e-4)


def test_held_out_preferences_are_measured_during_training(run_script, dpo_flags, tmp_path, golden):
    pairs = tmp_path / "held_out.jsonl"
    rows = [
        {"image": "VG_100K/2315000.png", "prompt": "Is there a dog?", "chosen": "No.", "rejected": "Yes."},
        {"image": "VG_100K/2315014.png", "prompt": "Is there a cat?", "chosen": "Yes.", "rejected": "No."},
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*dpo_flags, "--lora_enable", True, "--output_dir", tmp_path / "out", "--eval_data_path", pairs]
    flags += ["--image_folder", golden / "mini_vg", "--vg_path", ".", "--evaluation_strategy", "steps"]
    flags += ["--eval_steps", 1]
    succeed(run_script("train_dpo", *flags))
    evals = [log for log in logs_of(tmp_path / "out") if "eval_loss" in log]
    assert len(evals) == 4  # three steps, and the end
    assert all(log.keys() >= {f"eval_{name}" for name in TRL_METRICS} for log in evals)
    assert all(log["eval_rewards/accuracies"] in (0, 0.5, 1) for log in evals)
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_rewards/accuracies"] == evals[-1]["eval_rewards/accuracies"]


def test_the_users_own_pairs_train(run_script, tmp_path, golden):
    pairs = tmp_path / "pairs.jsonl"
    row = {"image": "a_wide_97x41.png", "prompt": "What is it?", "chosen": "A car.", "rejected": "A dog and a cat."}
    pairs.write_text(json.dumps(row) + "\n")
    flags = ["--model_name_or_path", golden / "tiny-llava-original", "--data_path", pairs]
    flags += ["--image_folder", golden / "images", "--lora_enable", True, "--max_steps", 2, "--report_to", "none"]
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out", "--dataloader_num_workers", 0))
    assert len(losses_of(tmp_path / "out")) == 2


def test_the_run_card_says_how_the_folder_came_to_be(run_script, dpo_flags, tmp_path, golden):
    folder = tmp_path / "out"
    succeed(run_script("train_dpo", *dpo_flags, "--lora_enable", True, "--output_dir", folder, "--seed", 7))
    card = json.loads((folder / "run.json").read_text())
    assert card["status"] == "finished"
    assert "train_dpo.py" in card["command"] and "--lora_enable True" in card["command"]
    assert card["arguments"]["beta"] == 0.1 and card["arguments"]["lora_r"] == 64
    assert card["seed"] == 7
    assert card["wall_time_s"] > 0
    assert card["versions"]["torch"].startswith("2.13.0")
    assert set(card["git"]) == {"commit", "diff"}
    import hashlib

    desc = golden / "hadpo_data" / "desc_data.json"
    assert card["data"][str(desc)]["sha256"] == hashlib.sha256(desc.read_bytes()).hexdigest()
    assert card["metrics"]["loss"] == losses_of(folder)[-1]
    assert card["hardware"]["world_size"] == 1


def test_pretraining_follows_upstreams_recorded_trajectory(run_script, pretrain_flags, tmp_path, golden):
    """Full batch of 8, constant rate, no clipping, ten steps: every loss, and the connector at the end."""
    recorded = json.loads((golden / "train" / "pretrain_trajectory.json").read_text())
    steps = recorded["A_fullbatch8_constant_noclip_10steps"]["steps"]
    folder = tmp_path / "out"
    flags = ["--tune_mm_mlp_adapter", True, "--max_grad_norm", 0, "--num_train_epochs", 10, "--weight_decay", 0]
    flags += ["--pretrain_mm_mlp_adapter", golden / "train" / "mm_projector_init.bin", "--output_dir", folder]
    succeed(run_script("train_pretrain", *pretrain_flags, *flags))
    assert losses_of(folder) == pytest.approx([step["loss_as_returned_by_training_step"] for step in steps], abs=2e-4)
    want = read_connector(golden / "tiny-llava-pretrain" / "mm_projector.bin")
    got = read_connector(folder / "mm_projector.bin")
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("train_type", "parts"),
    [
        ("projector", {"projector"}),
        ("use_lora", {"projector", "backbone"}),
        ("freeze_vision", {"projector", "backbone", "lm_head"}),
        ("none", {"projector", "backbone", "lm_head", "vision_tower"}),
    ],
)
def test_train_types_train_what_they_say(run_script, pretrain_flags, tmp_path, golden, train_type, parts):
    start = tmp_path / "start"
    flags = ["--learning_rate", 0.0, "--train_type", "freeze_vision", "--output_dir", start]
    succeed(run_script("train_pretrain", *pretrain_flags, *flags))  # a rate of 0: the blank model itself
    folder = tmp_path / "out"
    succeed(run_script("train_pretrain", *pretrain_flags, "--train_type", train_type, "--output_dir", folder))
    base = golden / "tiny-vicuna"
    before = load_pretrained_model(str(start), None)[1].state_dict()
    after = load_pretrained_model(str(folder), str(base))[1].state_dict()
    from llava.train.trainable import part_of

    assert {part_of(key) for key, value in after.items() if not torch.equal(value, before[key])} == parts


def test_the_connector_has_its_own_rate(run_script, pretrain_flags, tmp_path, golden):
    flags = ["--train_type", "freeze_vision", "--learning_rate", 0.0, "--mm_projector_lr", 1e-2]
    out = succeed(run_script("train_pretrain", *pretrain_flags, *flags, "--output_dir", tmp_path / "out"))
    assert "| projector | 6,272 | 6,272 | 0.01 |" in out
    language_model = read_model_weights(golden / "tiny-vicuna")
    after = read_model_weights(tmp_path / "out")
    assert all(torch.equal(after[key], value) for key, value in language_model.items())
    start = tmp_path / "start"
    flags = ["--train_type", "projector", "--learning_rate", 0.0, "--output_dir", start]
    succeed(run_script("train_pretrain", *pretrain_flags, *flags))
    for key, value in read_connector(start / "mm_projector.bin").items():
        # Adam's first step is the rate itself, whatever the gradient.
        moved = (after[key] - value).abs()
        assert moved.max().item() == pytest.approx(1e-2, rel=1e-3)


def test_a_killed_run_goes_on_and_ends_where_it_would_have(run_script, dpo_flags, tmp_path):
    flags = [*dpo_flags, "--lora_enable", True, "--save_strategy", "steps", "--save_steps", 2]
    flags += ["--per_device_train_batch_size", 2, "--save_total_limit", 5]
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "whole"))
    assert (tmp_path / "whole" / "checkpoint-4").is_dir()
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(tmp_path / "whole" / "run.json", killed)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", killed / "checkpoint-4")
    (killed / "checkpoint-6").mkdir()  # the machine went down while this one was written
    out = succeed(run_script("train_dpo", *flags, "--output_dir", killed))
    assert "step 5/6" in out and "step 4/6" not in out
    assert losses_of(killed) == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-6)
    want = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for key, value in load_file(killed / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, want[key], atol=1e-6, rtol=0)


def test_checkpoints_in_the_middle_load_by_themselves(run_script, dpo_flags, tmp_path, golden):
    flags = [*dpo_flags, "--lora_enable", True, "--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 9]
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    assert changed_parts(golden, tmp_path / "out" / "checkpoint-1") == {"projector", "backbone"}


def test_a_folder_of_another_run_is_not_gone_on_with(run_script, dpo_flags, tmp_path):
    flags = [*dpo_flags, "--lora_enable", True, "--save_strategy", "steps", "--save_steps", 1]
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    code, _, err = run_script("train_dpo", *flags, "--output_dir", tmp_path / "out", "--learning_rate", 1e-4)
    assert code == 2
    assert "learning_rate 0.001 -> 0.0001" in err and "choose another --output_dir" in err
    again = [*flags, "--output_dir", tmp_path / "new", "--beta", 0.9]
    code, _, err = run_script("train_dpo", *again, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-3")
    assert code == 2
    assert "beta 0.1 -> 0.9" in err


def test_a_blank_llava_is_the_same_for_the_same_seed(run_script, pretrain_flags, tmp_path):
    def connector(name, seed):
        flags = ["--train_type", "projector", "--learning_rate", 0.0, "--seed", seed, "--output_dir", tmp_path / name]
        succeed(run_script("train_pretrain", *pretrain_flags, *flags))
        return read_connector(tmp_path / name / "mm_projector.bin")

    first, again, other = connector("a", 1), connector("b", 1), connector("c", 2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_batches_of_one_kind_and_like_length():
    from llava.train.sampler import ModalityLengthSampler

    lengths = [3, -2, 8, 1, -9, 5, 7, -4, 2, 6, -1, 4]
    epoch = 0
    sampler = ModalityLengthSampler(lengths, megabatch=4, seed=0, epoch=lambda: epoch)
    order = list(sampler)
    assert sorted(order) == list(range(12))
    groups = [[lengths[i] for i in order[k : k + 4]] for k in (0, 4, 8)]
    assert sum(all(x > 0 for x in g) for g in groups) == 2
    assert sum(all(x < 0 for x in g) for g in groups) == 1
    assert all([abs(x) for x in g] == sorted((abs(x) for x in g), reverse=True) for g in groups)
    assert list(sampler) == order
    epoch = 1
    assert list(sampler) != order


def test_grouping_by_length_is_obeyed_in_dpo(run_script, dpo_flags, tmp_path, golden, monkeypatch):
    """The sampler is given the pairs' lengths, and its order is the order of the batches."""
    from llava.train import trainer

    asked = []

    class InOrder(trainer.ModalityLengthSampler):
        def __iter__(self):
            asked.append((self.lengths, self.megabatch))
            return iter(range(len(self.lengths)))

    monkeypatch.setattr(trainer, "ModalityLengthSampler", InOrder)
    flags = [*dpo_flags, "--lora_enable", True, "--group_by_modality_length", True, "--output_dir", tmp_path / "out"]
    succeed(run_script("train_dpo", *flags, "--learning_rate", 0.0))
    items = json.loads((golden / "dpo" / "dataset_items.json").read_text())["items"]
    lengths = [max(len(item["chosen_input_ids"]), len(item["reject_input_ids"])) for item in items]
    assert asked == [(lengths, 4)]
    recorded = json.loads((golden / "dpo" / "dpo_golden.json").read_text())
    want = recorded["batch_unique8"]["NOT_UPSTREAM_reference_with_own_projector"]["chosen"]
    first, second, third = (log["logps/chosen"] for log in logs_of(tmp_path / "out") if "loss" in log)
    assert first == pytest.approx(sum(want[:4]) / 4, abs=1e-3)
    assert second == third == pytest.approx(sum(want[4:]) / 4, abs=1e-3)


def test_a_folder_used_again_holds_only_the_last_run(run_script, dpo_flags, tmp_path, golden):
    folder = tmp_path / "out"
    succeed(run_script("train_dpo", *dpo_flags, "--lora_enable", True, "--output_dir", folder))
    succeed(run_script("train_dpo", *dpo_flags, "--freeze_backbone", True, "--output_dir", folder))
    assert not (folder / "adapter_model.safetensors").exists()
    assert changed_parts(golden, folder) == {"projector", "lm_head"}


def test_an_evaluation_that_fails_does_not_cost_the_run(run_script, dpo_flags, tmp_path, golden):
    (tmp_path / "cut.png").write_bytes((golden / "images" / "h_big_511x340.png").read_bytes()[:999])
    pairs = tmp_path / "held_out.jsonl"
    row = {"image": str(tmp_path / "cut.png"), "prompt": "What?", "chosen": "A.", "rejected": "B."}
    pairs.write_text(json.dumps(row) + "\n")
    flags = [*dpo_flags, "--lora_enable", True, "--eval_data_path", pairs, "--eval_strategy", "no"]
    code, _, err = run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and "cut.png is broken or truncated" in err
    assert changed_parts(golden, tmp_path / "out") == {"projector", "backbone"}
