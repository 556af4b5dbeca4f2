"""The whole path on a Qwen2-type language model: build, train, tune, ask."""

from __future__ import annotations

import json

import pytest
import torch

from llava.model.builder import load_pretrained_model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny Qwen1.5: grouped-query attention, biases, no bos, ChatML tokens, byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a man riding a bicycle on a street, system user assistant"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=fast.convert_tokens_to_ids("<|endoftext|>"),
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_build_train_tune_and_ask(run_script, qwen, golden, tmp_path, pope_world):
    common = ["--version", "qwen", "--report_to", "none", "--save_strategy", "no", "--dataloader_num_workers", 0]
    common += ["--model_max_length", 1024, "--max_steps", 3, "--learning_rate", 1e-3]
    first = tmp_path / "llava-qwen"
    code, out, err = run_script(
        "train_pretrain",
        *common,
        *("--model_name_or_path", qwen, "--vision_tower", golden / "tiny-clip", "--mm_projector_type", "mlp2x_gelu"),
        *("--mm_vision_select_layer", -2, "--data_path", golden / "pretrain_data.json"),
        *("--image_folder", golden / "mini_vg", "--train_type", "freeze_vision", "--output_dir", first),
    )
    assert code == 0, err
    config = json.loads((first / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava_qwen2", ["LlavaQwen2ForCausalLM"])

    tuned = tmp_path / "tuned"
    code, out, err = run_script(
        "train_dpo",
        *common,
        *("--model_name_or_path", first, "--lora_enable", True, "--vg_path", golden / "mini_vg"),
        *("--pope_data_path", golden / "hadpo_data" / "pope_data.json", "--output_dir", tuned),
    )
    assert code == 0, err
    log = json.loads((tuned / "trainer_state.json").read_text())["log_history"][0]
    assert log["loss"] == pytest.approx(0.693147, abs=1e-5)

    tokenizer, model, _, _ = load_pretrained_model(str(tuned), str(first))
    assert type(model).__name__ == "LlavaQwen2ForCausalLM"
    assert tokenizer.pad_token == "<|endoftext|>"
    code, out, err = run_script(
        "pope_eval",
        *("--coco_path", pope_world / "coco", "--pope_path", pope_world / "pope", "--set", "random"),
        *("--model-path", tuned, "--model-base", first, "--conv-mode", "qwen", "--max_new_tokens", 2),
    )
    assert code == 0, err
    assert "| tuned | random |" in out
    assert len((tuned / "pope" / "pope_random.jsonl").read_text().splitlines()) == 360
