"""Whatever trains, and whatever it is compared with, DDP and the four kinds of ZeRO compute what one process does."""

from __future__ import annotations

import json

import forked
import pytest
import torch
from conftest import GOLDEN, ROOT, logs_of
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model

BASE = GOLDEN / "tiny-llava-original"

# The file in zero_configs, and the classes that must really have run.
ENGINES = {
    None: (None, "", "AdamW"),  # one process
    "ddp": (None, "DistributedDataParallel", "AdamW"),
    "zero2": ("zero2", "DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
    "zero2_offload": ("zero2_offload", "DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
    "zero3": ("zero3", "DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"),
    "zero3_offload": ("zero3_offload", "DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"),
}
SEVERAL = [name for name in ENGINES if name]

COMMON = (
    *("--model_max_length", 2048, "--learning_rate", 1e-3, "--warmup_steps", 0, "--lr_scheduler_type", "cosine"),
    *("--logging_steps", 1, "--save_strategy", "no", "--report_to", "none", "--gradient_checkpointing", False),
)
DATA = {
    "train_dpo": (
        *("--vg_path", GOLDEN / "mini_vg", "--desc_data_path", GOLDEN / "hadpo_data" / "desc_data.json"),
        *("--pope_data_path", GOLDEN / "hadpo_data" / "pope_data.json", "--beta", 0.1),
    ),
    "train_pretrain": (
        *("--data_path", GOLDEN / "pretrain_data.json", "--image_folder", GOLDEN / "mini_vg", "--version", "plain"),
    ),
}
LORA = ("--lora_r", 8, "--lora_alpha", 16)


def train(script, flags, folder, engine=None, batch=1, on=BASE):
    """A run with four rows a step: alone, or on two processes under ``engine``, which must be what really ran."""
    config, model, optimizer = ENGINES[engine]
    size = 2 if engine else 1
    flags = [*COMMON, *DATA[script], *flags, "--model_name_or_path", on, "--output_dir", folder]
    flags += ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", 4 // batch // size]
    flags += ["--deepspeed", ROOT / "zero_configs" / f"{config}.json"] if config else []
    run = forked.run(script, flags, world_size=size)
    assert run.codes == [0] * size, run.text
    ran = json.loads((folder / "run.json").read_text())["engine"]
    assert ran["model"].endswith(f".{model}" if model else "ForCausalLM")
    assert ran["optimizer"].endswith(f".{optimizer}")
    return folder


def losses(folder):
    return [log for log in logs_of(folder) if "loss" in log]


def weights(folder):
    """Of the whole model, as the loader gives it."""
    return load_pretrained_model(str(folder), None)[1].state_dict()


def furthest(got, want):
    return max((got[name] - want[name]).abs().max().item() for name in want)


def check_same(folder, alone, steps):
    """Metrics of every step, and the whole model, within 1e-4 of the run on one process."""
    mine, theirs = losses(folder), losses(alone)
    assert len(mine) == len(theirs) == steps
    keys = [key for key in theirs[0] if key not in ("epoch", "step")]
    for a, b in zip(mine, theirs, strict=True):
        # The log-probabilities are sums over an answer's tokens, some hundreds.
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=1e-4, abs=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    got, want = weights(folder), weights(alone)
    assert got.keys() == want.keys()
    assert furthest(got, want) < 1e-4


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """``alone(script, flags, ...)``: the folder of that run on one process, which is made once."""
    made = {}

    def run(script, flags, **how):
        key = (script, *flags, *sorted(how.items()))
        if key not in made:
            made[key] = train(script, flags, tmp_path_factory.mktemp("alone") / "out", **how)
        return made[key]

    return run


TEN_STEPS = ("--lora_enable", True, *LORA, "--max_steps", 10)


@pytest.mark.parametrize("engine", SEVERAL)
def test_ten_steps_of_dpo_on_two_processes_are_those_on_one(alone, tmp_path, engine):
    one = alone("train_dpo", TEN_STEPS, batch=4)
    folder = train("train_dpo", TEN_STEPS, tmp_path / "out", engine, batch=2)
    check_same(folder, one, steps=10)
    got, want = (load_file(run / "adapter_model.safetensors") for run in (folder, one))
    assert got.keys() == want.keys()
    assert furthest(got, want) < 1e-4
    assert furthest(want, {name: torch.zeros(()) for name in want}) > 1e-3


TRAINED = {
    "lora": ("--lora_enable", True, *LORA),  # and the connector
    "connector": ("--tune", "projector"),
    "head": ("--tune", "lm_head"),
    "block": ("--tune", "post_block", "--post_block", "interaction", "--post_block_lr", 1e-3),
    "full": (),
}
REFERENCES = {
    "auto": (),
    "cache": ("--reference", "cache"),
    "copy": ("--reference", "copy"),
    "base": ("--reference_from", "base"),
}


def thinned():
    """Every engine with the usual reference; the other references under ZeRO-3, and under one more in turn."""
    others = [name for name in SEVERAL if name != "zero3"]
    for i, what in enumerate(TRAINED):
        for j, reference in enumerate(REFERENCES):
            chosen = SEVERAL if reference == "auto" else ["zero3", others[(i + j) % len(others)]]
            yield from ((what, reference, engine) for engine in chosen)


@pytest.fixture(scope="module")
def stage(alone):
    """A connector that was trained: a delta, so that what it stands on is another model."""
    return alone("train_dpo", ("--tune", "projector", "--max_steps", 2, "--learning_rate", 1e-2))


@pytest.mark.slow
@pytest.mark.parametrize(("what", "reference", "engine"), thinned())
def test_dpo_of_any_part_with_any_reference(alone, stage, tmp_path, what, reference, engine):
    flags = (*TRAINED[what], *REFERENCES[reference], "--num_train_epochs", 1)
    on = stage if reference == "base" else BASE
    one = alone("train_dpo", flags, on=on)
    check_same(train("train_dpo", flags, tmp_path / "out", engine, on=on), one, steps=3)
    before, after = weights(on), weights(one)
    new = {name for name in after if name not in before}
    assert bool(new) == (what == "block")
    assert new or furthest(after, before) > 1e-3


@pytest.mark.slow
def test_both_ranks_fill_the_caches_of_partitioned_weights(alone, tmp_path):
    """The reference's log-probabilities and the tower's features, where every parameter but the tower's trains."""
    one = alone("train_dpo", ("--num_train_epochs", 1))
    caches = ("--reference", "cache", "--reference_cache", tmp_path / "reference.jsonl")
    caches += ("--feature_cache", tmp_path / "features", "--num_train_epochs", 1)
    check_same(train("train_dpo", caches, tmp_path / "out", "zero3"), one, steps=3)
    assert len((tmp_path / "reference.jsonl").read_text().splitlines()) >= 1 + 8
    assert len(list((tmp_path / "features").glob("*/*.safetensors"))) == 8


SUPERVISED = {
    "new connector": ("--train_type", "projector", "--vision_tower", GOLDEN / "tiny-clip"),
    "lora": ("--train_type", "use_lora", *LORA, "--lora_dropout", 0),
    "all but the tower": ("--train_type", "freeze_vision"),
    "everything": ("--train_type", "none"),
    "head and block": ("--tune", "lm_head,post_block", "--post_block", "mlp"),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", SEVERAL)
@pytest.mark.parametrize("what", SUPERVISED)
def test_supervised_training_of_any_part(alone, tmp_path, what, engine):
    flags = (*SUPERVISED[what], "--num_train_epochs", 2)
    flags += ("--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", -2)
    on = GOLDEN / "tiny-vicuna" if what == "new connector" else BASE
    one = alone("train_pretrain", flags, on=on)
    check_same(train("train_pretrain", flags, tmp_path / "out", engine, on=on), one, steps=4)
    assert losses(one)[-1]["loss"] < losses(one)[0]["loss"] - 1e-3


@pytest.mark.parametrize("pictures", [1, 7])
def test_ranks_without_a_picture_and_ranks_with_one(tmp_path, pictures):
    """Text-only rows and pictures mixed under ZeRO-3: in some forwards one rank has no picture, in others neither has.

    Rows come one by one, so the one row of its kind is met beside one of the other kind, whatever the order.
    """
    records = json.loads((GOLDEN / "pretrain_data.json").read_text())
    for record in records:
        if "<image>" not in record["conversations"][0]["value"]:
            record["conversations"][0]["value"] += "\n<image>"
    for record in records[pictures:]:
        del record["image"]
        question = record["conversations"][0]
        question["value"] = question["value"].replace("<image>", "Which of these?").strip()
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    flags = ("--train_type", "none", "--version", "v1", "--data_path", tmp_path / "mixed.json")
    flags += ("--num_train_epochs", 2, "--seed", 3)
    one = train("train_pretrain", flags, tmp_path / "one")
    check_same(train("train_pretrain", flags, tmp_path / "two", "zero3"), one, steps=4)
    assert furthest(weights(one), weights(BASE)) > 1e-3
