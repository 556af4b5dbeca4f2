"""Bad input through the scripts' own command lines: exit code 2, one line that names what is wrong, and no weights.

Everything runs in this process (``run_script``), the training scripts over the recorded tiny checkpoints.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import sys

import pytest
import torch
from conftest import draw_picture

WEIGHTS = (".safetensors", ".bin", ".pt")


def written(path, content):
    """``content`` in a file: text as it is, anything else as JSON (JSON lines where the name says so)."""
    if not isinstance(content, str) and path.suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    elif not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def flags_of(settings):
    """``{"output_dir": "x"}`` -> ``["--output_dir", "x"]``; a flag of None is left out."""
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", value)]


# One step of one example on the CPU, nothing logged.
ONE_STEP = {
    "use_cpu": True,
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "report_to": "none",
}

PAIR = {"image": "a.png", "prompt": "Is there a dog?", "chosen": "No.", "rejected": "Yes."}
CAPTION = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "dog"}]}


@pytest.fixture
def pictures(tmp_path):
    """A folder with ``a.png``."""
    (tmp_path / "pictures").mkdir()
    draw_picture(tmp_path / "pictures" / "a.png", "a")
    return tmp_path / "pictures"


@pytest.fixture
def dpo(run_script, golden, tmp_path, pictures):
    """``dpo(records, **flags)``: train_dpo.py for one step on own pairs; a flag of None is left out."""

    def run(records=(PAIR,), **flags):
        settings = {
            "model_name_or_path": golden / "tiny-llava-original",
            "lora_enable": True,
            "lora_r": 2,
            "data_path": written(tmp_path / "pairs.jsonl", records),
            "image_folder": pictures,
            "output_dir": tmp_path / "out",
            **ONE_STEP,
        }
        return run_script("train_dpo", *flags_of({**settings, **flags}))

    return run


@pytest.fixture
def hadpo(dpo, golden):
    """``hadpo(**flags)``: train_dpo.py over HA-DPO's files, of which every flag can be replaced."""

    def run(**flags):
        settings = {"data_path": None, "image_folder": None, "vg_path": golden / "mini_vg", **flags}
        return dpo(**settings)

    return run


@pytest.fixture
def pretrain(run_script, golden, tmp_path, pictures):
    """``pretrain(records, **flags)``: train_pretrain.py for one step of a connector on the tiny language model."""

    def run(records=(CAPTION,), **flags):
        settings = {
            "model_name_or_path": golden / "tiny-vicuna",
            "vision_tower": golden / "tiny-clip",
            "version": "plain",
            "tune_mm_mlp_adapter": True,
            "data_path": written(tmp_path / "captions.json", list(records)),
            "image_folder": pictures,
            "output_dir": tmp_path / "out",
            **ONE_STEP,
        }
        return run_script("train_pretrain", *flags_of({**settings, **flags}))

    return run


