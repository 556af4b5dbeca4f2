"""The benchmarks at toy size: both sides are the same model, do the same work, and a disagreement is seen."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import duel, examples, flops, steps
from benchmarks.models import TINY, common_name, hf_model, logit_difference, our_model, with_lora
from llava.constants import IGNORE_INDEX

DESCRIPTIONS = partial(examples.descriptions, TINY, 2, 0)
QUESTIONS = partial(examples.questions, TINY, 4, 0, 2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Toys are fastest on one thread."""
    monkeypatch.setattr(duel, "GEMM_SIZE", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_both_models_are_one():
    assert logit_difference(TINY) < 1e-5


def test_weights_do_something():
    """Logits spread, and an adapter changes them: agreement of models that say nothing would say nothing."""
    model = our_model(TINY)
    ids, pixels = torch.tensor([[1, 5, -200, 7, 9]]), torch.randn(2, 1, 3, 28, 28)
    with torch.no_grad():
        first, second = (model(input_ids=ids, images=image).logits[0, -1] for image in pixels)
        assert first.std() > 1 and (first - second).abs().max() > 0.1
        adapted = with_lora(model).eval()(input_ids=ids, images=pixels[0]).logits[0, -1]
    assert (adapted - first).abs().max() > 0.01


def test_names_of_all_parameters_map():
    ours = {name for name, _ in our_model(TINY).named_parameters()}
    assert {common_name(name) for name, _ in hf_model(TINY).named_parameters()} == ours


@pytest.mark.parametrize("data", [DESCRIPTIONS, QUESTIONS], ids=["descriptions", "questions"])
def test_dpo_step_is_the_plain_one(data):
    plain = duel.plain(steps.PlainDPO(TINY, data).step())
    assert abs(plain["loss"] - math.log(2)) > 1e-3  # the reference is not the policy
    for options in ({}, {"cached": True}, {"checkpointing": True}):
        apart = duel.differences(duel.plain(steps.our_dpo(TINY, data, **options).step()), plain)
        assert apart.keys() == {"loss", "gradients"} and max(apart.values()) < 1, options


def test_pretraining_step_is_the_plain_one():
    captions = partial(examples.captions, TINY, 3, 0)
    ours, theirs = steps.our_pretrain(TINY, captions), steps.FullLogitsPretrain(TINY, captions)
    assert max(duel.differences(duel.plain(ours.step()), duel.plain(theirs.step())).values()) < 1


@pytest.fixture
def on_disk(tmp_path):
    """Three batches of two pairs about files."""
    return partial(examples.with_files, partial(examples.descriptions, TINY, 6, 0), TINY, tmp_path)


def follow(contender, number: int = 5) -> dict:
    """Results of the first step, and the losses of those behind it."""
    first = duel.plain(contender.step())
    return {**first, "later losses": [contender.step()["loss"] for _ in range(1, number)]}


def learned(results: dict) -> float:
    """How far the losses have come from where policy and reference are one."""
    return max(abs(loss - math.log(2)) for loss in results["later losses"])


@pytest.mark.parametrize("way", ["kept", "computed"])
def test_steps_on_a_frozen_backbone_are_the_plain_ones(on_disk, tmp_path, ran, way):
    hidden = tmp_path / "hidden" if way == "kept" else None
    plain = follow(steps.PlainDPO(TINY, on_disk, pairs=2, head_alone=True))
    assert plain["loss"] == pytest.approx(math.log(2)) and plain["gradients"].keys() == {"lm_head.weight"}
    assert learned(plain) > 1e-3
    ours = steps.our_frozen_dpo(TINY, on_disk, 2, "lm_head", hidden=hidden)
    ran.clear()
    apart = duel.differences(follow(ours), plain)
    assert apart.keys() == {"loss", "gradients", "later losses"} and max(apart.values()) < 1
    assert len(ran) == (0 if hidden else 5)  # the reference takes over what the policy's has given


def test_a_post_block_trains_the_same_on_kept_hidden_states(on_disk, tmp_path, ran):
    kept = steps.our_frozen_dpo(TINY, on_disk, 2, "post_block", hidden=tmp_path / "hidden")
    ran.clear()
    results = follow(kept)
    assert not ran and learned(results) > 1e-3
    computed = follow(steps.our_frozen_dpo(TINY, on_disk, 2, "post_block"))
    assert max(duel.differences(results, computed).values()) < 1


def test_the_plain_step_goes_down_to_the_embeddings(on_disk):
    """As LLaVA's does, though lm_head alone trains."""
    peer, reached = steps.PlainDPO(TINY, on_disk, pairs=2, head_alone=True), []
    embeddings = peer.policy.get_input_embeddings()

    def watch(_, __, embedded):
        embedded.register_hook(lambda grad: reached.append(grad.abs().max() > 0))

    embeddings.register_forward_hook(watch)
    peer.step()
    assert reached == [True]


def test_transformers_rows_carry_the_same_labels():
    rows = [side for pair in DESCRIPTIONS() for side in (pair.chosen, pair.rejected)]
    batch = examples.hf_batch(DESCRIPTIONS(), TINY)
    labels = sorted([i for i in row if i != IGNORE_INDEX] for row in batch["labels"].tolist())
    assert labels == sorted([i for i in row.labels if i != IGNORE_INDEX] for row in rows)
    assert (batch["input_ids"] == TINY.image_token).sum(1).tolist() == [TINY.tokens_per_image] * 4


NO_ATTENTION = dict.fromkeys(("attended", "queries_attended", "queries_looking"), 0)


def products(contender) -> int:
    """Operations of a step's matrix products with weights, as torch counts them while it runs."""
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    with FlopCounterMode(
        display=False, custom_mapping={aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    ) as c:
        contender.step()
    counts = c.get_flop_counts()["Global"]
    return sum(counts[kind] for kind in (aten.convolution, aten.addmm, aten.addmm_, aten.mm) if kind in counts)


def test_useful_operations_are_those_that_run():
    """Nothing is recomputed in these two steps, so all that runs is useful; attention's share is left out of both."""
    for contender, data, useful in (
        (steps.our_dpo, DESCRIPTIONS, partial(flops.dpo, lora_r=steps.LORA_R, cached=False)),
        (steps.our_pretrain, partial(examples.captions, TINY, 3, 0), flops.pretrain),
    ):
        amount = flops.Amount.of(steps.our_inputs(data, TINY))
        expected = useful(TINY, amount._replace(**NO_ATTENTION))
        assert products(contender(TINY, data)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("part", ["lm_head", "post_block"])
def test_useful_operations_on_a_frozen_backbone(on_disk, tmp_path, part):
    pairs = on_disk()[:2]
    amount = flops.Amount.of(steps.our_inputs(pairs.copy, TINY))._replace(**NO_ATTENTION)
    recomputed = flops.head(TINY, amount) if part == "lm_head" else 0  # logits are not kept for a weight that trains
    for hidden in (None, tmp_path / "hidden"):
        step = steps.our_frozen_dpo(TINY, pairs.copy, 2, part, hidden=hidden)
        expected = flops.frozen_dpo(TINY, amount, part, hidden is not None) + recomputed
        assert products(step) == pytest.approx(expected, rel=0.01)


def test_what_queries_look_at_is_their_own_picture(on_disk):
    amount = flops.Amount.of(steps.our_inputs(on_disk, TINY))
    assert amount.queries_looking == amount.queries * TINY.tokens_per_image


def test_law_is_found_and_never_negative():
    from benchmarks.scaling import fit

    generator = np.random.default_rng(0)
    terms = generator.uniform(1, 10, (12, 4))
    law, r2 = fit(terms, terms @ [1.0, 2.0, 3.0, 4.0])
    assert law == pytest.approx([1, 2, 3, 4]) and r2 == pytest.approx(1)
    law, _ = fit(terms, terms @ [5.0, -0.1, 1.0, 1.0])
    assert law[1] == 0 and (law >= 0).all()


class Constant:
    """Comes to a given result."""

    def __init__(self, loss: float = 1.0, gradient: float = 1.0) -> None:
        self.results = {"loss": loss, "gradients": {"w": torch.tensor([gradient, 0.5])}, "answers": ["yes", "no"]}

    def step(self):
        return dict(self.results)


class Drifting(Constant):
    """Comes to a given result at first."""

    def step(self):
        self.results["loss"] += 0.001
        return {**self.results, "loss": self.results["loss"] - 0.001}


def one_row(tmp_path, theirs, **options) -> tuple[int, dict]:
    contenders = {"a": Constant, "b": theirs, "c": Constant}
    rows = [duel.Row("work", "peer", "a", "b", 1e9, **options)]
    file = tmp_path / "rows.json"
    code = duel.report(duel.run(contenders, rows, rounds=2, in_process=True), file)
    return code, json.loads(file.read_text())[0]


def test_rows_of_a_run(tmp_path, capsys):
    code, row = one_row(tmp_path, Constant)
    assert code == 0 and row["work"] == "work" and row["against"] == "peer" and row["agrees"] is True
    assert row["ratio"] > 0 and row["memory_ratio"] > 0 and row["share_of_matmul"] > 0
    assert row.keys() >= {"seconds", "peak_bytes", "machine", "versions"}
    assert "| work | peer |" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"loss": 1.001}, {"gradient": 1.001}, {"loss": float("nan")}], ids=str)
def test_a_disagreement_is_an_error(tmp_path, capsys, other):
    code, row = one_row(tmp_path, partial(Constant, **other))
    assert code == 1 and row["agrees"] is False and "| NO (" in capsys.readouterr().out


def test_later_losses_are_followed_where_a_row_says_so(tmp_path):
    assert one_row(tmp_path, Drifting)[1]["agrees"] is True
    code, row = one_row(tmp_path, Drifting, follow=True)
    assert code == 1 and row["apart"]["loss"] <= 1 < row["apart"]["later losses"]


def test_results_may_be_another_ones_than_the_time(tmp_path):
    code, row = one_row(tmp_path, partial(Constant, loss=2.0), same_as="c", follow=True)
    assert code == 0 and row["agrees"] is True


def test_other_answers_are_an_error():
    results = Constant().step()
    assert duel.differences(duel.plain(results), duel.plain({**results, "answers": ["yes", "yes"]}))["answers"] > 1
