"""DPO's arithmetic against HA-DPO's own, recorded."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava.data.collate import Collator, Example, PreferenceExample
from llava.train.losses import Pairs, preference_loss
from llava.train.reference import SharedReference, choose_reference
from llava.train.trainable import add_lora, switch_on


@pytest.fixture(scope="module")
def dpo(golden):
    return json.loads((golden / "dpo" / "dpo_golden.json").read_text())


class Lora:
    """The recorded policy's LoRA."""

    lora_r, lora_alpha, lora_dropout, lora_bias, seed = 8, 16, 0.0, "none", 42


@pytest.fixture(scope="module")
def policy(golden):
    """The recorded policy before its perturbation: tiny-llava-original with a new LoRA."""
    from llava.model.builder import load_pretrained_model

    return add_lora(load_pretrained_model(str(golden / "tiny-llava-original"), None)[1], Lora)


@pytest.fixture(scope="module")
def references(golden, policy):
    """Ours (its own connector), and HA-DPO's (the policy's); then the policy is perturbed as recorded."""
    parts, plan = {"lora", "projector"}, SimpleNamespace(adapter=None)
    ours, upstreams = (choose_reference(policy, parts, plan, hadpo_compat=compat) for compat in (False, True))
    switch_on(policy, {"lora", "projector"})
    names = dict(policy.named_parameters())
    for key, value in load_file(golden / "dpo" / "policy_trainable_perturbed.safetensors").items():
        names[key].data.copy_(value)
    return ours, upstreams


def recorded_batch(golden, dpo, name):
    items = json.loads((golden / "dpo" / "dataset_items.json").read_text())["items"]
    import numpy as np

    pixels = np.load(golden / "dpo" / "dataset_images.npz")
    examples = []
    for index in dpo[name]["indices"]:
        item, path = items[index], f"item{index}"
        images = {path: torch.tensor(pixels[path])}
        sides = [
            Example(item[f"{side}_input_ids"], item[f"{side}_labels"], (path,), images) for side in ("chosen", "reject")
        ]
        examples.append(PreferenceExample(*sides))
    return Collator(0, 2048, lambda: torch.zeros(3, 56, 56))(examples)


def logps(model, batch):
    scores = model(**batch, score_labels=True).scores
    return scores.row_sums(scores.logps).chunk(2)


def sigmoid_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """DPO's, of answers whose lengths do not matter."""
    counts = torch.ones(len(policy_chosen), dtype=torch.long)
    return preference_loss(
        Pairs(policy_chosen, policy_rejected, reference_chosen, reference_rejected, counts, counts, beta)
    )


SIDES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


