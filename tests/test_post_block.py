"""The block between backbone and head: fresh it changes nothing, trained it gives the same numbers however it runs."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from test_decoder import packed, run, tiny_qwen
from test_generation import alone, greedy, pictures, together
from transformers import GenerationConfig

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collate import Collator, Example
from llava.errors import UserError
from llava.model.post_block.base import Way
from llava.model.post_block.builder import POST_BLOCKS, block_settings, build_post_block, fresh_block
from llava.train.trainable import switch_on

LOOKS = [
    *("cross_attention=false", "keys=tower", "keys=connector"),
    *("keys=tower,align=linear", "keys=tower,align=mlp", "keys=connector,align=linear", "keys=connector,align=mlp"),
]
VARIANTS = [
    ("interaction", f"self_attention={back},{look},depth={depth},gate={gate},mlp_ratio={ratio}")
    for back, look, depth, gate, ratio in itertools.product(
        ("true", "false"), LOOKS, (1, 2), ("none", "scalar", "channel"), (0, 0.5)
    )
    if not (back == "false" and look == "cross_attention=false" and ratio == 0)
] + [("mlp", f"depth={depth},gate={gate}") for depth, gate in itertools.product((1, 2), ("none", "scalar", "channel"))]

# One of each kind, for what takes longer.
SOME = [
    ("interaction", ""),
    ("interaction", "self_attention=false"),
    ("interaction", "self_attention=false,keys=connector,align=mlp,gate=channel,depth=2"),
    ("interaction", "cross_attention=false,depth=2,mlp_ratio=0"),
    ("interaction", "keys=connector,depth=3,gate=scalar"),
    ("mlp", "depth=2"),
]


def with_block(name, options, fresh=False):
    """A tiny Qwen2 (grouped queries) with a block whose ways back are open."""
    model = tiny_qwen(tied=False).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                parameter.normal_(std=1.0 if key.endswith("bias") else 0.15)
    model.config.post_block = block_settings(name, options or None)
    model.post_block = build_post_block(model.config)
    weights = {key.removeprefix("post_block."): value for key, value in fresh_block(model.config, 3).items()}
    model.post_block.load_state_dict(weights)
    if not fresh:
        open_ways(model)
    return model


def open_ways(model):
    for way in model.post_block.modules():
        if isinstance(way, Way):
            torch.nn.init.normal_(way.proj.weight, std=0.3)
            if way.gate is not None:
                torch.nn.init.normal_(way.gate, mean=1.0)


ROWS = [
    [1, 5, IMAGE_TOKEN_INDEX, 9, 4, IMAGE_TOKEN_INDEX, 8, 30, 31],
    [1, 7, 6, 5],
    [1, 5, IMAGE_TOKEN_INDEX, 77, 3],
]


def padded(model, side="right"):
    """Two pictures in a row, none, one; ``images`` in another order than they are used."""
    length = max(map(len, ROWS))
    pads = [[0] * (length - len(row)) for row in ROWS]
    ids = torch.tensor([p + r if side == "left" else r + p for r, p in zip(ROWS, pads, strict=True)])
    mask = torch.tensor(
        [[False] * len(p) + [True] * len(r) for r, p in zip(ROWS, pads, strict=True)]
        if side == "left"
        else [[True] * len(r) + [False] * len(p) for r, p in zip(ROWS, pads, strict=True)]
    )
    index = torch.tensor([[2, 0], [-1, -1], [1, -1]])
    return {"input_ids": ids, "attention_mask": mask, "images": pictures(model), "image_index": index}


@torch.no_grad()
def test_a_fresh_block_changes_no_bit():
    for name, options in VARIANTS:
        model = with_block(name, options, fresh=True)
        batch = padded(model)
        with_it = model(**batch).logits
        model.post_block = None
        assert torch.equal(model(**batch).logits, with_it), options


def test_a_fresh_block_is_not_dead():
    """Two steps move every weight of it."""
    for name, options in VARIANTS:
        model = with_block(name, options, fresh=True)
        switch_on(model, {"post_block"})
        optimizer = torch.optim.Adam(model.post_block.parameters(), lr=1e-2)
        before = {key: p.detach().clone() for key, p in model.post_block.named_parameters()}
        for _ in range(3):
            optimizer.zero_grad()
            model(**padded(model)).logits.square().mean().backward()
            optimizer.step()
        still = [key for key, p in model.post_block.named_parameters() if torch.equal(p, before[key])]
        assert not still, (options, still)


@torch.no_grad()
def test_a_generation_with_a_cache_gives_the_logits_of_the_full_forward():
    for name, options in VARIANTS:
        model = with_block(name, options)
        batch = padded(model, "left")
        model.config.tokenizer_padding_side = "left"
        more = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])
        wide = {**batch, "input_ids": torch.cat([batch["input_ids"], more], 1)}
        wide["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.bool)], 1)
        length = batch["input_ids"].shape[1] + 2 * (model.get_vision_tower().num_features - 1)
        shift = length - batch["attention_mask"].sum(1) + 0
        shift -= torch.tensor([2, 0, 1]) * (model.get_vision_tower().num_features - 1)
        mask = torch.arange(length + 4) >= shift[:, None]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(**wide, position_ids=torch.ones_like(wide["input_ids"])).logits
        out = model(**batch, position_ids=torch.ones_like(batch["input_ids"]), use_cache=True)
        steps, cache, at = [out.logits], out.past_key_values, length
        for piece in more.split([1, 2, 1], dim=1):  # also two tokens at once
            end = at + piece.shape[1]
            known = {"attention_mask": mask[:, :end], "position_ids": positions[:, at:end]}
            out = model(input_ids=piece, past_key_values=cache, use_cache=True, **known)
            steps.append(out.logits)
            cache, at = out.past_key_values, end
        real = mask[:, :, None]
        torch.testing.assert_close(torch.cat(steps, 1) * real, whole * real, atol=2e-5, rtol=1e-5, msg=options)


@pytest.mark.parametrize(("name", "options"), SOME)
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(name, options):
    model = with_block(name, options)
    for side in ("left", "right"):
        model.config.tokenizer_padding_side = side
        batch = padded(model, side)
        logits = model(**batch, position_ids=torch.ones_like(batch["input_ids"])).logits
        for row, (ids, index) in enumerate(zip(ROWS, batch["image_index"], strict=True)):
            used = index[index >= 0]
            alone = model(torch.tensor([ids]), images=batch["images"][used] if len(used) else None).logits[0]
            inside = logits[row, -len(alone) :] if side == "left" else logits[row, : len(alone)]
            torch.testing.assert_close(inside, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), SOME)
def test_answers_are_those_of_generate_with_and_without_its_cache(name, options):
    model = with_block(name, options)
    images = pictures(model)
    ids, _ = together(model, greedy(8), images)
    assert ids == alone(model, greedy(8), images)
    assert ids == alone(model, greedy(8, use_cache=False), images)


@pytest.mark.parametrize(("name", "options"), SOME[:2])
def test_beams_carry_the_block_along(name, options):
    """A search with the cache, whose beams change places, finds what one without it finds."""
    model = with_block(name, options)
    images = pictures(model)
    settings = greedy(6, num_beams=3)
    assert alone(model, settings, images) == alone(model, {**settings, "use_cache": False}, images)


def conversation_batch(model):
    """Two rows about one picture with two pictures each, one text row, one about another picture."""
    rows = [
        [1, 5, (0,), 9, 9, (1,), 50, 51, 2],
        [1, 5, (0,), 9, 9, (1,), 50, 61, 62, 2],
        [1, 7, 40, 41, 2],
        [1, 5, (2,), 9, 70, 2],
    ]
    images = pictures(model)
    examples = [
        Example(
            ids := [IMAGE_TOKEN_INDEX if isinstance(i, tuple) else i for i in row],
            [IGNORE_INDEX if i < 40 else i for i in ids],
            tuple(str(i[0]) for i in row if isinstance(i, tuple)),
            {str(i[0]): images[i[0]] for i in row if isinstance(i, tuple)},
        )
        for row in rows
    ]
    return Collator(0, 2048, lambda: torch.zeros(3, 28, 28))(examples)


@pytest.mark.parametrize(("name", "options"), SOME)
def test_trees_give_the_numbers_and_gradients_of_separate_rows(name, options):
    model = with_block(name, options)
    switch_on(model, {"post_block", "lm_head", "projector"})
    batch = conversation_batch(model)
    weights = torch.tensor([1.0, -0.7, 0.4, 0.9])
    want = run(model, batch, weights, score_labels=True)
    got = run(model, packed(batch, model), weights, score_labels=True)
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-5)
    assert got[2].keys() == want[2].keys()
    for key, gradient in want[2].items():
        torch.testing.assert_close(got[2][key], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-7, rtol=0)


@pytest.mark.parametrize(("name", "options"), SOME)
@torch.no_grad()
def test_what_one_forward_knew_spares_another_the_backbone(name, options, monkeypatch):
    model = with_block(name, options)
    batch = packed(conversation_batch(model), model)
    first = model(**batch, score_labels=True).scores
    monkeypatch.setattr("llava.model.llava_arch.run_layers", None)
    rows = {"rows": batch["rows"], "score_labels": True}
    again = model(**rows, hidden_at_labels=first.hidden).scores
    assert torch.equal(again.logps, first.logps)
    seen = {"tower": {"vision_features": first.seen}, "connector": {"image_features": first.features}, None: {}}
    again = model(**rows, backbone_hidden=first.backbone, **seen[model.post_block.looks_at]).scores
    assert torch.equal(again.logps, first.logps)


def test_text_alone_still_gives_every_weight_a_gradient():
    """Ranks whose batch has no picture must not leave the others waiting."""
    model = with_block("interaction", "align=mlp")
    switch_on(model, {"post_block"})
    images = pictures(model, 1)
    example = Example([1, 7, 40, 41, 2], [IGNORE_INDEX, IGNORE_INDEX, 40, 41, 2], (), {})
    batch = Collator(0, 2048, lambda: images[0])([example])
    for form in (batch, packed(batch, model)):
        model.zero_grad()
        model(**form, score_labels=True).loss.backward()
        assert all(p.grad is not None for p in model.post_block.parameters())


@torch.no_grad()
def test_a_picture_that_the_cut_took_is_not_seen_later():
    model = with_block("interaction", "")
    row, cut = [1, 5, IMAGE_TOKEN_INDEX, 9, 4, IMAGE_TOKEN_INDEX, 8], 3 + model.get_vision_tower().num_features
    model.config.tokenizer_model_max_length = cut
    images = pictures(model)
    settings = GenerationConfig(**greedy(6))
    both = model.generate(torch.tensor([row]), images=images[:2], generation_config=settings)
    assert torch.equal(both, model.generate(torch.tensor([row[:4]]), images=images[:1], generation_config=settings))


def test_other_caches_than_the_dynamic_are_refused():
    model = with_block("interaction", "")
    settings = GenerationConfig(**greedy(2, cache_implementation="static"))
    with pytest.raises(ValueError, match="dynamic cache"):
        model.generate(torch.tensor([[1, 5, 7]]), generation_config=settings)


BAD = [
    ("nothing", None, ["--post_block nothing", "interaction, mlp"]),
    ("interaction", "dept=2", ["no option 'dept'", "did you mean depth"]),
    ("interaction", "depth=two", ["depth=two", "a whole number, 1 or more"]),
    ("interaction", "depth=0", ["depth=0", "1 or more"]),
    ("interaction", "depth=2,gate", ["'gate' is no k=v"]),
    ("interaction", "gate=tanh", ["gate=tanh", "none or scalar or channel"]),
    ("interaction", "self_attention=1", ["self_attention=1", "true or false"]),
    ("mlp", "ratio=0", ["ratio=0", "above 0"]),
    ("mlp", "nowhere.yaml", ["--post_block_config nowhere.yaml", "no such file"]),
]


@pytest.mark.parametrize(("name", "options", "parts"), BAD)
def test_options_that_cannot_be(name, options, parts):
    with pytest.raises(UserError) as refused:
        block_settings(name, options)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_an_empty_block_is_refused():
    model = tiny_qwen()
    model.config.post_block = block_settings("interaction", "self_attention=false,cross_attention=false,mlp_ratio=0")
    with pytest.raises(UserError, match="empty block"):
        build_post_block(model.config)


def test_options_from_a_file(tmp_path):
    file = tmp_path / "block.yaml"
    file.write_text("depth: 2\nmlp_ratio: 2\n")
    found = block_settings("interaction", str(file))
    assert (found["name"], found["depth"], found["mlp_ratio"], found["keys"]) == ("interaction", 2, 2.0, "tower")
    file.with_suffix(".json").write_text(json.dumps({"depth": 2, "mlp_ratio": 2}))
    assert block_settings("interaction", str(file.with_suffix(".json"))) == found


def test_every_option_is_explained():
    import dataclasses

    for name, kind in POST_BLOCKS.items():
        assert all(field.metadata.get("help") for field in dataclasses.fields(kind.Options)), name
