"""The demo from beginning to end, twice: once in one go, once killed in the middle of two trainings; then its parts."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.parts import NEW_BLOCK
from demo.run import preference_data
from llava.files import read_json

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["Model", "Set", "HA-DPO", "Accuracy", "Precision", "Recall", "F1 Score", "Yes Ratio (%)"]

pytestmark = pytest.mark.slow


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, words)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def demo(out: Path) -> subprocess.Popen[str]:
    return start("-m", "demo.run", "--output_dir", out)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    return said


def table_of(said: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("|") and "---" not in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A finished demo: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "whole"
    return out, finished(demo(out))


def test_it_hallucinates_less_and_says_the_same_after_a_kill(whole, tmp_path):
    folder, said = whole
    header, *rows = table_of(said)
    assert header == COLUMNS
    assert [row[1:3] for row in rows] == [
        [name, mark] for mark in "✗✓" for name in ("random", "popular", "adversarial")
    ]
    accuracy = {(row[1], row[2]): float(row[3]) for row in rows}
    assert accuracy["random", "✗"] >= 80
    assert accuracy["adversarial", "✓"] >= accuracy["adversarial", "✗"] + 3
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(cell in page for row in rows for cell in row) and page.count("data:image/jpeg") == 12

    out = tmp_path / "killed twice"
    for training, end, code in (("llava", signal.SIGKILL, -9), ("llava-ha-dpo", signal.SIGTERM, 130)):
        process = demo(out)
        deadline = time.monotonic() + 1200
        while not any((out / training).glob("checkpoint-*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        process.send_signal(end)
        assert process.wait() == code
    said = finished(demo(out))
    assert "going on after: the world: pictures, captions, questions, connector training, instruction tuning" in said
    for training in ("llava", "llava-ha-dpo"):
        assert len(read_json(out / training / "run.json")["earlier"]) == 1  # from its checkpoint
    assert table_of(said) == [header, *rows]
    running = subprocess.run(["pgrep", "-af", "train_(dpo|pretrain).py"], capture_output=True, text=True, check=False)
    assert out.name not in running.stdout


def test_a_part_alone_hallucinates_less(whole):
    folder, _ = whole
    said = finished(start("-m", "demo.parts", "--demo", folder))
    assert (folder / "parts/table.md").read_text(encoding="utf-8").strip() in said
    header, *rows = table_of(said)
    assert header == [*COLUMNS, "Trained parameters", "Saved bytes"]
    accuracy = {row[0]: float(row[3]) for row in rows if row[1] == "adversarial"}
    assert list(accuracy) == [
        "demo-llava",
        "lm_head",
        "projector",
        "post_block",
        "post_block, tuned",
        "post_block, tuned, then DPO",
    ]
    assert min(accuracy["lm_head"], accuracy["post_block"]) >= accuracy["demo-llava"] + 1

    config = read_json(folder / "llava/config.json")
    head = config["hidden_size"] * config["vocab_size"]
    size = (folder / "parts/head/delta.safetensors").stat().st_size
    assert [row[-2:] for row in rows if row[0] == "lm_head"] == [[f"{head:,}", f"{size:,}"]] * 3
    assert 4 * head <= size < 4 * head + 1000
    log = (folder / "parts/logs/09 training block-tuned-dpo.log").read_text(encoding="utf-8")
    assert re.search(r"hidden states: \d+ records from", log)  # the new block's run kept them: they lie below any block


def test_forty_steps_with_default_rates_show(whole, tmp_path):
    folder, _ = whole
    flags = f"{preference_data(shlex.quote(str(folder)))} {NEW_BLOCK} --max_steps 40 --use_cpu True --bf16 False"
    finished(
        start("train_dpo.py", "--model_name_or_path", folder / "llava", "--output_dir", tmp_path, *shlex.split(flags))
    )
    effect = read_json(tmp_path / "run.json")["effect"]
    assert effect["changed"] > 0.01 * effect["answers"] > 0


def test_plain_transformers_answers_like_pope_eval(whole, tmp_path):
    """What the demo has trained, exported: every ninth question of *adversarial*, one at a time."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder, _ = whole
    source = ("--model-path", folder / "llava-ha-dpo")
    finished(start("-m", "llava.model.export", "--to", "hf", *source, "--out", tmp_path))
    processor = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    questions = {row["question_id"]: row for row in read_lines(folder / "world/pope/coco_pope_adversarial.json")}
    answers = read_lines(folder / "pope-ha-dpo/pope_adversarial.jsonl")[::9]
    assert len(answers) > 100
    for answer in answers:
        question = questions[answer["question_id"]]
        content = [{"type": "image"}, {"type": "text", "text": question["text"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        picture = Image.open(folder / "world/coco/val2014" / question["image"])
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == answer["answer"].removesuffix("</s>").strip()


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
