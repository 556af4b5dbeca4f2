"""4 and 8 bits: which layers, what they compute, what trains beside them, and what is left on disk."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import logs_of, losses_of, succeed
from test_decoder import Lora, check_gradients, packed, pairs, run  # noqa: F401
from test_model import inputs_of
from test_pope_eval import flags as pope_flags
from test_pope_eval import lines_of

from llava.errors import UserError
from llava.model.builder import load_pretrained_model
from llava.model.quantization import check_backend, quantized_layers
from llava.train.arguments import DPOTrainingArguments, ModelArguments, PreferenceArguments
from llava.train.parsing import parse
from llava.train.trainable import add_lora, switch_on

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]

# Relative errors, of normal weights and of the logits that they give.
WEIGHT_ERROR = {4: (0.08, 0.1), 8: (3e-3, 1e-2)}
LOGIT_ERROR = {4: (0.05, 0.3), 8: (3e-3, 0.03)}

DOWN_STAYS = (
    "note: down_proj: not quantized: on the CPU bitsandbytes computes 4-bit rows wrongly whose length is no multiple "
    "of 64\n"
)

LORA = ["--lora_enable", True, "--lora_r", 8]


def load(folder, bits=None, base=None):
    """A model on the CPU."""
    how = {f"load_{bits}bit": True} if bits else {}
    return load_pretrained_model(str(folder), base and str(base), device="cpu", **how)[1]


def weight_of(layer):
    """What a quantized layer multiplies with, (out, in) float32."""
    from bitsandbytes.functional import dequantize_4bit

    if hasattr(layer.weight, "quant_state"):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.float() * scale[:, None] / 127


def with_weights_of(plain, quantized):
    """A plain model that computes what ``quantized`` should."""
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for name, layer in quantized_layers(quantized).items():
            plain.get_submodule(name).weight.copy_(weight_of(layer))
    return plain


@pytest.fixture(scope="module", params=[4, 8])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(golden, bits):
    """The recorded model in 4 or 8 bits; tests must not change it."""
    return load(golden / "tiny-llava-original", bits)


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "forward" / "forward_HADPO_tf4.31.0.npz")


def test_the_decoders_linear_layers_are_quantized_and_nothing_else(quantized, loaded, bits):
    layers = quantized_layers(quantized)
    # Rows of 176 weights: wrong on the CPU in 4 bits.
    wanted = [name for name in LINEARS if (bits, name) != (4, "mlp.down_proj")]
    assert layers.keys() == {f"model.layers.{i}.{name}" for i in range(2) for name in wanted}
    others = {name: p for name, p in loaded[1].named_parameters() if name.removesuffix(".weight") not in layers}
    kept = dict(quantized.named_parameters())
    assert others and all(torch.equal(kept[name], value) for name, value in others.items())
    assert all(kept[f"{name}.weight"].dtype in (torch.uint8, torch.int8) for name in layers)


def test_logits_are_those_of_the_rounded_weights(quantized, loaded, recorded, bits):
    batch = inputs_of(recorded, "b3_with_text_only")
    with torch.no_grad():
        logits = quantized(**batch).logits
        by_hand = with_weights_of(loaded[1], quantized)(**batch).logits
    torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=0)
    original = torch.tensor(recorded["b3_with_text_only|logits|every16th_vocab"])
    least, most = LOGIT_ERROR[bits]
    assert least < (logits[..., ::16] - original).norm() / original.norm() < most


def test_training_through_rounded_weights(golden, bits, loaded, pairs):  # noqa: F811
    """Also after an evaluation, for which bitsandbytes has other kernels, and with gradient checkpointing."""
    model = load(golden / "tiny-llava-original", bits)
    models = [model, with_weights_of(loaded[1], model)]
    weights = torch.randn(16, generator=torch.Generator().manual_seed(1))
    trees, results = packed(pairs, model), []
    for one in models:
        one = add_lora(one, Lora)
        for name, parameter in one.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(len(name))
                torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        switch_on(one, {"lora", "projector"})
        with torch.no_grad():
            before = one.eval()(**trees).scores.logps
        results.append(run(one.train(), trees, weights))
        torch.testing.assert_close(one(**trees).scores.logps, before)
        one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        again = run(one, trees, weights)
        torch.testing.assert_close(again[0], results[-1][0])
        check_gradients(again[2], results[-1][2])
    (rows, means, gradients), (rows_by_hand, means_by_hand, gradients_by_hand) = results
    torch.testing.assert_close(rows, rows_by_hand, atol=1e-3, rtol=0)  # sums of some 30 labels
    torch.testing.assert_close(means, means_by_hand, atol=1e-4, rtol=0)
    check_gradients(gradients, gradients_by_hand)


def test_a_lora_is_folded_in_before_anything_is_rounded(golden, bits):
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    lora, base = golden / "tiny-llava-lora", golden / "tiny-llava-original"
    folded = load(lora, None, base)
    for name, layer in quantized_layers(load(lora, bits, base)).items():
        weight = folded.get_submodule(name).weight.detach()
        if bits == 4:
            rounded, _ = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        else:
            rounded, *_ = int8_vectorwise_quant(weight.half())
        assert torch.equal(layer.weight.data, rounded), name


def test_a_run_on_a_quantized_model(run_script, dpo_flags, tmp_path, golden, bits):
    folder, cache = tmp_path / "out", tmp_path / "logps.jsonl"
    flags = [*dpo_flags, *LORA, "--gradient_checkpointing", True, "--output_dir", folder]
    code, out, err = run_script("train_dpo", *flags, "--bits", bits)
    assert code == 0, err
    notes = [line for line in err.splitlines(keepends=True) if not line.startswith("rank 0 ")]
    assert notes == ([] if bits == 8 else [DOWN_STAYS])
    losses = losses_of(folder)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0]
    assert "| backbone | 228,672 | 0 | frozen |" in out
    assert json.loads((folder / "run.json").read_text())["arguments"]["bits"] == bits
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "delta.json").read_text())["base"][0]["path"] == str(golden / "tiny-llava-original")

    # It stands on the full-size model, whichever way that is loaded.
    full, least, most = load(folder), *WEIGHT_ERROR[bits]
    for name, layer in quantized_layers(load(folder, bits)).items():
        weight = full.get_submodule(name).weight
        error = (weight_of(layer) - weight).norm() / weight.norm()
        assert least < error < most

    # Whatever the reference is, and wherever the numbers come from, they are the same.
    for reference in ("copy", "cache"):
        more = ["--bits", bits, "--reference", reference, "--output_dir", tmp_path / reference]
        more += ["--reference_cache", cache] if reference == "cache" else []
        succeed(run_script("train_dpo", *flags, *more))
        assert losses_of(tmp_path / reference) == pytest.approx(losses, abs=1e-5)
    flags += ["--reference", "cache", "--reference_cache", cache, "--bits", 12 - bits]
    code, _, err = run_script("train_dpo", *flags)
    assert code == 2 and "made with another reference" in err and f"{bits} bits" in err


def test_parts_train_without_a_lora_and_go_on_where_they_were(run_script, dpo_flags, tmp_path):
    flags = [*dpo_flags, "--tune", "projector,lm_head", "--bits", 4, "--quant_type", "fp4", "--double_quant", False]
    flags += ["--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 9]
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "whole"))
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "parts"))
    for step in (2, 3):
        (tmp_path / "parts" / f"checkpoint-{step}").rename(tmp_path / f"gone-{step}")
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "parts"))
    assert logs_of(tmp_path / "parts")[1]["loss"] == pytest.approx(logs_of(tmp_path / "whole")[1]["loss"], abs=1e-6)


def test_questions_are_answered(run_script, pope_world, golden, tmp_path, bits):
    out = succeed(run_script("pope_eval", *pope_flags(pope_world, golden, tmp_path / "out"), f"--load-{bits}bit"))
    questions = lines_of(pope_world / "pope" / "coco_pope_popular.json")
    assert len(lines_of(tmp_path / "out" / "pope_popular.jsonl")) == len(questions)
    assert "popular" in out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--bits", 3, *LORA], ["--bits 3", "expected 16, 8 or 4"]),
        (["--bits", 4, "--quant_type", "int4", *LORA], ["--quant_type int4", "nf4 or fp4"]),
        (["--bits", 4], ["--bits 4: backbone would train", "--lora_enable True"]),
        (["--bits", 8, "--tune", "lora,vision_tower"], ["--bits 8: vision_tower would train", "--tune"]),
    ],
)
def test_what_cannot_be_quantized(run_script, dpo_flags, tmp_path, flags, parts):
    code, _, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", "out")
    assert code == 2 and err.count("\n") == 1 and all(part in err for part in parts), err
    assert not (tmp_path / "out").exists()


def parsed(*flags):
    return parse((ModelArguments, PreferenceArguments, DPOTrainingArguments), list(map(str, flags)))


def test_zero_3_does_not_partition_what_is_quantized(dpo_flags, tmp_path):
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(UserError, match=r"--bits 4: ZeRO-3 .* use zero_configs/zero2.json"):
        parsed(*dpo_flags, *LORA, "--bits", 4, "--deepspeed", tmp_path / "zero3.json")


def test_flags_of_4_bits_have_nothing_to_do_elsewhere(dpo_flags, capsys):
    for bits in (16, 8, 4):
        parsed(*dpo_flags, *LORA, "--bits", bits, "--double_quant", False, "--quant_type", "fp4")
        notes = capsys.readouterr().err
        for flag in ("double_quant", "quant_type"):
            assert (f"--{flag} has nothing to do here: --bits is {bits}" in notes) is (bits != 4)


def test_without_the_package(run_script, dpo_flags, pope_world, golden, tmp_path, monkeypatch, bits):
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda *_: False)
    for result in (
        run_script("train_dpo", *dpo_flags, *LORA, "--bits", bits, "--output_dir", "out"),
        run_script("pope_eval", *pope_flags(pope_world, golden, "out"), f"--load-{bits}bit"),
    ):
        assert result[0] == 2 and f"{bits}" in result[2] and "pip install bitsandbytes" in result[2], result[2]
        said = [line for line in result[2].splitlines() if not line.startswith("rank 0 ")]
        assert len(said) == 1 and not list(tmp_path.rglob("*.json*"))


def test_weights_that_are_quantized_on_disk(golden, tmp_path, pretrain_flags, run_script, bits):
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}}
    folders = {name: tmp_path / name for name in ("tiny-vicuna", "tiny-llava-original", "tiny-llava-lora")}
    for name, folder in folders.items():
        shutil.copytree(golden / name, folder)
        config = json.loads((golden / name / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **quantized}))
    flags = [*pretrain_flags, "--output_dir", "out", "--model_name_or_path", folders["tiny-vicuna"]]
    code, _, err = run_script("train_pretrain", *flags)
    assert code == 2 and "quantized (bitsandbytes)" in err and str(folders["tiny-vicuna"]) in err
    with pytest.raises(UserError, match="expected float16, bfloat16 or float32"):
        load(folders["tiny-llava-original"])
    # What upstream's QLoRA leaves: a LoRA of full size whose config.json says how its base was loaded.
    states = [
        load(folder, None, golden / "tiny-llava-original").state_dict()
        for folder in (folders["tiny-llava-lora"], golden / "tiny-llava-lora")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_one_size_at_a_time(golden):
    with pytest.raises(UserError, match="--load-8bit and --load-4bit: pass one of them"):
        load_pretrained_model(str(golden / "tiny-llava-original"), None, load_8bit=True, load_4bit=True)


def test_devices_that_bitsandbytes_cannot_use(monkeypatch):
    from bitsandbytes.cextension import BNBNativeLibrary

    check_backend("--bits 8", 8, "cpu")
    with pytest.raises(UserError, match=r"--load-4bit: bitsandbytes has nothing for a device 'meta'; expected .*cpu"):
        check_backend("--load-4bit", 4, "meta")
    monkeypatch.setattr(BNBNativeLibrary, "compiled_with_cuda", False)
    with pytest.raises(UserError, match="no library for torch's CUDA"):
        check_backend("--bits 4", 4, "cuda")
    monkeypatch.setattr(BNBNativeLibrary, "compiled_with_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P40")
    check_backend("--bits 4", 4, "cuda")
    with pytest.raises(UserError, match=r"Tesla P40\) has compute capability 6.1.*8 bits need 7.5; 4 bits need 6.0"):
        check_backend("--bits 8", 8, "cuda")


@pytest.mark.slow
def test_under_zero2_on_two_processes(dpo_flags, tmp_path, golden):
    """Every pair in one step, so that it does not matter who has which; one process in all says what to expect."""
    from test_launch import launch

    flags = [*dpo_flags, *LORA, "--bits", 4, "--num_train_epochs", 3]
    launch(
        sys.executable, "train_dpo.py", *flags, "--per_device_train_batch_size", 12, "--output_dir", tmp_path / "one"
    )
    flags += ["--per_device_train_batch_size", 6, "--deepspeed", "zero_configs/zero2.json"]
    launch(
        "deepspeed", "--num_gpus", 2, "--master_port", 29891, "train_dpo.py", *flags, "--output_dir", tmp_path / "two"
    )
    one, two = (losses_of(tmp_path / name) for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4) and one[0] - one[-1] > 0.01
    assert "DeepSpeedEngine" in json.loads((tmp_path / "two" / "run.json").read_text())["engine"]["model"]
    load(tmp_path / "two", 4)
