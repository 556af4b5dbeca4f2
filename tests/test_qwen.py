"""The whole path on a Qwen2-type language model: build, train, tune, ask."""

from __future__ import annotations

import json

import pytest

from llava.model.builder import load_pretrained_model


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
