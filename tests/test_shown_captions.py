"""What the model says of a few pictures while it trains, and what a run's figures in TensorBoard are."""

from __future__ import annotations

import io
import json
import shutil

import forked
import pytest
import torch
from conftest import GOLDEN, ROOT, logs_of, succeed
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from transformers import GenerationConfig

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collate import Example
from llava.model.builder import load_pretrained_model
from llava.train.prompts import first_answer, prompt_of
from llava.train.shown_captions import draw, markdown
from llava.train.watching import tokens_in

# ---- pieces ----


def test_a_prompt_ends_before_the_first_answer():
    none = IGNORE_INDEX
    row = Example(
        [1, IMAGE_TOKEN_INDEX, 7, 8, 2, 9, IMAGE_TOKEN_INDEX, 5, 2],
        [none, none, none, 8, 2, none, none, 5, 2],
        ("a", "b"),
        None,
    )
    assert prompt_of(row) == ([1, IMAGE_TOKEN_INDEX, 7], ("a",))
    assert first_answer(row) == [8, 2]


def test_tokens_are_counted_with_pictures_and_without_padding():
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool),
        "image_index": torch.tensor([[0, -1], [0, 1], [-1, -1]]),
    }
    # 3 ids with one picture of 10 tokens, 4 with two of them, 1 without: 12 + 22 + 1.
    assert int(tokens_in(batch, 10, None)) == 35
    assert int(tokens_in(batch, 10, 15)) == 12 + 15 + 1
    assert tokens_in({"rows": {"input_ids": torch.zeros(77)}}, 10, 15) == 77


def test_a_table_keeps_its_columns():
    assert markdown([("a|b\nc", "d"), ("", "\\")]).splitlines() == [
        "| picture | caption | reference |",
        "|---|---|---|",
        r"| 1 | a\|b c | d |",
        r"| 2 |  | \\ |",
    ]


