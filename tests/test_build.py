"""Two models -> one blank LLaVA."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, draw_picture, logs_of
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from llava.conversation import template
from llava.mm_utils import preprocess_image, tokenizer_image_token
from llava.model import build
from llava.model.builder import load_pretrained_model


@pytest.fixture
def run_build(monkeypatch, capsys):
    """``run_build(*flags) -> (exit code, stdout, stderr)``"""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["build", *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            build.main()
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(params=["vicuna", "qwen"])
def llm(request, golden, qwen):
    return {"vicuna": golden / "tiny-vicuna", "qwen": qwen}[request.param]


def test_plain_transformers_and_we_read_the_same_model(run_build, golden, llm, tmp_path):
    out = tmp_path / "blank"
    code, said, err = run_build("--llm", llm, "--vision_tower", golden / "tiny-clip", "--out", out)
    assert code == 0, err
    assert "from the tower and from transformers' processor" in said
    name = "qwen" if "qwen" in llm.name else "v1"
    assert json.loads((out / "config.json").read_text())["mm_conv_mode"] == name

    tokenizer, ours, image_processor, _ = load_pretrained_model(str(out), None)
    theirs = LlavaForConditionalGeneration.from_pretrained(out).eval()
    processor = AutoProcessor.from_pretrained(out)
    draw_picture(tmp_path / "a.png", "a")
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a man on a street?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    conversation = template(name)
    conversation.append_message(conversation.roles[0], "<image>\na man on a street?")
    conversation.append_message(conversation.roles[1], None)
    ids = torch.tensor([tokenizer_image_token(conversation.get_prompt(), tokenizer)])
    pixels = preprocess_image(picture, image_processor, ours.config.image_aspect_ratio)[None]
    with torch.inference_mode():
        expected = theirs(**inputs).logits
        found = ours(ids, images=pixels).logits
    assert found.shape[1] == expected.shape[1]
    assert torch.allclose(found, expected[..., : found.shape[-1]], atol=1e-5)
    new = theirs.generate(**inputs, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, ours.generate(ids, images=pixels, max_new_tokens=5))


def test_the_language_model_and_the_tower_keep_every_bit(run_build, golden, llm, tmp_path):
    for form in ("hf", "original"):
        out = tmp_path / form
        code, _, err = run_build("--llm", llm, "--vision_tower", golden / "tiny-clip", "--out", out, "--to", form)
        assert code == 0, err
        model = load_pretrained_model(str(out), None)[1]
        own = AutoModelForCausalLM.from_pretrained(llm).state_dict()
        have = model.state_dict()
        assert all(torch.equal(have[name], value) for name, value in own.items())
        assert model.config.mm_hidden_size == 32 and model.config.mm_projector_type == "mlp2x_gelu"


def test_the_connector_is_the_seeds(run_build, golden, tmp_path):
    weights = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = ("--vision_tower", golden / "tiny-clip", "--out", tmp_path / name, "--seed", seed)
        assert run_build("--llm", golden / "tiny-vicuna", *flags)[0] == 0
        weights[name] = load_pretrained_model(str(tmp_path / name), None)[1].get_model().mm_projector[0].weight
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"])


def test_parts_and_memory():
    state = {
        "model.vision_tower.vision_tower.a": torch.zeros(10),
        "model.mm_projector.0.weight": torch.zeros(4, 5),
        "model.embed_tokens.weight": torch.zeros(100, 4),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(128, 128),
        "model.layers.0.input_layernorm.weight": torch.zeros(4),
    }
    lines = build.table(state, tied=True).splitlines()
    assert "| decoder | 16,388 |" in lines and "| all | 16,818 |" in lines
    # 2^28 weights: int8 with 2^14 scales of 4 bytes; nf4 with 2^22 bytes and 2^14 float32 of scales
    big = {"model.layers.0.mlp.up_proj.weight": torch.zeros(16384, 16384, device="meta")}
    assert build.table(big, tied=False).splitlines()[-1].split("|")[2:6] == [
        " 1.07 GB ",
        " 536.9 MB ",
        " 268.5 MB ",
        " 138.5 MB ",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--llm": "nowhere/at/all"}, "--llm nowhere/at/all: no such folder"),
        ({"--llm": "tiny-clip"}, "model_type 'clip_vision_model'; expected one of llama, qwen2"),
        ({"--llm": "tiny-llava-original"}, "it is a LLaVA already, train_pretrain.py takes it"),
        ({"--vision_tower": "tiny-vicuna"}, "tiny-vicuna"),
        ({"--mm_projector_type": "linear"}, "a connector of type linear (it has mlp2x_gelu); pass --to original"),
        ({"--conv-mode": "v7"}, "--conv-mode v7: unknown template"),
        ({"--conv-mode": "plain"}, "--conv-mode plain: has no turns"),
        ({"--conv-mode": "qwen"}, "no token <|im_end|>, which ends an answer; pass v1"),
        ({"--gguf_file": "a.gguf"}, "a.gguf: no such file"),
        ({"--gguf_file": "config.json"}, "config.json: no GGUF file; download it again"),
        ({"--max_shard_size": "many"}, "--max_shard_size many: expected a size"),
        ({"--seed": "-1"}, "--seed -1: expected 0 or more"),
        ({"--out": "."}, "the folder is not empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_and_leaves_nothing(run_build, golden, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(golden)
    given = {"--llm": "tiny-vicuna", "--vision_tower": "tiny-clip", "--out": str(tmp_path / "out"), **flags}
    code, _, err = run_build(*(word for pair in given.items() for word in pair))
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_gguf_files_is_named(run_build, golden, tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "model.Q4_1.gguf").write_bytes(b"GGUF")
    flags = ("--vision_tower", golden / "tiny-clip", "--out", tmp_path / "out")
    assert "pass one: --gguf_file model.Q4_1.gguf" in run_build("--llm", folder, *flags)[2]
    code, _, err = run_build("--llm", folder / "model.Q4_1.gguf", *flags)
    assert code == 2 and "cannot be read" in err
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_weights_that_do_not_come_back_are_refused(run_build, golden, tmp_path, monkeypatch):
    def other(*args):
        return own(*args) + 1

    own = build.own_logits
    monkeypatch.setattr(build, "own_logits", other)
    flags = ("--vision_tower", golden / "tiny-clip", "--out", tmp_path / "out")
    code, _, err = run_build("--llm", golden / "tiny-vicuna", *flags)
    assert code == 2 and "logits of a text differ from the language model's own" in err
    assert list(tmp_path.iterdir()) == []


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}


def drawings(folder, count):
    """Squares and circles of one colour, and records that say so."""
    folder.mkdir()
    records = []
    for number in range(count):
        colour, shape = list(COLOURS)[number % 4], ("square", "circle")[number // 4 % 2]
        picture = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(picture)
        at = [8 + number % 5, 10 + number % 7, 44 + number % 11, 46 + number % 6]
        (pen.rectangle if shape == "square" else pen.ellipse)(at, fill=COLOURS[colour])
        picture.save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a {colour} {shape}"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))


@pytest.mark.slow
def test_smollm2_talks_and_learns_to_see(tmp_path):
    """A real language model: its answers to text stay its own, and only the connector learns."""
    llm, blank, trained = tmp_path / "smollm2", tmp_path / "blank", tmp_path / "trained"

    def run(*words):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = run("-m", "demo.fetch_smollm2", llm).strip()
    tower = ROOT / "demo" / "weights" / "tower"
    said = run("-m", "llava.model.build", "--llm", file, "--vision_tower", tower, "--out", blank, "--seed", 1)
    assert "logits 0 from the language model's own" in said  # to the last bit

    name = file.rsplit("/", 1)[-1]
    own = AutoModelForCausalLM.from_pretrained(llm, gguf_file=name, dtype=torch.float32)
    ours = load_pretrained_model(str(blank), None)[1]
    processor = AutoProcessor.from_pretrained(blank)
    for question, begins in (("What is the capital of France?", "The capital of France is Paris."), ("2+2=?", "")):
        turns = [{"role": "user", "content": question}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        ids = processor.tokenizer(text, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        wanted = own.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
        found = ours.generate(ids, attention_mask=mask, max_new_tokens=30)[0]
        assert torch.equal(found, wanted)
        assert processor.tokenizer.decode(found).startswith(begins)

    drawings(tmp_path / "drawn", 64)
    flags = ["--model_name_or_path", blank, "--version", "plain", "--data_path", tmp_path / "drawn" / "chat.json"]
    flags += ["--image_folder", tmp_path / "drawn", "--train_type", "projector", "--output_dir", trained]
    flags += ["--max_steps", 30, "--per_device_train_batch_size", 8, "--learning_rate", 2e-3, "--logging_steps", 1]
    run("train_pretrain.py", *flags, "--model_max_length", 256, "--save_strategy", "no", "--report_to", "none")
    losses = [log["loss"] for log in logs_of(trained) if "loss" in log]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2

    after = load_pretrained_model(str(trained), None)[1].state_dict()
    blank_model = ours.state_dict()
    changed = {key for key, value in after.items() if checksum(value) != checksum(blank_model[key])}
    assert changed == {f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}


def checksum(value):
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
