"""Fused steps against plain autograd, PEFT and the full softmax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava.model import fused
from llava.model.fused import LMHead, Lora, LoraLinear, Rotary, SwiGLU, SwiGLULora


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_(True)


def test_swiglu_and_its_gradients():
    gate, up = draw(5, 7), draw(5, 7, seed=1)
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))
    torch.testing.assert_close(SwiGLU.apply(gate, up), F.silu(gate) * up, rtol=0, atol=0)


def test_rotary_and_its_gradient_are_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, angles = draw(5, 2, 8), draw(5, 4, seed=1).detach().repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    weight = draw(5, 2, 8, seed=2).detach()
    got = Rotary.apply(x, cos[:, None], sin[:, None])
    want, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad((y * weight).sum(), [x])[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(lambda x: Rotary.apply(x, cos[:, None], sin[:, None]), (x,))
    half = Rotary.apply(x.bfloat16(), cos[:, None].float(), sin[:, None].float())
    assert half.dtype == torch.float32  # as a product of the two is


@pytest.fixture
def lora():
    """A PEFT layer with both factors away from zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def test_a_lora_layer_in_one_go_is_pefts(lora):
    x = draw(4, 6, dtype=torch.float32)
    weights = [lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    weight = draw(4, 5, seed=2, dtype=torch.float32).detach()

    def run(forward):
        out = forward(x)
        return out, torch.autograd.grad((out * weight).sum(), [x, *weights])

    out, gradients = run(lambda x: LoraLinear.apply(x, *Lora.of(lora)))
    wanted, wanted_gradients = run(lora)
    torch.testing.assert_close(out, wanted)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(got, want)


def peft_layer(inputs, outputs, seed):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    bare = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=seed % 2 == 0))
    layer = get_peft_model(bare, LoraConfig(r=2, lora_alpha=6, target_modules=["0"])).base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def test_normed_projections_and_their_gradients_are_the_modules():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from llava.model.decoder import project_normed

    norm, layers = LlamaRMSNorm(6, eps=1e-5).requires_grad_(False), [peft_layer(6, out, out) for out in (3, 4, 5)]
    torch.nn.init.normal_(norm.weight)
    x = draw(7, 6, dtype=torch.float32)
    sources = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    weights = [draw(7, out, seed=out, dtype=torch.float32).detach() for out in (3, 4, 5)]

    def gradients(outs):
        return torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights, strict=True)), sources)

    outs = project_normed(norm, layers, x)
    assert type(outs[0].grad_fn).__name__ == "NormedLorasBackward"
    wanted = [layer(norm(x)) for layer in layers]
    for got, want in zip([*outs, *gradients(outs)], [*wanted, *gradients(wanted)], strict=True):
        torch.testing.assert_close(got, want)
    for changed in (norm.weight.requires_grad_(True), layers[1].enable_adapters(False)):
        assert type(project_normed(norm, layers, x)[0].grad_fn).__name__ != "NormedLorasBackward", changed
        norm.weight.requires_grad_(False)


def test_a_gated_projection_and_its_gradients_are_the_modules():
    down = peft_layer(6, 5, 0)
    gate, up = draw(7, 6, dtype=torch.float32), draw(7, 6, seed=1, dtype=torch.float32)
    sources = [gate, up, *(p for p in down.parameters() if p.requires_grad)]
    weight = draw(7, 5, seed=2, dtype=torch.float32).detach()
    out, wanted = SwiGLULora.apply(gate, up, *Lora.of(down)), down(F.silu(gate) * up)
    torch.testing.assert_close(out, wanted)
    got, want = (torch.autograd.grad((y * weight).sum(), sources) for y in (out, wanted))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_what_peft_does_otherwise_is_left_to_peft(lora):
    assert Lora.of(lora) is not None
    assert Lora.of(torch.nn.Linear(2, 2)) is None
    lora.lora_dropout["default"] = torch.nn.Dropout(0.1)
    assert Lora.of(lora) is None  # while training
    lora.lora_dropout["default"].eval()
    assert Lora.of(lora) is not None
    lora.enable_adapters(False)
    assert Lora.of(lora) is None
    lora.enable_adapters(True)
    lora.base_layer.half()
    assert Lora.of(lora) is None  # two dtypes and no autocast


def test_autocast_gives_pefts_dtypes_and_gradients(lora):
    x = draw(4, 6, dtype=torch.float32)
    weights = [lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    results = []
    for forward in (lora, lambda x: LoraLinear.apply(x, *Lora.of(lora))):
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(x)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), [x, *weights])))
    for want, got in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("rows_at_a_time", [1, 3, 1000])
def test_token_logps_are_those_of_the_whole_softmax(monkeypatch, trains_head, rows_at_a_time):
    vocabulary, hidden = 11, draw(6, 4, dtype=torch.float32)
    monkeypatch.setattr(fused, "LOGITS_AT_A_TIME", vocabulary * rows_at_a_time)
    torch.manual_seed(0)
    head = LMHead(4, vocabulary)
    head.weight.requires_grad_(trains_head)
    at, targets = torch.tensor([0, 1, 1, 3, 5, 5, 2]), torch.tensor([3, 0, 10, 4, 4, 5, 6])
    weight = draw(7, seed=3, dtype=torch.float32).detach()
    sources = [hidden, head.weight] if trains_head else [hidden]

    logps, means = head(hidden, at, targets)
    gradients = torch.autograd.grad((logps * weight).sum(), sources)
    logits = F.linear(hidden[at], head.weight)
    wanted = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    wanted_gradients = torch.autograd.grad((wanted * weight).sum(), sources)
    torch.testing.assert_close(logps, wanted)
    torch.testing.assert_close(means, logits.mean(-1))
    assert not means.requires_grad
    for got, want in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_no_labels_give_zero_gradients():
    hidden, head = draw(2, 4, dtype=torch.float32), LMHead(4, 11)
    nothing = torch.empty(0, dtype=torch.long)
    for trains_head in (True, False):
        head.weight.requires_grad_(trains_head)
        logps, _ = head(hidden, nothing, nothing)
        (gradient,) = torch.autograd.grad(logps.sum(), [hidden])
        assert logps.shape == (0,) and not gradient.any()


def test_without_targets_the_head_is_a_linear_layer():
    hidden, head = draw(2, 3, 4, dtype=torch.float32), LMHead(4, 11)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight))