@pytest.mark.parametrize("beta", ["0.01", "0.1", "0.5", "1.0"])
def test_loss_and_rewards_are_ha_dpos(dpo, beta):
    run, want = dpo["batch_unique8"], dpo["beta_sweep_unique8"][beta]
    got = sigmoid_loss(*(torch.tensor(run[f"{side}_logps"]) for side in SIDES), beta=float(beta))
    torch.testing.assert_close(got.terms["sigmoid"][0], torch.tensor(want["losses"]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.chosen_rewards, torch.tensor(want["chosen_rewards"]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.rejected_rewards, torch.tensor(want["rejected_rewards"]), atol=1e-6, rtol=1e-6)


def test_equal_models_lose_log_two():
    logps = torch.tensor([-3.0, -200.0])
    assert sigmoid_loss(logps, logps - 5, logps, logps - 5, beta=0.1).loss.item() == pytest.approx(math.log(2))


def equal(found, recorded):
    """Log-probabilities of answers to 1e-5 of each."""
    torch.testing.assert_close(found.double(), torch.tensor(recorded).double(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("name", ["batch_unique8", "batch_0_4", "batch_4_8", "batch_single_5", "batch_all12"])
def test_every_recorded_batch(golden, dpo, policy, references, name):
    run, batch = dpo[name], recorded_batch(golden, dpo, name)
    ours, upstreams = references
    with torch.no_grad():
        of_policy = logps(policy, batch)
    with upstreams.forward_of(policy) as model:
        of_reference = logps(model, batch)
    for found, side in zip((*of_policy, *of_reference), SIDES, strict=True):
        equal(found, run[f"{side}_logps"])
    got = sigmoid_loss(*of_policy, *of_reference, beta=0.1)
    for found, recorded in (
        (got.terms["sigmoid"][0], run["losses"]),
        (got.loss, run["loss"]),
        (got.chosen_rewards, run["chosen_rewards"]),
        (got.rejected_rewards, run["rejected_rewards"]),
    ):
        torch.testing.assert_close(found.double(), torch.tensor(recorded).double(), atol=1e-4, rtol=0)
    if "NOT_UPSTREAM_reference_with_own_projector" in run:
        want = run["NOT_UPSTREAM_reference_with_own_projector"]
        with ours.forward_of(policy) as model:
            chosen, rejected = logps(model, batch)
        equal(chosen, want["chosen"])
        equal(rejected, want["rejected"])


def test_gradients_are_ha_dpos(golden, dpo, policy, references):
    batch = recorded_batch(golden, dpo, "batch_unique8")
    policy.zero_grad()
    chosen = logps(policy, batch)
    with references[1].forward_of(policy) as model:
        reference = logps(model, batch)
    sigmoid_loss(*chosen, *reference, beta=0.1).loss.backward()
    names = dict(policy.named_parameters())
    recorded = load_file(golden / "dpo" / "grads_batch_unique8.safetensors")
    trained = {name for name, p in names.items() if p.requires_grad}
    assert {key.removeprefix("grad.") for key in recorded} == trained
    for key, value in recorded.items():
        torch.testing.assert_close(names[key.removeprefix("grad.")].grad, value, atol=1e-5, rtol=1e-4)
    total = torch.stack([names[name].grad.norm() for name in trained]).norm().item()
    assert total == pytest.approx(dpo["batch_unique8"]["grad_norm_total"], rel=1e-5)


def test_ten_steps_follow_the_recorded_trajectory(golden, dpo, policy, references):
    """A plain loop of AdamW on the full batch, with upstream's reference (it sees the policy's connector)."""
    recorded = json.loads((golden / "train" / "dpo_trajectory.json").read_text())["A_plain_loop_fullbatch8"]
    batch = recorded_batch(golden, dpo, "batch_unique8")
    start = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step in recorded:
        policy_logps = logps(policy, batch)
        with references[1].forward_of(policy) as model:
            reference_logps = logps(model, batch)
        loss = sigmoid_loss(*policy_logps, *reference_logps, beta=0.1)
        assert loss.loss.item() == pytest.approx(step["loss"], abs=1e-4)
        margins = (loss.chosen_rewards - loss.rejected_rewards).mean().item()
        assert margins == pytest.approx(step["rewards/margins"], abs=1e-3)
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
    for name, value in start.items():
        dict(policy.named_parameters())[name].data.copy_(value)


def test_with_only_the_connector_training_the_reference_is_the_start(golden, recorded_model):
    model, batch = recorded_model
    reference = SharedReference(model, {"projector"})
    before = [p.clone() for p in logps(model, batch)]
    with torch.no_grad():
        for p in model.get_model().mm_projector.parameters():
            p.add_(0.05)
    moved = logps(model, batch)
    with reference.forward_of(model) as frozen:
        kept = logps(frozen, batch)
    assert not torch.allclose(moved[0], before[0], atol=1e-3)
    torch.testing.assert_close(kept[0], before[0])
    torch.testing.assert_close(kept[1], before[1])
    # and the policy is itself again
    torch.testing.assert_close(logps(model, batch)[0], moved[0])


@pytest.fixture
def recorded_model(golden, dpo):
    from llava.model.builder import load_pretrained_model

    model = load_pretrained_model(str(golden / "tiny-llava-original"), None)[1]
    return model, recorded_batch(golden, dpo, "batch_0_4")
