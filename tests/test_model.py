"""The forward and the loaders against logits, features and answers recorded from the original programs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

BATCHES = ["b1_single", "b2_mixed_len", "b3_with_text_only", "b4_multiturn", "b5_image_mid", "plain8"]


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "forward" / "forward_HADPO_tf4.31.0.npz")


def inputs_of(recorded, batch):
    keys = ("input_ids", "labels", "attention_mask", "images")
    inputs = {k: torch.tensor(recorded[f"{batch}|{k}"]) for k in keys if f"{batch}|{k}" in recorded.files}
    inputs.setdefault("attention_mask", inputs["input_ids"] != 0)  # upstream's collator: padding is <unk>
    return inputs


def check_logits(recorded, prefix, logits):
    if prefix in recorded.files:
        torch.testing.assert_close(logits, torch.tensor(recorded[prefix]), atol=1e-4, rtol=0)
        return
    torch.testing.assert_close(
        logits[..., ::16], torch.tensor(recorded[f"{prefix}|every16th_vocab"]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(logits.logsumexp(-1), torch.tensor(recorded[f"{prefix}|logsumexp"]), atol=1e-4, rtol=0)
    assert (logits.argmax(-1).numpy() == recorded[f"{prefix}|argmax"]).mean() > 0.999


@pytest.mark.parametrize("folder", ["tiny-llava-original", "tiny-llava-original-with-tower"])
@pytest.mark.parametrize("batch", BATCHES)
def test_logits_loss_and_labels_are_upstreams(golden, recorded, loaded, batch, folder):
    model = loaded[1] if folder == "tiny-llava-original" else load_pretrained_model(str(golden / folder), None)[1]
    with torch.no_grad():
        out = model(**inputs_of(recorded, batch))
    check_logits(recorded, f"{batch}|logits", out.logits)
    assert out.loss.item() == pytest.approx(float(recorded[f"{batch}|loss"]), abs=1e-5)
    if f"{batch}|expanded_labels" in recorded.files:
        assert (out.labels.numpy() == recorded[f"{batch}|expanded_labels"]).all()


def test_rows_are_cut_behind_the_splice(golden, recorded):
    model = load_pretrained_model(str(golden / "tiny-llava-original"), None)[1]
    model.config.tokenizer_model_max_length = 80
    with torch.no_grad():
        out = model(**inputs_of(recorded, "b2_mixed_len"))
    check_logits(recorded, "b2_trunc80|logits", out.logits)
    assert out.loss.item() == pytest.approx(float(recorded["b2_trunc80|loss"]), abs=1e-5)


def test_the_seams_give_the_recorded_parts(recorded, loaded):
    model = loaded[1]
    batch = inputs_of(recorded, "b3_with_text_only")
    with torch.no_grad():
        features = model.encode_images(batch["images"])
        row = model.splice(
            batch["input_ids"],
            features,
            [[0], [1], [2]],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        )
        hidden = model.backbone(inputs_embeds=row.inputs_embeds, attention_mask=row.attention_mask).last_hidden_state
        logits = model.head(hidden)
    name = "b3_with_text_only"
    torch.testing.assert_close(row.inputs_embeds, torch.tensor(recorded[f"{name}|inputs_embeds"]), atol=1e-5, rtol=0)
    assert (row.attention_mask.numpy() == recorded[f"{name}|expanded_attention_mask"]).all()
    check_logits(recorded, f"{name}|logits", logits)
    tower = model.get_vision_tower()
    with torch.no_grad():
        seen = tower(torch.tensor(recorded["b1_single|images"]))
    torch.testing.assert_close(seen, torch.tensor(recorded["vision|a_wide_features_sel-2_patch"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layer", "row"), [(-1, 3), (-2, 2), (1, 1), (0, 0)])
def test_the_tower_gives_the_hidden_state_that_is_asked_for(recorded, loaded, layer, row):
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    tower = CLIPVisionTower(loaded[1].get_vision_tower().config, layer, "cls_patch")
    tower.load_state_dict(loaded[1].get_vision_tower().state_dict())
    seen = tower(torch.tensor(recorded["b1_single|images"]))
    torch.testing.assert_close(seen, torch.tensor(recorded["vision|a_wide_hidden_states"][row]), atol=1e-5, rtol=0)


def test_scores_of_labels_are_those_of_the_full_logits(recorded, loaded):
    model, batch = loaded[1], inputs_of(recorded, "b2_mixed_len")
    with torch.no_grad():
        full = model(**batch)
        few = model(**batch, score_labels=True)
    labelled = full.labels[:, 1:] != IGNORE_INDEX
    logits, targets = full.logits[:, :-1][labelled], full.labels[:, 1:][labelled]
    logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(few.scores.logps, logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(few.scores.mean_logits, logits.mean(-1), atol=1e-5, rtol=0)
    assert few.scores.rows.tolist() == labelled.nonzero()[:, 0].tolist()
    assert few.loss.item() == pytest.approx(full.loss.item(), abs=1e-5)


def test_pointing_to_pictures_equals_passing_them_in_order(recorded, loaded):
    model, batch = loaded[1], inputs_of(recorded, "b2_mixed_len")
    order = torch.tensor([[2], [0], [3], [1]])
    shuffled = batch["images"][[1, 3, 0, 2]]
    with torch.no_grad():
        want = model(**batch).logits
        got = model(**{**batch, "images": shuffled}, image_index=order).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_text_only_rows_may_bring_an_unused_picture_or_none(recorded, loaded):
    model, batch = loaded[1], inputs_of(recorded, "b3_with_text_only")
    assert (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(1).tolist() == [1, 0, 1]
    with torch.no_grad():
        with_blank = model(**batch).logits
        without = model(**{**batch, "images": batch["images"][[0, 2]]}).logits
    torch.testing.assert_close(without, with_blank, atol=1e-5, rtol=0)


def test_left_padding_changes_no_real_position(golden, recorded):
    model = load_pretrained_model(str(golden / "tiny-llava-original"), None)[1]
    batch = inputs_of(recorded, "b2_mixed_len")
    with torch.no_grad():
        right = model(**batch, position_ids=torch.zeros_like(batch["input_ids"]))
        model.config.tokenizer_padding_side = "left"
        left = model(**batch, position_ids=torch.zeros_like(batch["input_ids"]))
    real = torch.tensor(recorded["b2_mixed_len|expanded_attention_mask"])
    torch.testing.assert_close(left.logits[real.flip(1)], right.logits[real], atol=1e-5, rtol=0)
    assert left.loss.item() == pytest.approx(right.loss.item(), abs=1e-5)


def test_several_pictures_in_a_row_stand_where_their_marks_stand(recorded, loaded):
    model = loaded[1]
    images = torch.tensor(recorded["b2_mixed_len|images"])[:2]
    ids = torch.tensor([[1, 317, IMAGE_TOKEN_INDEX, 259, IMAGE_TOKEN_INDEX, 300]])
    with torch.no_grad():
        features = model.encode_images(images)
        row = model.splice(ids, features, [[0, 1]])
        words = model.get_input_embeddings()(torch.tensor([1, 317, 259, 300]))
    want = torch.cat([words[:2], features[0], words[2:3], features[1], words[3:]])
    torch.testing.assert_close(row.inputs_embeds[0], want)


@pytest.mark.parametrize(
    ("ids", "index"),
    [
        ([[1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX]], [[0]]),
        ([[1, IMAGE_TOKEN_INDEX, 5]], [[0, 1]]),
        ([[1, IMAGE_TOKEN_INDEX, 5]], [[-1]]),
        ([[1, 4, 5]], [[0, 1]]),
    ],
)
def test_marks_and_pictures_that_differ_are_an_error(recorded, loaded, ids, index):
    images = torch.tensor(recorded["b2_mixed_len|images"])[:2]
    with pytest.raises(UserError, match=r"row 0 of the batch: \d <image> in the text for \d image"):
        loaded[1](torch.tensor(ids), images=images, image_index=torch.tensor(index))


def test_marks_and_pictures_that_differ_are_an_error_in_upstreams_call_too(recorded, loaded):
    images = torch.tensor(recorded["b2_mixed_len|images"])
    with pytest.raises(UserError, match="4 image\\(s\\) for 2 <image> in the batch"):
        loaded[1](torch.tensor([[1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX]]), images=images)


@pytest.mark.parametrize("token", [2000, -7])
def test_ids_outside_the_vocabulary_are_an_error(recorded, loaded, token):
    images = torch.tensor(recorded["b1_single|images"])
    with pytest.raises(UserError, match=f"token id {token} at position 2 is outside the model's vocabulary of 2000"):
        loaded[1](torch.tensor([[1, IMAGE_TOKEN_INDEX, token]]), images=images)


def test_text_only_batches_give_the_connector_a_zero_gradient(golden, recorded):
    # Without it DDP and ZeRO-3 would wait for ranks whose batch has a picture.
    model = load_pretrained_model(str(golden / "tiny-llava-original"), None)[1].train()
    ids = torch.tensor([[1, 317, 259, 300]])
    images = torch.tensor(recorded["b1_single|images"])
    model(ids, labels=ids, images=images, image_index=torch.tensor([[-1]])).loss.backward()
    gradients = [p.grad for p in model.get_model().mm_projector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)


def questions(golden):
    return json.loads((golden / "forward" / "forward_HADPO_tf4.31.0.json").read_text())["generation"]


def answer(golden, model, image_processor, question):
    """Up to 24 new ids for a recorded question, with its picture where it has one."""
    images = None
    if question["image"]:
        images = process_images([Image.open(golden / "images" / question["image"])], image_processor, model.config)
    ids = torch.tensor([question["input_ids"]])
    return model.generate(ids, images=images, do_sample=False, max_new_tokens=24)[0].tolist()


def test_greedy_answers_are_upstreams(golden, loaded):
    tokenizer, model, image_processor = loaded
    for question in questions(golden):
        assert tokenizer_image_token(question["prompt"], tokenizer) == question["input_ids"]
        new = answer(golden, model, image_processor, question)
        assert new == question["output_ids"]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == question["decoded_strip"]


def test_a_left_padded_batch_answers_as_one_at_a_time(golden, loaded):
    _, model, image_processor = loaded
    asked = [q for q in questions(golden) if q["image"]]
    pictures = [Image.open(golden / "images" / q["image"]) for q in asked]
    rows = [torch.tensor(q["input_ids"]) for q in asked]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    new = model.generate(
        ids,
        images=process_images(pictures, image_processor, model.config),
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=24,
    )
    assert new.tolist() == [q["output_ids"] for q in asked]


def test_a_lora_is_loaded_and_merged_as_upstream_does(golden, recorded):
    _, model, _, _ = load_pretrained_model(
        str(golden / "tiny-llava-lora"), str(golden / "tiny-llava-original"), "llava_lora_model"
    )
    merged = np.load(golden / "forward" / "lora_merged_logits_HADPO_tf4.31.0.npz")
    with torch.no_grad():
        out = model(**inputs_of(recorded, "b2_mixed_len"))
    check_logits(merged, "logits_merged", out.logits)
    assert out.loss.item() == pytest.approx(float(merged["loss_merged"]), abs=1e-5)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_connector_is_loaded_over_its_language_model(golden, recorded):
    _, model, _, _ = load_pretrained_model(str(golden / "tiny-llava-pretrain"), str(golden / "tiny-vicuna"))
    wanted = np.load(golden / "forward" / "projector_only_logits_HADPO_tf4.31.0.npz")
    with torch.no_grad():
        out = model(**inputs_of(recorded, "plain8"))
    check_logits(wanted, "logits", out.logits)


def test_the_loader_gives_what_upstreams_gives(golden):
    tokenizer, model, image_processor, context_len = load_pretrained_model(
        model_path=str(golden / "tiny-llava-original"),
        model_base=None,
        model_name="llava-tiny",
        load_8bit=False,
        load_4bit=False,
        device_map="auto",
        device="cuda",
    )
    assert context_len == 2048
    assert type(image_processor).__name__ == "CLIPImageProcessorPil"
    assert not model.training
    assert model.dtype == (torch.float16 if torch.cuda.is_available() else torch.float32)
    assert model.config.model_type == "llava_llama"
    assert tokenizer.pad_token_id == 0


def test_answers_of_a_merged_lora_are_upstreams(golden):
    _, model, image_processor, _ = load_pretrained_model(
        str(golden / "tiny-llava-lora"), str(golden / "tiny-llava-original")
    )
    recorded = json.loads((golden / "forward" / "lora_generation_HADPO_tf4.31.0.json").read_text())
    assert recorded
    for question in recorded:
        assert answer(golden, model, image_processor, question) == question["output_ids"]


def test_the_end_token_ends_an_answer(golden):
    tokenizer, model, image_processor, _ = load_pretrained_model(str(golden / "tiny-llava-original"), None)
    recorded = json.loads((golden / "forward" / "forward_HADPO_tf4.31.0.json").read_text())
    first, second = recorded["eos_variant_swapped_lm_head_rows"]
    with torch.no_grad():
        model.lm_head.weight[[first, second]] = model.lm_head.weight[[second, first]]
    answers = [answer(golden, model, image_processor, q) for q in recorded["generation_eos_variant"]]
    assert answers == [q["output_ids"] for q in recorded["generation_eos_variant"]]
    assert any(new[-1] == tokenizer.eos_token_id for new in answers)
