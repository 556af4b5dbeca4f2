"""Trees through the whole model against the same rows one by one, and against recordings of the original programs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from llava.data.collate import Collator, Example, PreferenceExample
from llava.data.packing import pack_batch
from llava.model import decoder, llava_arch
from llava.model.builder import load_pretrained_model
from llava.model.decoder import why_not
from llava.train.trainable import add_lora, switch_on


class Lora:
    lora_r, lora_alpha, lora_dropout, lora_bias, seed = 8, 16, 0.0, "none", 42


@pytest.fixture(scope="module")
def pairs(golden):
    """HA-DPO's eight distinct recorded pairs; three of their pictures are used twice."""
    items = json.loads((golden / "dpo" / "dataset_items.json").read_text())["items"]
    with np.load(golden / "dpo" / "dataset_images.npz") as pixels:
        pictures = [torch.tensor(pixels[f"item{index}"]) for index in range(8)]
    examples = []
    for index, item in enumerate(items[:8]):
        path = next(str(i) for i in range(8) if torch.equal(pictures[i], pictures[index]))
        sides = [
            Example(item[f"{side}_input_ids"], item[f"{side}_labels"], (path,), {path: pictures[index]})
            for side in ("chosen", "reject")
        ]
        examples.append(PreferenceExample(*sides))
    return Collator(0, 2048, lambda: torch.zeros(3, 56, 56))(examples)


def packed(batch, model, max_length=2048):
    tokens = model.get_model().get_vision_tower().num_features
    return {"rows": pack_batch(batch, tokens, max_length), "images": batch["images"]}


def tiny_qwen(tied=True):
    """Grouped-query attention, biases on q, k and v."""
    from llava.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaQwen2Config(
        **{**sizes, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
        vocab_size=2000,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        mm_vision_config={**sizes, "image_size": 56, "patch_size": 14, "projection_dim": 16},
        mm_hidden_size=16,
        mm_vision_select_layer=-2,
        mm_projector_type="mlp2x_gelu",
    )
    return LlavaQwen2ForCausalLM(config)


def run(model, batch, weights, **options):
    """Log-probabilities of the rows, the mean logits, and gradients of a weighted sum of the former."""
    model.zero_grad()
    scores = model(**batch, **options).scores
    rows = scores.row_sums(scores.logps)
    (rows * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return rows.detach(), scores.row_sums(scores.mean_logits), gradients


PARTS = ["lora,projector", "lora", "lm_head", "projector", "projector,backbone,lm_head"]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_trees_give_the_numbers_and_gradients_of_separate_rows(golden, pairs, family, parts):
    parts = set(parts.split(","))
    if family == "qwen2":
        model = tiny_qwen(tied=parts != {"lm_head"})
    else:
        model = load_pretrained_model(str(golden / "tiny-llava-original"), None)[1]
    if "lora" in parts:
        model = add_lora(model, Lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    switch_on(model, parts)
    model.train()
    weights = torch.randn(16, generator=torch.Generator().manual_seed(1))
    apart = run(model, pairs, weights, score_labels=True, use_cache=False)
    trees = packed(pairs, model)
    together = run(model, trees, weights)
    tokens = model.get_model().get_vision_tower().num_features - 1
    assert len(trees["rows"]["input_ids"]) < 0.6 * (pairs["attention_mask"].sum() + 16 * tokens)
    torch.testing.assert_close(together[0], apart[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(together[1], apart[1], rtol=1e-5, atol=1e-5)
    check_gradients(together[2], apart[2])

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = run(model, trees, weights)
    torch.testing.assert_close(again[0], together[0])
    check_gradients(again[2], together[2])


def check_gradients(got, want):
    assert got.keys() == want.keys() and want
    largest = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6 * float(largest), msg=name)


def test_trees_give_ha_dpos_recorded_log_probabilities(golden, loaded, pairs):
    recorded = json.loads((golden / "dpo" / "dpo_golden.json").read_text())["batch_unique8"]
    assert recorded["indices"] == list(range(8))
    with torch.no_grad():
        scores = loaded[1](**packed(pairs, loaded[1])).scores
    chosen, rejected = scores.row_sums(scores.logps).chunk(2)
    own = recorded["NOT_UPSTREAM_reference_with_own_projector"]
    torch.testing.assert_close(chosen, torch.tensor(own["chosen"]), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(rejected, torch.tensor(own["rejected"]), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("limit", [70, 62, 20])
def test_rows_are_cut_as_separate_ones_are(golden, pairs, limit):
    model = load_pretrained_model(str(golden / "tiny-llava-original"), None)[1]
    model.config.tokenizer_model_max_length = limit
    with torch.no_grad():
        apart = model(**pairs, score_labels=True).scores
        together = model(**packed(pairs, model, limit)).scores
    assert together.counts.tolist() == apart.counts.tolist()
    torch.testing.assert_close(together.logps, apart.logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [2048, 66, 20])
def test_trees_in_stretches_are_the_same_trees(golden, pairs, monkeypatch, limit):
    model = add_lora(load_pretrained_model(str(golden / "tiny-llava-original"), None)[1], Lora)
    switch_on(model, {"lora", "projector"})
    model.train()
    weights = torch.randn(16, generator=torch.Generator().manual_seed(1))
    batch = packed(pairs, model, limit)
    counts = [tree[3] for tree in batch["rows"]["trees"]]
    assert (0 in counts) is (limit < 2048)  # rows that were cut before their labels
    monkeypatch.setattr(decoder, "TOKENS_AT_A_TIME", 10**6)
    together = run(model, batch, weights)
    ran = []
    original = decoder._run_stretch
    monkeypatch.setattr(decoder, "_run_stretch", lambda *args: ran.append(1) or original(*args))
    monkeypatch.setattr(decoder, "TOKENS_AT_A_TIME", 150)
    apart = run(model, batch, weights)
    assert 1 < len(ran) < len(counts) or limit == 2048
    torch.testing.assert_close(apart[0], together[0], rtol=1e-6, atol=1e-5)
    check_gradients(apart[2], together[2])


def test_what_another_forward_has_computed_is_taken_over(loaded, pairs, monkeypatch):
    model, batch = loaded[1], packed(pairs, loaded[1])
    with torch.no_grad():
        first = model(**batch).scores
        seen = model.see(batch["images"])
        monkeypatch.setattr(type(model.model.vision_tower), "forward", None)  # not needed any more
        kept = model(rows=batch["rows"], vision_features=seen).scores
        again = model(**batch, image_features=first.features).scores
        monkeypatch.setattr(llava_arch, "run_layers", None)
        last = model(**batch, hidden_at_labels=first.hidden).scores
    for scores in (kept, again, last):
        assert torch.equal(scores.logps, first.logps)


def test_bytes_and_pixel_values_are_the_same_picture(loaded, pairs):
    model, generator = loaded[1], torch.Generator().manual_seed(0)
    levels = torch.randn(3, 256, generator=generator)
    pictures = torch.randint(256, (2, 3, 56, 56), generator=generator, dtype=torch.uint8)
    pixels = torch.stack([levels[c][pictures[:, c].long()] for c in range(3)], dim=1)
    with torch.no_grad():
        assert torch.equal(model.see(pictures, levels), model.see(pixels))


def test_kernels_that_take_no_mask_are_named(loaded):
    assert why_not(loaded[1].config) is None
    assert "flash_attention_2" in why_not(loaded[1].config, "flash_attention_2")
    config = tiny_qwen().config
    config.use_sliding_window = True
    assert "sliding window" in why_not(config)
