"""Old launch lines, the four train types to the last tensor, and the template that nobody named."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import logs_of, succeed

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import read_adapter

# A run that a laptop finishes; what upstream's lines say besides is passed as they say it.
SMALL = ("--max_steps", 2, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1)
SMALL = (*SMALL, "--report_to", "none")


@pytest.fixture(scope="module")
def blank(tmp_path_factory, golden):
    """The recorded language model and tower, put together by ``llava.model.build``."""
    import sys

    from llava.model import build

    out = tmp_path_factory.mktemp("blank") / "llava"
    flags = ["--llm", golden / "tiny-vicuna", "--vision_tower", golden / "tiny-clip", "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["build", *map(str, flags)])
        build.main()
    return out


@pytest.fixture
def data(golden):
    return ("--data_path", golden / "pretrain_data.json", "--image_folder", golden / "mini_vg")


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("train_type", ["projector", "use_lora", "none", "freeze_vision"])
def test_exactly_these_tensors_change(run_script, golden, blank, data, tmp_path, train_type):
    before = tensors(load_pretrained_model(str(blank), None)[1])
    out = tmp_path / "out"
    flags = [*data, *SMALL, "--model_name_or_path", blank, "--train_type", train_type, "--output_dir", out]
    flags += ["--learning_rate", 1e-2, "--model_max_length", 1024, "--save_strategy", "no", "--caption_steps", 0]
    flags += ["--lora_r", 4, "--lora_alpha", 8] if train_type == "use_lora" else []
    succeed(run_script("train_pretrain", *flags))

    connector = {f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    tower = {name for name in before if ".vision_tower." in name}
    decoder = {name for name in before if name.startswith("model.layers.")} | {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert connector | tower | decoder == before.keys()
    # Features come from the last layer but one: the last and the norm behind it never run, nor is there a position id
    # to learn. A key's bias moves no softmax: its gradient is zero but for rounding.
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in tower if ".layers." in name}
    marks = (f".layers.{max(layers)}.", "post_layernorm", "position_ids")
    idle = {name for name in tower if any(mark in name for mark in marks)}
    either_way = {name for name in tower if name.endswith("k_proj.bias")}
    expected = {
        "projector": connector,
        "use_lora": connector,
        "freeze_vision": connector | decoder,
        "none": connector | decoder | (tower - idle),
    }[train_type]
    if train_type == "use_lora":
        # PEFT's files: what is beside the base. The base itself is not written, and its file is as it was.
        lora, beside = read_adapter(out)
        linear = {f"{n.removesuffix('.weight')}" for n in decoder if n.endswith("_proj.weight")}
        assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in lora} == linear
        assert all(bool(value.any()) for name, value in lora.items() if ".lora_B." in name)
        assert set(beside) == connector
        found = {name for name, value in beside.items() if not torch.equal(value, before[name])}
        assert not any("vision_tower" in name or "mm_projector" in name or "lm_head" in name for name in lora)
    else:
        found = changed(before, tensors(load_pretrained_model(str(out), None)[1]))
    assert found - either_way == expected - either_way
    if train_type != "none":
        assert not found & tower


def test_zero_nlps_launch_line(run_script, golden, qwen, tmp_path, monkeypatch):
    """``run_zero2.sh``: a folder of data, its DeepSpeed file, no template named, LoRA of rank 64."""
    folder = tmp_path / "LLaVA-CC3M-Pretrain-595K"
    (folder / "images_dl").mkdir(parents=True)
    records = json.loads((golden / "pretrain_data.json").read_text())
    with_picture = [record for record in records if isinstance(record.get("image"), str)][:4]
    for record in with_picture:
        source = golden / "mini_vg" / record["image"]
        record["image"] = source.name
        shutil.copy(source, folder / "images_dl" / source.name)
    (folder / "chat.json").write_text(json.dumps(with_picture))
    (folder / "metadata.json").write_text("[]")
    blank = tmp_path / "model001"
    import sys

    from llava.model import build

    monkeypatch.setattr(
        sys, "argv", ["b", "--llm", str(qwen), "--vision_tower", str(golden / "tiny-clip"), "--out", str(blank)]
    )
    build.main()
    out = tmp_path / "output_model_user_lora"
    line = f"""--model_name_or_path {blank} --train_type use_lora --data_path {folder} --remove_unused_columns false
        --bf16 false --fp16 false --dataloader_pin_memory True --dataloader_num_workers 0
        --dataloader_persistent_workers True --output_dir {out} --num_train_epochs 1 --per_device_train_batch_size 4
        --per_device_eval_batch_size 1 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy epoch
        --save_total_limit 3 --report_to tensorboard --learning_rate 4e-4 --logging_steps 10"""
    code, out_text, err = run_script("train_pretrain", *line.split())
    assert code == 0, err
    assert f"its pictures from {folder / 'images_dl'}" in err
    assert ", in template qwen" in out_text
    assert "LoRA: r 64, alpha 16, scale 0.25, on the decoder's down_proj, gate_proj, k_proj" in out_text
    card = json.loads((out / "run.json").read_text())
    assert card["arguments"]["version"] == "qwen"
    assert (out / "adapter_config.json").is_file()
    tokenizer, model, _, _ = load_pretrained_model(str(out), None)
    assert tokenizer.decode(model.generation_config.eos_token_id) == "<|im_end|>"


def test_warm_up_and_cosine_at_every_parts_rate(run_script, blank, data, tmp_path):
    out = tmp_path / "out"
    flags = [*data, "--model_name_or_path", blank, "--train_type", "freeze_vision", "--output_dir", out]
    flags += ["--max_steps", 10, "--warmup_ratio", 0.2, "--lr_scheduler_type", "cosine", "--learning_rate", 1e-4]
    flags += ["--mm_projector_lr", 1e-3, "--logging_steps", 1, "--per_device_train_batch_size", 1]
    flags += ["--gradient_accumulation_steps", 1, "--save_strategy", "no", "--caption_steps", 0, "--report_to", "none"]
    succeed(run_script("train_pretrain", *flags, "--model_max_length", 1024))
    logs = [log for log in logs_of(out) if "loss" in log]

    def share(step):  # of the peak, after `step` steps; transformers logs the rate of the step that comes
        return step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 8)) / 2

    for number, log in enumerate(logs):
        assert log["learning_rate/projector"] == pytest.approx(1e-3 * share(number + 1), abs=1e-12)
        assert log["learning_rate/backbone"] == pytest.approx(1e-4 * share(number + 1), abs=1e-12)


KEPT = [("v1", None), ("vicuna_v1", None), ("llava_v1", "llava_v1"), ("plain", None)]


@pytest.mark.parametrize(("version", "kept"), KEPT)
def test_a_model_remembers_how_it_talks(run_script, golden, data, tmp_path, version, kept):
    out = tmp_path / "out"
    flags = [*SMALL, "--model_name_or_path", golden / "tiny-llava-original", "--train_type", "projector"]
    flags += ["--output_dir", out, "--version", version, "--save_strategy", "no", "--caption_steps", 0]
    if version == "plain":
        records = json.loads((golden / "pretrain_data.json").read_text())
        plain = [r for r in records if isinstance(r.get("image"), str) and len(r["conversations"]) == 2]
        (tmp_path / "plain.json").write_text(json.dumps(plain))
        data = ("--data_path", tmp_path / "plain.json", *data[2:])
    succeed(run_script("train_pretrain", *data, *flags, "--model_max_length", 1024))
    assert json.loads((out / "config.json").read_text()).get("mm_conv_mode") == kept


def test_a_folder_with_two_files_is_refused(run_script, tmp_path, golden):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    flags = ["--model_name_or_path", golden / "tiny-llava-original", "--data_path", tmp_path]
    code, _, err = run_script("train_pretrain", *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and "expected a file, or a folder with chat.json or one .json; found a.json, b.json" in err
