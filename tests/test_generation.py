"""Answers grown on trees against transformers' ``generate`` with one row at a time."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.packing import pack_prompts
from llava.errors import UserError
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.generation import Rules, grow_answers, look_back, rules

BEGINNING = [1, 317, 259, IMAGE_TOKEN_INDEX, 300, 41]
# About three pictures in turn: questions that share words, one that another goes on from, one alone, a long one.
QUESTIONS = [
    (0, [77, 12, 9]),
    (0, [77, 12, 9, 44, 45]),
    (0, [77, 13]),
    (0, [78]),
    (0, list(range(100, 160))),
    (1, [77, 12, 9]),
    (2, [77, 13]),
    (2, [200, 13]),
]


@pytest.fixture(scope="module")
def qwen():
    """Grouped-query attention (four heads a key head), biases that are not zero, another head size."""
    from llava.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM

    torch.manual_seed(0)
    config = LlavaQwen2Config(
        vocab_size=400,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        mm_vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
        },
        mm_hidden_size=16,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu",
    )
    model = LlavaQwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=1.0 if name.endswith("bias") else 0.15)
    return model


@pytest.fixture
def model(request, loaded, qwen):
    return loaded[1] if request.param == "llama" else qwen


def pictures(model, number=3):
    size = model.get_vision_tower().config.image_size
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(5))


def alone(model, settings, images, questions=QUESTIONS):
    """Every question through ``model.generate`` by itself, up to its end."""
    return [
        model.generate(
            torch.tensor([BEGINNING + words]), images=images[[picture]], generation_config=GenerationConfig(**settings)
        )[0].tolist()
        for picture, words in questions
    ]


def stream_of(model, questions=QUESTIONS):
    rows = [
        [(IMAGE_TOKEN_INDEX, picture) if i == IMAGE_TOKEN_INDEX else i for i in BEGINNING + words]
        for picture, words in questions
    ]
    max_length = getattr(model.config, "tokenizer_model_max_length", None)
    return pack_prompts(rows, model.get_vision_tower().num_features, max_length)


def together(model, settings, images, questions=QUESTIONS):
    found = rules(model, GenerationConfig(**settings), None)
    assert isinstance(found, Rules), found
    return grow_answers(model, stream_of(model, questions), model.look(images), found)


def greedy(tokens, **more):
    return {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0, **more}


@pytest.mark.parametrize("tokens", [1, 4, 24])
@pytest.mark.parametrize("model", ["llama", "qwen"], indirect=True)
def test_answers_are_those_of_every_question_alone(model, tokens, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    images = pictures(model)
    want = alone(model, greedy(tokens), images)
    assert len({tuple(ids) for ids in want}) > 1 and {len(ids) for ids in want} == {tokens}
    assert together(model, greedy(tokens), images)[0] == want


@pytest.mark.parametrize("model", ["llama", "qwen"], indirect=True)
def test_some_answers_end_before_others(model, monkeypatch):
    """Two tokens that end answers at different places; what has ended takes no further part."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    images = pictures(model)
    free = alone(model, greedy(24), images)
    ends = [free[0][7], free[5][2]]
    want = alone(model, greedy(24, eos_token_id=ends), images)
    lengths = [len(ids) for ids in want]
    assert len(set(lengths)) > 2 and max(lengths) > min(lengths)

    asked = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: asked.append(len(out)))
    try:
        assert together(model, greedy(24, eos_token_id=ends), images)[0] == want
    finally:
        handle.remove()
    assert asked == [sum(length > step for length in lengths) for step in range(max(lengths))]


@pytest.mark.parametrize("model", ["llama", "qwen"], indirect=True)
def test_the_logits_of_first_tokens_are_those_of_the_forward(model):
    images = pictures(model)
    _, first = together(model, greedy(1), images)
    with torch.no_grad():
        for (picture, words), logits in zip(QUESTIONS, first, strict=True):
            want = model(torch.tensor([BEGINNING + words]), images=images[[picture]]).logits[0, -1]
            torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_length", [3, 5, 40, 70])
