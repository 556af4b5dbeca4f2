"""Losses and whole runs against TRL's own numbers, recorded (benchmarks/trl_agreement.py --record)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import logs_of, losses_of, succeed

from benchmarks.trl_agreement import RUNS, our_flags, same_adapter
from llava.train.losses import LOSSES, Pairs, preference_loss


@pytest.fixture(scope="module")
def recorded(golden):
    return {name: json.loads((golden / "trl" / f"{name}.json").read_text()) for name in ("losses", "trajectory")}


def drawn(recorded, beta, label_smoothing=0.0):
    """The recording's policy log-probabilities (2 B,), and the pairs of them."""
    inputs = {k: torch.tensor(v, dtype=torch.float64) for k, v in recorded["losses"]["inputs"].items()}
    policy = inputs["policy"].requires_grad_()
    rows = (*policy.chunk(2), *inputs["reference"].chunk(2), *inputs["counts"].long().chunk(2))
    return policy, Pairs(*rows, beta, label_smoothing)


def test_losses_and_gradients_are_trls(recorded):
    cases = recorded["losses"]["cases"]
    assert {name for case in cases for name in case["loss_type"]} == LOSSES.keys()
    for case in cases:
        policy, pairs = drawn(recorded, case["beta"], case["label_smoothing"])
        loss = preference_loss(pairs, case["loss_type"], case["loss_weights"]).loss
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-6), case
        assert policy.grad.tolist() == pytest.approx(case["gradients"], rel=1e-6, abs=1e-12), case


@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.3])
def test_smoothed_sigmoid_is_conservative_dpo(recorded, wrong):
    """TRL has none."""
    beta, inputs = 0.3, recorded["losses"]["inputs"]
    ratios = [p - r for p, r in zip(inputs["policy"], inputs["reference"], strict=True)]
    half = len(ratios) // 2
    margins = [c - r for c, r in zip(ratios[:half], ratios[half:], strict=True)]
    preferred = [1 / (1 + math.exp(-beta * margin)) for margin in margins]
    expected = [-(1 - wrong) * math.log(p) - wrong * math.log(1 - p) for p in preferred]
    policy, pairs = drawn(recorded, beta, wrong)
    loss = preference_loss(pairs)
    assert loss.terms["sigmoid"][0].tolist() == pytest.approx(expected, rel=1e-9)
    loss.loss.backward()
    slopes = [beta * (p - (1 - wrong)) / len(preferred) for p in preferred]
    assert policy.grad.tolist() == pytest.approx([*slopes, *(-slope for slope in slopes)], rel=1e-9)


def follow(run_script, recorded, name, folder, *flags):
    """Ten steps of ``train_dpo.py`` give TRL's losses."""
    with same_adapter():
        out = succeed(run_script("train_dpo", *our_flags(RUNS[name], folder), *flags))
    assert losses_of(folder) == pytest.approx(recorded["trajectory"]["losses"][name], rel=1e-5, abs=1e-5)
    return out


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_lose_what_trls_do(run_script, recorded, tmp_path, name):
    follow(run_script, recorded, name, tmp_path / "out")


MIXED = "LoRA, sigmoid + 0.5 sft"


@pytest.mark.parametrize("flags", [("--reference", "cache"), ("--attn_implementation", "eager")], ids=lambda f: f[1])
def test_other_ways_to_the_same_numbers(run_script, recorded, tmp_path, flags):
    follow(run_script, recorded, MIXED, tmp_path / "out", *flags)


def test_kept_hidden_states_give_the_same_numbers(run_script, recorded, tmp_path, ran):
    name, kept = "lm_head, ipo + 0.1 sft", ("--cache_hidden", tmp_path / "hidden")
    follow(run_script, recorded, name, tmp_path / "filled", *kept)
    ran.clear()
    follow(run_script, recorded, name, tmp_path / "again", *kept, "--reference", "cache")
    assert not ran


def test_every_term_is_logged_in_training_and_evaluation(run_script, recorded, golden, tmp_path):
    """Held-out pairs in batches of 3 and fewer: a mean over all tokens is none of batches' means."""
    held_out = ("--eval_data_path", golden / "hadpo_data" / "desc_data.json", "--per_device_eval_batch_size", 3)
    follow(run_script, recorded, MIXED, tmp_path / "out", *held_out, "--eval_steps", 10)
    logs = logs_of(tmp_path / "out")
    for prefix in ("", "eval_"):
        log = next(entry for entry in logs if f"{prefix}loss" in entry)
        terms = [log[f"{prefix}loss/{name}"] for name in ("sigmoid", "sft")]
        assert log[f"{prefix}loss"] == pytest.approx(terms[0] + 0.5 * terms[1], abs=1e-5)
        assert terms[1] > 5  # a token's, of a model that knows nothing: log 2000 is 7.6
    plain = recorded["trajectory"]["losses"]["LoRA, sigmoid"]  # the same start, the same first batch
    assert next(entry["loss/sigmoid"] for entry in logs) == pytest.approx(plain[0], abs=1e-5)


def test_auxiliary_data_is_beside_all_of_it(run_script, recorded, golden, tmp_path):
    aux = ("--aux_data", golden / "pretrain_data.json", "--image_folder", golden / "mini_vg", "--aux_weight", 0.25)
    flags = [*our_flags(RUNS[MIXED], tmp_path / "out"), *aux, "--max_steps", 1]
    with same_adapter():
        succeed(run_script("train_dpo", *flags))
    log = logs_of(tmp_path / "out")[0]
    alone = recorded["trajectory"]["losses"][MIXED][0]
    assert log["loss"] == pytest.approx(alone + 0.25 * log["aux_loss"], abs=1e-5) and log["aux_loss"] > 1


def test_flags_are_kept_with_the_run(run_script, tmp_path):
    with same_adapter():
        succeed(run_script("train_dpo", *our_flags(RUNS[MIXED], tmp_path / "out"), "--max_steps", 1))
    arguments = json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]
    assert (arguments["loss_type"], arguments["loss_weights"]) == (["sigmoid", "sft"], [1.0, 0.5])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss_type dpo", "no loss 'dpo'; expected one or more of sigmoid, hinge"),
        ("--loss_type ipo hinge ipo", "'ipo' is named twice"),
        ("--loss_type sft", "train_pretrain.py does that"),
        ("--loss_type sigmoid sft --loss_weights 1", "1 for the 2 of --loss_type sigmoid sft"),
        ("--loss_type sigmoid sft --loss_weights 1 0", "expected positive numbers"),
        ("--label_smoothing 0.5", "expected 0 or more and less than 0.5"),
        ("--loss_type ipo sft --label_smoothing 0.1", "only sigmoid and robust use it"),
        ("--rpo_alpha 0.5", "pass --loss_type sigmoid sft --loss_weights 1 0.5"),
        ("--label_smoothing_factor 0.1", "not supported"),
    ],
)
def test_flags_that_do_not_fit_are_refused(run_script, dpo_flags, flags, message):
    code, _, err = run_script("train_dpo", *dpo_flags, *flags.split())
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_robust_without_smoothing_is_noted(run_script, dpo_flags, tmp_path):
    code, _, err = run_script("train_dpo", *dpo_flags, "--loss_type", "robust", "--vg_path", tmp_path / "none")
    assert code == 2 and "note: --loss_type robust is sigmoid where --label_smoothing is 0" in err


def test_commas_part_losses_too():
    from llava.train.arguments import DPOTrainingArguments

    args = DPOTrainingArguments(report_to="none", loss_type=["sigmoid,sft", "ipo"])
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "sft", "ipo"], [1.0, 1.0, 1.0])