@pytest.mark.parametrize("caption", ["", "a red bicycle " * 20, "一只红色的自行车" * 8])
def test_a_drawn_picture_is_small_and_has_its_caption_below(caption):
    noise = torch.randint(0, 256, (150, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    drawn = draw(Image.fromarray(noise.numpy()), caption)
    assert len(drawn.encoded) <= 40_000
    picture = Image.open(io.BytesIO(drawn.encoded))
    assert picture.format == "JPEG" and picture.size == drawn.size and picture.width == 224
    below = picture.convert("L").crop((0, 152, 224, picture.height))
    assert picture.height > 150 and (below.getextrema()[0] < 100) is bool(caption)


# ---- runs ----


def lines(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]


def board(folder):
    """{tag: {step: value}} of every TensorBoard file; each tag and step once."""
    found: dict[str, dict[int, object]] = {}
    for file in (folder / "runs").rglob("*tfevents*"):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                content = value.tensor.string_val[0].decode() if kind == "tensor" else getattr(value, kind)
                assert event.step not in found.setdefault(value.tag, {}), (value.tag, event.step)
                found[value.tag][event.step] = content
    return found


def weights(folder):
    return torch.load(folder / "mm_projector.bin", weights_only=True)


@pytest.fixture
def flags(pretrain_flags):
    """8 records, 2 a step, in 4 steps; connector only."""
    return [
        *pretrain_flags,
        *("--tune_mm_mlp_adapter", True, "--per_device_train_batch_size", 2, "--report_to", "tensorboard"),
        *("--save_strategy", "steps", "--save_steps", 3, "--caption_steps", 2, "--caption_images", 3),
    ]


def greedy(folder, base, path):
    """``model.generate`` about one picture, as the plain template asks."""
    tokenizer, model, processor = load_pretrained_model(str(folder), str(base) if base else None)[:3]
    pixels = processor.preprocess(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    settings = GenerationConfig(do_sample=False, max_new_tokens=40, eos_token_id=2, pad_token_id=0)
    ids = model.generate(torch.tensor([[1, IMAGE_TOKEN_INDEX]]), images=pixels, generation_config=settings)
    return tokenizer.decode(ids[0], skip_special_tokens=True).split("\n")[0].strip()


def test_captions_while_it_trains(run_script, flags, tmp_path):
    folder = tmp_path / "out"
    out = succeed(run_script("train_pretrain", *flags, "--output_dir", folder))
    assert " tokens/s " in out
    said = lines(folder)
    assert [line["step"] for line in said] == [0] * 3 + [2] * 3 + [4] * 3
    records = json.loads((GOLDEN / "pretrain_data.json").read_text())
    want = [records[number] for number in (0, 3, 7)]  # evenly from the first to the last of 8
    for line, record in zip(said, want * 3, strict=True):
        assert line["image"] == str(GOLDEN / "mini_vg" / record["image"])
        assert line["prompt"] == "<image>"
        assert line["reference"] == record["conversations"][1]["value"].strip()
    for line in said[6:]:
        assert line["caption"] == greedy(folder, GOLDEN / "tiny-vicuna", line["image"])
    assert [line["caption"] for line in said[:3]] != [line["caption"] for line in said[6:]]

    shown = board(folder)
    assert shown["captions/text_summary"].keys() == {0, 2, 4}
    assert shown["captions/text_summary"][4] == markdown([(x["caption"], x["reference"]) for x in said[6:]])
    for number in (1, 2, 3):
        assert shown[f"captions/{number}"].keys() == {0, 2, 4}
        image = shown[f"captions/{number}"][2]
        assert Image.open(io.BytesIO(image.encoded_image_string)).size == (image.width, image.height)
    assert shown["train/resident_memory_gb"].keys() == {1, 2, 3, 4}
    assert all(0.01 < value < 1000 for value in shown["train/resident_memory_gb"].values())
    assert not any("per_second" in key for log in logs_of(folder)[:-1] for key in log)

    # ---- the same without captions, and with a part that was stopped after its checkpoint and ran on ----
    plain = tmp_path / "plain"
    succeed(run_script("train_pretrain", *flags, "--caption_steps", 0, "--output_dir", plain))
    assert not (plain / "captions.jsonl").exists() and "captions/1" not in board(plain)
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, weights(plain)[name]), name
    clocked = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    assert [{k: v for k, v in log.items() if k not in clocked} for log in logs_of(plain)] == [
        {k: v for k, v in log.items() if k not in clocked} for log in logs_of(folder)
    ]

    whole, before = lines(folder), weights(folder)
    shutil.rmtree(folder / "checkpoint-4")  # its newest checkpoint is now that of step 3
    with (folder / "captions.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "caption": "torn')
    succeed(run_script("train_pretrain", *flags, "--output_dir", folder, "--resume_from_checkpoint", True))
    assert lines(folder) == whole
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())
    shown = board(folder)
    for tag in ("captions/text_summary", "captions/1", "captions/3"):
        assert shown[tag].keys() == {0, 2, 4}
    assert shown["train/tokens_per_second"].keys() == {1, 2, 3, 4}


def test_rates_in_tensorboard(run_script, flags, tmp_path, monkeypatch):
    """A clock that steps once a second when a step begins tells tokens from tokens a second."""
    from llava.train import watching
    from llava.train.shown_captions import ShownCaptions
    from llava.train.trainer import LlavaTrainer

    seconds, lengths = [0.0], []
    monkeypatch.setattr(watching.time, "monotonic", lambda: seconds[0])
    original, captions = LlavaTrainer.training_step, ShownCaptions._captions

    def step(self, model, inputs, *args):
        seconds[0] += 0.5
        rows = inputs["rows"]["trees"]
        lengths.append(sum(end - start for start, _, end, _ in rows))
        return original(self, model, inputs, *args)

    def slow(self):
        seconds[0] += 1000
        return captions(self)

    monkeypatch.setattr(LlavaTrainer, "training_step", step)
    monkeypatch.setattr(ShownCaptions, "_captions", slow)
    folder = tmp_path / "out"
    more = ("--gradient_accumulation_steps", 2, "--caption_steps", 1, "--save_strategy", "no")
    tune = ("--tune_mm_mlp_adapter", False, "--lora_enable", True, "--mm_projector_lr", 5e-4)
    succeed(run_script("train_pretrain", *flags, *more, *tune, "--output_dir", folder))
    shown = board(folder)
    # Four batches of two records, two batches a step of one second.
    want = {1: sum(lengths[:2]), 2: sum(lengths[2:])}
    assert shown["train/tokens_per_second"] == pytest.approx(want)
    assert shown["train/samples_per_second"] == pytest.approx({1: 4, 2: 4})
    # The connector's ids and pictures: 8 records with a picture of 16 tokens each are in there.
    assert sum(lengths) > 8 * 16
    assert shown["train/learning_rate/projector"] == pytest.approx({1: 5e-4, 2: 5e-4})
    assert shown["train/learning_rate/lora"] == pytest.approx({1: 1e-3, 2: 1e-3})
    assert "train/learning_rate" in shown and "train/loss" in shown
    assert [log["learning_rate/lora"] for log in logs_of(folder) if "loss" in log] == [1e-3, 1e-3]


def test_dropout_and_dpo_go_on_as_without_captions(run_script, dpo_flags, tmp_path):
    """Also where the model takes no trees and writes by rows."""
    found = {}
    for name, more in {
        "without": (),
        "with": ("--caption_steps", 1, "--caption_images", 2),
        "rows": ("--caption_steps", 3, "--caption_images", 2, "--attn_implementation", "eager"),
    }.items():
        flags = [*dpo_flags, "--lora_enable", True, "--lora_dropout", 0.1, *more, "--output_dir", tmp_path / name]
        succeed(run_script("train_dpo", *flags))
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert all(torch.equal(tensor, found["with"][key]) for key, tensor in found["without"].items())
    assert not (tmp_path / "without" / "captions.jsonl").exists()
    said = lines(tmp_path / "with")
    assert [line["step"] for line in said] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(line["prompt"].count("<image>") == 1 and "USER:" in line["prompt"] for line in said)
    by_rows = lines(tmp_path / "rows")
    assert [line["step"] for line in by_rows] == [0, 0, 3, 3]
    assert by_rows[:2] == said[:2]


def test_text_alone_shows_nothing(run_script, pretrain_flags, tmp_path):
    data = tmp_path / "text.json"
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    data.write_text(json.dumps([{"id": "a", "conversations": turns}] * 2))
    flags = [*pretrain_flags, "--data_path", data, "--version", "v1", "--output_dir", tmp_path / "out"]
    code, _, err = run_script("train_pretrain", *flags)
    assert code == 0 and err.count("no record with a picture was found") == 1
    assert not (tmp_path / "out" / "captions.jsonl").exists()


def test_the_last_step_of_a_short_run_is_shown(run_script, pretrain_flags, tmp_path):
    """--caption_steps is 500 here, and the only step is the last."""
    flags = [*pretrain_flags, "--eval_data_path", GOLDEN / "pretrain_data.json", "--caption_images", 20]
    succeed(run_script("train_pretrain", *flags, "--output_dir", tmp_path / "out"))
    pictures = {record["image"] for record in json.loads((GOLDEN / "pretrain_data.json").read_text())}
    assert [line["step"] for line in lines(tmp_path / "out")] == [0] * len(pictures) + [1] * len(pictures)


@pytest.mark.parametrize(("flag", "value"), [("--caption_steps", -1), ("--caption_images", 0)])
def test_counts_are_checked(run_script, pretrain_flags, tmp_path, flag, value):
    code, _, err = run_script("train_pretrain", *pretrain_flags, flag, value, "--output_dir", tmp_path / "out")
    assert code == 2 and f"{flag} {value}: expected" in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_two_processes_train_as_without_captions(pretrain_flags, tmp_path, kind):
    """All weights but the tower's train; what was trained does not see that captions were written at every step."""
    config = () if kind == "ddp" else ("--deepspeed", ROOT / "zero_configs" / f"{kind}.json")
    flags = [*pretrain_flags, *config, "--train_type", "freeze_vision", "--per_device_train_batch_size", 1]
    found = []
    for steps in (0, 1):
        folder = tmp_path / str(steps)
        more = ("--caption_steps", steps, "--caption_images", 3, "--output_dir", folder)
        run = forked.run("train_pretrain", [*flags, *more], world_size=2)
        assert run.codes == [0, 0], run.text
        found.append(load_file(folder / "model.safetensors"))
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())
    assert [line["step"] for line in lines(folder)] == [step for step in range(5) for _ in range(3)]