@pytest.mark.parametrize("model", ["llama", "qwen"], indirect=True)
def test_rows_are_cut_as_by_the_splice(model, max_length, monkeypatch):
    """In front of the picture, inside it, and inside the long question."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(model.config, "tokenizer_model_max_length", max_length, raising=False)
    images = pictures(model)
    want = alone(model, greedy(4), images)
    assert len(stream_of(model)["position_ids"].unique()) <= max_length
    assert together(model, greedy(4), images)[0] == want


def test_recorded_answers_with_the_end_token(golden):
    """The original program's, of which two end by themselves."""
    _, model, image_processor, _ = load_pretrained_model(str(golden / "tiny-llava-original"), None)
    recorded = json.loads((golden / "forward" / "forward_HADPO_tf4.31.0.json").read_text())
    first, second = recorded["eos_variant_swapped_lm_head_rows"]
    with torch.no_grad():
        model.lm_head.weight[[first, second]] = model.lm_head.weight[[second, first]]
    asked = [q for q in recorded["generation_eos_variant"] if q["image"]]
    files = [Image.open(golden / "images" / q["image"]) for q in asked]
    rows = [
        [(IMAGE_TOKEN_INDEX, number) if i == IMAGE_TOKEN_INDEX else i for i in q["input_ids"]]
        for number, q in enumerate(asked)
    ]
    stream = pack_prompts(rows, model.get_vision_tower().num_features, 2048)
    found = rules(model, GenerationConfig(do_sample=False, max_new_tokens=24), None)
    shown = model.look(process_images(files, image_processor, model.config))
    answers, _ = grow_answers(model, stream, shown, found)
    assert answers == [q["output_ids"] for q in asked]
    assert sorted(len(ids) for ids in answers) == [4, 8, 24, 24, 24]


def test_a_stop_string_ends_an_answer(loaded, monkeypatch):
    """As transformers finds it: also inside a token, and across two."""
    tokenizer, model, _ = loaded
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    images = pictures(model)
    free = alone(model, greedy(24), images)
    stop = tokenizer.decode(free[0][3:5])[1:]
    settings = greedy(24, stop_strings=[stop])
    want = [
        model.generate(
            torch.tensor([BEGINNING + words]),
            images=images[[picture]],
            generation_config=GenerationConfig(**settings),
            tokenizer=tokenizer,
        )[0].tolist()
        for picture, words in QUESTIONS
    ]
    assert len(want[0]) == 5 and max(map(len, want)) == 24
    found = rules(model, GenerationConfig(**settings), tokenizer)
    assert grow_answers(model, stream_of(model), model.look(images), found)[0] == want


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}])
@pytest.mark.filterwarnings("ignore:Passing")
def test_what_the_checkpoints_generation_config_sets_is_obeyed(qwen, monkeypatch, setting):
    """Qwen's checkpoints come with a repetition penalty, which greedy answers obey too."""
    monkeypatch.setattr(qwen.generation_config, "eos_token_id", None)
    images = pictures(qwen)
    without = alone(qwen, greedy(24), images)
    for key, value in setting.items():
        monkeypatch.setattr(qwen.generation_config, key, value)
    want = alone(qwen, greedy(24), images)
    assert want != without
    assert together(qwen, greedy(24), images)[0] == want


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"min_new_tokens": 3}, "MinNewTokensLength"),
        ({"max_time": 1.0}, "max_time"),
    ],
)
def test_other_ways_of_generating_are_left_to_transformers(qwen, monkeypatch, setting, reason):
    for key, value in setting.items():
        monkeypatch.setattr(qwen.generation_config, key, value)
    assert reason in rules(qwen, GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=2), None)


def test_models_that_cannot_compute_trees_are_left_to_transformers(qwen, monkeypatch):
    settings = GenerationConfig(**greedy(4))
    monkeypatch.setattr(qwen.model.rotary_emb, "rope_type", "dynamic")
    assert "positions" in rules(qwen, settings, None)
    monkeypatch.setattr(qwen.config, "_attn_implementation", "eager")
    assert "eager" in rules(qwen, settings, None)


def test_ids_outside_the_vocabulary_are_an_error(loaded):
    with pytest.raises(UserError, match=r"token id 2000 at position \d+ is outside the model's vocabulary of 2000"):
        together(loaded[1], greedy(1), pictures(loaded[1]), [(0, [2000])])


def test_heads_that_share_a_key_head_see_what_each_would():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 6, 8, generator=generator)
    k, v = torch.randn(2, 2, 11, 8, generator=generator)
    mask = torch.rand(3, 11, generator=generator) > 0.4
    for row in range(3):
        for head in range(6):
            keys, values = k[head // 3][mask[row]], v[head // 3][mask[row]]
            want = (q[row, head] @ keys.T / 8**0.5).softmax(-1) @ values
            torch.testing.assert_close(look_back(q, k, v, mask)[row, head], want, atol=1e-6, rtol=0)