@pytest.fixture(params=["dpo", "pretrain"])
def train(request):
    """Either training script."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def refused(tmp_path):
    """``refused(result, *parts)``: the run ended as bad input does, in one line that holds ``parts``; no weights."""

    def check(result, *parts):
        code, _, err = result
        assert code == 2, err
        assert "Traceback" not in err
        # Progress bars, of transformers copying weights and of POPE's questions; and the device.
        besides = ("note: ", "warning: ", "Loading weights: ", "POPE random: ", "rank 0 (local 0 on ")
        assert not any("error: " in line for line in err.splitlines() if line.startswith(besides)), err
        lines = [line for line in err.splitlines() if line and not line.startswith(besides)]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        for part in parts:
            assert str(part) in lines[0]
        assert [p for p in (tmp_path / "out").rglob("*") if p.suffix in WEIGHTS] == []

    return check


def finished(result):
    code, out, err = result
    assert code == 0, err
    assert "Traceback" not in err
    return out, err


# --- data files


def test_a_missing_data_file(train, refused):
    refused(train(data_path="gone.json"), "--data_path gone.json: no such file")


def test_no_data_file(pretrain, dpo, refused):
    refused(pretrain(data_path=None), "--data_path is missing")
    refused(dpo(data_path=None), "no preference data", "--data_path")


def test_a_folder_where_a_file_is_wanted(train, refused, pictures):
    refused(train(data_path=pictures), f"--data_path {pictures}: expected a file")


def test_broken_json_names_the_byte(dpo, pretrain, hadpo, refused, tmp_path):
    half = '[{"image": "猫.png", '
    byte = len(half.encode())
    refused(pretrain(data_path=written(tmp_path / "c.json", half)), "c.json: broken JSON", f"byte {byte}", "mend that")
    refused(dpo(data_path=written(tmp_path / "p.jsonl", "{}\n{")), "p.jsonl: broken JSON at line 2, byte 4")
    refused(hadpo(pope_data_path=written(tmp_path / "q.json", "[{]")), "q.json: broken JSON at line 1, byte 2")


@pytest.mark.parametrize("name", ["own.json", "own.jsonl"])
def test_an_empty_list(train, refused, tmp_path, name):
    refused(train(data_path=written(tmp_path / name, [])), f"{name}: holds no records; expected at least one")


@pytest.mark.parametrize("key", ["image", "prompt", "chosen", "rejected"])
def test_a_pair_without_a_key(dpo, refused, key):
    broken = {name: value for name, value in PAIR.items() if name != key}
    refused(dpo([PAIR, broken]), "pairs.jsonl: line 2", f"no key '{key}'")


def test_a_question_without_its_chosen_answer(hadpo, refused, tmp_path):
    question = {"image_id": 2315007, "question": "Is there a dog?", "reject": "Yes."}
    file = written(tmp_path / "pope_data.json", [question])
    refused(hadpo(pope_data_path=file), "pope_data.json: record 0", "no key 'chosen'", "image_id, question, reject")


def test_a_description_without_its_chosen_answers(hadpo, refused, tmp_path):
    file = written(tmp_path / "desc_data.json", {"2315000": {"rejected": ["A dog."]}})
    refused(hadpo(desc_data_path=file), "desc_data.json: image 2315000", "no key 'chosen'")


def test_an_image_id_that_visual_genome_has_not(hadpo, refused, tmp_path):
    file = written(tmp_path / "desc_data.json", {"77": {"chosen": ["A cat."], "rejected": ["A dog."]}})
    refused(hadpo(desc_data_path=file), "desc_data.json: image 77", "image_data.json", "--vg_path")


def test_hadpo_files_without_visual_genome(hadpo, refused, golden):
    file = golden / "hadpo_data" / "desc_data.json"
    refused(hadpo(desc_data_path=file, vg_path=None), "pass --vg_path")


def test_pairs_that_teach_nothing(dpo, refused):
    refused(
        dpo([PAIR, {**PAIR, "rejected": "No."}]), "pairs.jsonl: line 2", "'rejected'", "same text", "remove the record"
    )
    refused(dpo([PAIR, {**PAIR, "chosen": ""}]), "pairs.jsonl: line 2", "'chosen' is empty", "remove the record")


def test_captions_without_turns(pretrain, refused):
    refused(pretrain([CAPTION, {"image": "a.png"}]), "captions.json: record 1", "no key 'conversations'")


def test_captions_with_a_broken_turn_are_refused_before_the_weights_are_read(pretrain, refused, tmp_path):
    broken = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt"}]}
    refused(pretrain([*[CAPTION] * 3, broken]), "captions.json: record 3: turn 1", "no key 'value'")
    assert not (tmp_path / "out").exists()


def test_captions_whose_marks_and_pictures_differ(pretrain, refused):
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "ho"}]
    unmarked = {"image": ["a.png", "a.png"], "conversations": turns}
    refused(
        pretrain([unmarked], version="v1"), "captions.json: record 0", "1 <image>", "2 image(s)", "write one <image>"
    )


def test_labels_that_are_cut_away(dpo, refused):
    # The prompt alone has some 35 tokens, its picture stands for 16.
    refused(dpo(model_max_length=20), "pairs.jsonl: line 1 (chosen)", "cut to 20 tokens", "raise --model_max_length")


def test_ids_outside_the_vocabulary(train, refused, golden, tmp_path):
    model = shutil.copytree(golden / "tiny-llava-original", tmp_path / "model")
    shutil.copytree(golden / "tiny-clip", tmp_path / "tiny-clip")
    written(model / "added_tokens.json", {"<dog>": 2000})  # the embedding has rows 0 to 1999
    turns = [CAPTION["conversations"][0], {"from": "gpt", "value": "a <dog>"}]
    file = written(tmp_path / "data.json", [{**PAIR, "chosen": "No <dog>.", "conversations": turns}])
    result = train(data_path=file, model_name_or_path=model, vision_tower=None)
    refused(result, "data.json: record 0", "token id 2000 ('<dog>')", "vocabulary of 2000", "tokenizer")


# --- pictures


def test_missing_pictures_are_counted_and_named(train, refused, tmp_path, pictures):
    lost = [{**PAIR, **CAPTION, "image": f"gone{i}.png"} for i in (1, 2, 2)]
    file = written(tmp_path / "data.json", [{**PAIR, **CAPTION}, *lost])
    refused(
        train(data_path=file),
        "2 image(s) missing, in 3 of 4 records",
        f"{pictures / 'gone1.png'} ({file}: record 1)",
        f"{pictures / 'gone2.png'} ({file}: record 2)",
        "--image_folder",
        "--skip_missing_images",
    )


def test_missing_visual_genome_pictures_name_its_flag(hadpo, refused, golden, tmp_path):
    vg = shutil.copytree(golden / "mini_vg", tmp_path / "vg")
    (vg / "VG_100K" / "2315000.png").unlink()
    desc = golden / "hadpo_data" / "desc_data.json"
    # Two of the eight pairs: every description counts twice.
    refused(hadpo(desc_data_path=desc, vg_path=vg), "1 image(s) missing, in 2 of 8 records", "2315000.png", "--vg_path")


def test_going_on_without_missing_pictures(dpo, tmp_path):
    out, err = finished(dpo([PAIR, {**PAIR, "image": "gone.png"}], skip_missing_images=True))
    assert "1 pairs" in out
    assert "1 image(s) missing, in 1 of 2 records" in err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_no_picture_is_left_to_go_on_with(dpo, refused):
    refused(dpo([{**PAIR, "image": "gone.png"}], skip_missing_images=True), "gone.png", "no record is left")


@pytest.fixture
def truncated(golden, pictures):
    whole = (golden / "images" / "h_big_511x340.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    return "cut.png"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_met_while_training(dpo, refused, truncated, workers):
    result = dpo([{**PAIR, "image": truncated}], dataloader_num_workers=workers)
    refused(result, "pairs.jsonl: line 1", "cut.png is broken or truncated", "--skip_missing_images")


def test_a_truncated_picture_met_while_pretraining(pretrain, refused, truncated):
    refused(pretrain([{**CAPTION, "image": truncated}]), "captions.json: record 0", "cut.png is broken or truncated")


def test_going_on_without_a_truncated_picture(dpo, truncated, tmp_path):
    records = [{**PAIR, "image": truncated}, {**PAIR, "chosen": "Never."}]
    _, err = finished(dpo(records, skip_missing_images=True, max_steps=2))
    assert "cut.png is broken or truncated" in err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# --- flags


def test_an_unknown_flag_suggests_the_near_one(train, refused):
    refused(train(modle_max_length=5), "unknown flag --modle_max_length", "did you mean --model_max_length?")


def test_an_unknown_flag_that_is_near_to_none(train, refused):
    refused(train(xyzzy=5), "unknown flag --xyzzy", "--help")


def test_an_unknown_template(train, refused):
    refused(train(version="v9"), "--version v9: unknown template", "known templates: default, v0, v1")


def test_an_unknown_connector(pretrain, refused):
    refused(pretrain(mm_projector_type="mlp0x"), "mm_projector_type mlp0x", "mlp2x_gelu")


def test_another_connector_than_the_checkpoints(dpo, refused):
    refused(dpo(mm_projector_type="linear"), "--mm_projector_type linear", "connector of type mlp2x_gelu")


CONTRADICTIONS = [
    ({"tune_mm_mlp_adapter": True, "lora_enable": True}, ["--tune_mm_mlp_adapter", "contradicts --lora_enable"]),
    (
        {"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True, "lora_enable": None},
        ["--tune_mm_mlp_adapter", "contradicts --freeze_mm_mlp_adapter"],
    ),
    ({"tune_mm_mlp_adapter": True, "lora_enable": None, "mm_projector_lr": 0}, ["nothing is left to train"]),
]


@pytest.mark.parametrize(("flags", "parts"), CONTRADICTIONS)
def test_flags_that_contradict_each_other(train, refused, flags, parts):
    refused(train(**flags), *parts)


def test_two_ways_to_say_what_trains(pretrain, refused):
    refused(pretrain(train_type="use_lora"), "--train_type use_lora", "--tune_mm_mlp_adapter")


REFUSED_FLAGS = [
    ({"lora_weight_path": "x"}, ["--lora_weight_path x: no such folder"]),
    ({"mm_use_im_start_end": True}, ["--mm_use_im_start_end True", "pass False"]),
    ({"mm_patch_merge_type": "spatial_unpad"}, ["--mm_patch_merge_type spatial_unpad", "expected flat"]),
    ({"image_aspect_ratio": "anyres"}, ["--image_aspect_ratio anyres", "expected pad or square"]),
    ({"mm_vision_select_feature": "cls"}, ["--mm_vision_select_feature cls", "expected patch or cls_patch"]),
    ({"lora_r": 0}, ["--lora_r 0", "expected 1 or more"]),
    ({"learning_rate": "nan"}, ["--learning_rate nan", "expected 0 or more"]),
    ({"lm_head_lr": -1}, ["--lm_head_lr -1.0", "expected 0 or more"]),
    ({"data_seed": 7, "upstream_order": True}, ["--data_seed", "--seed decides the order"]),
    ({"lora_bias": "all"}, ["--lora_bias all", "none"]),
    ({"remove_unused_columns": True}, ["--remove_unused_columns True"]),
    ({"fsdp": "full_shard"}, ["--fsdp", "--deepspeed zero_configs/zero3.json"]),
    ({"mpt_attn_impl": "torch"}, ["--mpt_attn_impl"]),
    ({"eval_strategy": "epoch"}, ["--eval_strategy epoch needs held-out data", "--eval_data_path"]),
    ({"evaluation_strategy": "epoch"}, ["--eval_strategy epoch needs held-out data", "--eval_data_path"]),
]


@pytest.mark.parametrize(("flags", "parts"), REFUSED_FLAGS, ids=lambda value: next(iter(value)))
def test_flags_that_cannot_be_honoured(train, refused, flags, parts):
    refused(train(**flags), *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"beta": 0}, ["--beta 0", "expected a positive number"]),
        ({"beta": "nan"}, ["--beta nan", "expected a positive number"]),
        ({"max_prompt_length": 512}, ["--max_prompt_length", "--model_max_length"]),
        ({"max_length": 1024}, ["--max_length", "--model_max_length"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_flags_of_preference_training_that_cannot_be_honoured(dpo, refused, flags, parts):
    refused(dpo(**flags), *parts)


def test_a_value_of_another_kind(train, refused):
    refused(train(model_max_length="long"), "--model_max_length", "'long'")


# Values that no run can have, found out before the weights are read.
IMPOSSIBLE = [
    {"model_max_length": 0},
    {"per_device_train_batch_size": 0},
    {"gradient_accumulation_steps": 0},
    {"report_to": "nowhere"},
    {"attn_implementation": "fast"},
]


@pytest.mark.parametrize("flags", IMPOSSIBLE, ids=lambda flags: next(iter(flags)))
def test_values_that_no_run_can_have(train, refused, flags):
    ((name, value),) = flags.items()
    result = train(**flags)
    refused(result, f"--{name}", value)
    assert "Loading weights" not in result[2]


def test_flash_attention_that_is_not_installed(train, pope, refused):
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("it is installed")
    refused(train(attn_implementation="flash_attention_2"), "--attn_implementation flash_attention_2")
    refused(pope(attn_implementation="flash_attention_2"), "--attn_implementation flash_attention_2")


def test_an_output_dir_that_is_a_file(train, refused, tmp_path):
    file = written(tmp_path / "file", "")
    refused(train(output_dir=file), f"--output_dir {file}")


def test_a_checkpoint_to_resume_that_is_none(train, refused, tmp_path):
    refused(train(resume_from_checkpoint=tmp_path), f"--resume_from_checkpoint {tmp_path}", "trainer_state.json")


DEEPSPEED_FILES = [
    (None, "no such file"),
    ("{", "zero.json: broken JSON at line 1, byte 1"),
    ("[]", "expected a JSON object"),
]


@pytest.mark.parametrize(("content", "part"), DEEPSPEED_FILES)
def test_a_deepspeed_config_that_cannot_be_used(monkeypatch, train, refused, tmp_path, content, part):
    for script in ("train_dpo", "train_pretrain"):  # no process group: it would outlive this test
        monkeypatch.setattr(f"{script}.prepare_processes", lambda: None)
    if content is not None:
        written(tmp_path / "zero.json", content)
    refused(train(deepspeed=tmp_path / "zero.json"), tmp_path / "zero.json", part)


def test_a_missing_held_out_file(train, refused):
    refused(train(eval_data_path="gone.json"), "--eval_data_path gone.json: no such file")


# --- models


def test_no_model(train, refused):
    refused(train(model_name_or_path=None), "--model_name_or_path is missing", "--vision_tower")


def test_a_model_that_is_not_there(train, refused, tmp_path):
    refused(train(model_name_or_path=tmp_path / "gone"), f"--model_name_or_path {tmp_path / 'gone'}: no such folder")


def test_a_language_model_without_vision_tower(train, refused, golden):
    result = train(model_name_or_path=golden / "tiny-vicuna", vision_tower=None)
    refused(result, "tiny-vicuna is a language model", "pass --vision_tower")


def test_a_vision_tower_that_is_not_there(pretrain, refused, tmp_path):
    refused(pretrain(vision_tower=tmp_path / "gone"), f"--vision_tower {tmp_path / 'gone'}: no such folder")


def test_a_vision_tower_that_is_none(pretrain, refused, golden):
    refused(pretrain(vision_tower=golden / "tiny-vicuna"), "--vision_tower", "tiny-vicuna", "CLIP")


LLAVA = {"model_type": "llava_llama", "mm_vision_tower": "tiny-clip", "mm_hidden_size": 32}
FOREIGN_MODELS = {
    "mistral": ({"model_type": "mistral"}, ["model_type 'mistral'", "llava_llama"]),
    "llava_mistral": ({**LLAVA, "model_type": "llava_mistral"}, ["model_type 'llava_mistral'", "llava_llama"]),
    "mpt": ({"model_type": "mpt"}, ["model_type 'mpt'", "llava_llama"]),
    "anyres": ({**LLAVA, "image_aspect_ratio": "anyres"}, ["LLaVA-1.6 (anyres)", "expected LLaVA-1.5"]),
    "unpad": ({**LLAVA, "mm_patch_merge_type": "spatial_unpad"}, ["LLaVA-1.6 (anyres)", "expected LLaVA-1.5"]),
    "huggingface": (
        {"model_type": "llava", "text_config": {"model_type": "mistral"}, "vision_config": {}},
        ["text_config has model_type 'mistral'", "expected llama or qwen2"],
    ),
    "towerless": ({"model_type": "llava_llama"}, ["names no vision tower", "mm_vision_tower"]),
    "nameless": ({"hidden_size": 64}, ["model_type 'None'", "llava_llama"]),
}


@pytest.mark.parametrize(("config", "parts"), FOREIGN_MODELS.values(), ids=FOREIGN_MODELS)
def test_models_of_another_kind(train, refused, tmp_path, config, parts):
    model = written(tmp_path / "model" / "config.json", config).parent
    refused(train(model_name_or_path=model, vision_tower=None), "--model_name_or_path", model, *parts)


@pytest.mark.parametrize(("content", "part"), [("{", "broken JSON"), ("[]", "object"), (None, "no such file")])
def test_a_broken_config(train, refused, tmp_path, content, part):
    (tmp_path / "model").mkdir()
    if content is not None:
        written(tmp_path / "model" / "config.json", content)
    refused(train(model_name_or_path=tmp_path / "model"), "config.json", part)


class Payload:
    """What a malicious pickle would run."""

    def __reduce__(self):
        return print, ("arbitrary code ran",)


@pytest.fixture
def model(golden, tmp_path):
    """A copy of a checkpoint in one file whose weights may be spoilt."""
    shutil.copytree(golden / "tiny-clip", tmp_path / "tiny-clip")
    return shutil.copytree(golden / "tiny-llava-original-with-tower", tmp_path / "model")


def test_a_pickle_that_could_run_code(train, refused, model):
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Payload()}, protocol=2))
    result = train(model_name_or_path=model, vision_tower=None)
    refused(result, model / "pytorch_model.bin", "could run code", "safetensors")
    assert "arbitrary code ran" not in result[1]


def test_a_torch_file_that_could_run_code(dpo, refused, model):
    torch.save({"lm_head.weight": Payload()}, model / "pytorch_model.bin")
    result = dpo(model_name_or_path=model)
    refused(result, model / "pytorch_model.bin", "could run code", "safetensors")
    assert "arbitrary code ran" not in result[1]


def test_truncated_weights(train, refused, model):
    whole = (model / "pytorch_model.bin").read_bytes()
    (model / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    result = train(model_name_or_path=model, vision_tower=None)
    refused(result, f"{model / 'pytorch_model.bin'}: damaged weight file", "download it again")


def test_truncated_safetensors(dpo, refused, model):
    from safetensors.torch import save_file

    (model / "pytorch_model.bin").unlink()
    save_file({"lm_head.weight": torch.zeros(2000, 64)}, model / "model.safetensors")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(dpo(model_name_or_path=model), f"{model / 'model.safetensors'}: damaged weight file", "download it again")


def test_a_missing_shard(dpo, refused, golden, tmp_path):
    shutil.copytree(golden / "tiny-clip", tmp_path / "tiny-clip")
    sharded = shutil.copytree(golden / "tiny-llava-original", tmp_path / "model")
    (sharded / "pytorch_model-00002-of-00003.bin").unlink()
    refused(dpo(model_name_or_path=sharded), "pytorch_model-00002-of-00003.bin: missing weight file", "download")


def test_no_weights(dpo, refused, model):
    (model / "pytorch_model.bin").unlink()
    refused(dpo(model_name_or_path=model), f"{model}: no model weights", "model.safetensors or pytorch_model.bin")


def test_weights_that_do_not_fit_the_config(dpo, refused, model):
    config = json.loads((model / "config.json").read_text())
    written(model / "config.json", {**config, "intermediate_size": 100})
    refused(dpo(model_name_or_path=model), model, "do not fit config.json")


def test_a_connector_file_without_connector(pretrain, refused, tmp_path):
    torch.save({"lm_head.weight": torch.zeros(1)}, tmp_path / "mm_projector.bin")
    result = pretrain(pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin")
    refused(result, "mm_projector.bin: no connector inside", "found lm_head.weight")


def test_a_connector_file_that_is_not_there(pretrain, refused):
    refused(pretrain(pretrain_mm_mlp_adapter="gone.bin"), "--pretrain_mm_mlp_adapter gone.bin: no such file")


# --- POPE


@pytest.fixture
def pope(run_script, golden, pope_world, tmp_path):
    """``pope(**flags)``: pope_eval.py over one set of the drawn world."""

    def run(**flags):
        settings = {
            "model-path": golden / "tiny-llava-original",
            "coco_path": pope_world / "coco",
            "pope_path": pope_world / "pope",
            "set": "random",
            "output_dir": tmp_path / "out",
            "max_new_tokens": 1,
            **flags,
        }
        return run_script("pope_eval", *flags_of(settings))

    return run


def question(number, **changes):
    text = "Is there a dog in the image?"
    return {"question_id": number, "image": "a.png", "text": text, "label": "no", **changes}


@pytest.fixture
def own_set(tmp_path, pictures):
    """``own_set(*questions)``: flags for a question file over the folder with ``a.png``."""

    def make(*questions):
        lines = "".join(json.dumps(row) + "\n" for row in questions)
        return {"pope_path": written(tmp_path / "coco_pope_random.json", lines), "coco_path": pictures}

    return make


def test_a_missing_pope_file(pope, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(pope(pope_path=tmp_path / "empty"), f"--pope_path {tmp_path / 'empty'}", "coco_pope_random.json")


def test_a_missing_coco_folder(pope, refused, tmp_path):
    refused(pope(coco_path=tmp_path / "gone"), f"--coco_path {tmp_path / 'gone'}: no such folder")


def test_a_missing_pope_picture(pope, refused, own_set, pictures):
    flags = own_set(question(1), question(2, image="gone.png"))
    refused(
        pope(**flags),
        f"1 image(s) missing, in 1 of 2 records: {pictures / 'gone.png'}",
        "coco_pope_random.json: line 2",
        "check --coco_path",
        "--skip_missing_images",
    )


def test_a_truncated_pope_picture(pope, refused, own_set, truncated):
    refused(
        pope(**own_set(question(1, image=truncated))), "coco_pope_random.json: line 1", "cut.png is broken or truncated"
    )


def test_repeated_question_ids(pope, refused, own_set):
    refused(
        pope(**own_set(question(1), question(2), question(1))),
        "coco_pope_random.json: line 3",
        "question_id 1",
        "line 1",
    )


@pytest.mark.parametrize("key", ["question_id", "image", "text", "label"])
def test_a_question_without_a_key(pope, refused, own_set, key):
    broken = {name: value for name, value in question(2).items() if name != key}
    refused(pope(**own_set(question(1), broken)), "coco_pope_random.json: line 2", f"no key '{key}'")


def test_an_unknown_conversation_mode(pope, refused):
    refused(pope(**{"conv-mode": "vicuna_v9"}), "--conv-mode vicuna_v9: unknown template", "llava_v1")


def test_a_lora_without_its_base(pope, refused, golden):
    result = pope(**{"model-path": golden / "tiny-llava-lora"})
    refused(result, "tiny-llava-lora holds a LoRA adapter", "--model-base")


def test_a_connector_without_its_base(pope, refused, golden):
    result = pope(**{"model-path": golden / "tiny-llava-pretrain"})
    refused(result, "tiny-llava-pretrain holds only a connector", "--model-base")


def test_a_model_to_be_asked_that_is_not_there(pope, refused, tmp_path):
    refused(pope(**{"model-path": tmp_path / "gone"}), f"--model-path {tmp_path / 'gone'}: no such folder")


@pytest.mark.parametrize(("config", "parts"), FOREIGN_MODELS.values(), ids=FOREIGN_MODELS)
def test_models_of_another_kind_are_not_asked(pope, refused, tmp_path, config, parts):
    model = written(tmp_path / "model" / "config.json", config).parent
    refused(pope(**{"model-path": model}), "--model-path", model, *parts)


@pytest.fixture
def lora(golden, tmp_path):
    """A copy of a LoRA whose weights may be spoilt."""
    shutil.copytree(golden / "tiny-clip", tmp_path / "tiny-clip")
    return shutil.copytree(golden / "tiny-llava-lora", tmp_path / "lora")


def test_a_truncated_adapter(pope, refused, golden, lora):
    whole = (lora / "adapter_model.bin").read_bytes()
    (lora / "adapter_model.bin").write_bytes(whole[: len(whole) // 2])
    result = pope(**{"model-path": lora, "model-base": golden / "tiny-llava-original"})
    refused(result, f"{lora / 'adapter_model.bin'}: damaged weight file", "download it again")


def test_an_adapter_that_could_run_code(pope, refused, golden, lora):
    torch.save({"x": Payload()}, lora / "adapter_model.bin")
    result = pope(**{"model-path": lora, "model-base": golden / "tiny-llava-original"})
    refused(result, lora / "adapter_model.bin", "could run code")
    assert "arbitrary code ran" not in result[1]


def test_a_batch_of_nothing(pope, refused):
    refused(pope(batch_size=0), "--batch_size")


def test_dashes_and_underscores_are_the_same_in_a_flag(monkeypatch):
    from llava.command_line import OneLineParser

    parser = OneLineParser(allow_abbrev=False)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--batch_size", type=int)
    for argv in (["--model_path", "a_b-c", "--batch-size=3"], ["--model-path=a_b-c", "--batch_size", "3"]):
        monkeypatch.setattr(sys, "argv", ["script", *argv])
        assert vars(parser.parse()) == {"model_path": "a_b-c", "batch_size": 3}
