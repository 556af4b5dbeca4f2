"""``python -m llava.data.check``: what is counted and what is found, against figures counted by hand."""

from __future__ import annotations

import json
import re

import pytest
from conftest import GOLDEN, draw_picture

MODEL = GOLDEN / "tiny-llava-original"


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        draw_picture(tmp_path / "images" / name, name)
    (tmp_path / "images" / "cut.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:60])
    return tmp_path


GOOD = [
    {"id": "0", "image": "a.png", "conversations": turns("<image>\nWhat is it?", "A red ball.")},
    {"id": "1", "image": "a.png", "conversations": turns("What is it?\n<image>", "A ball.", "Which colour?", "Red.")},
    {"id": "2", "conversations": turns("Say a word.", "Word.")},
    {"id": "3", "image": ["a.png", "b.png"], "conversations": turns("<image> and <image>?", "Both are balls.")},
]
BAD = [
    {"id": "4", "image": "gone.png", "conversations": turns("<image>", "Nothing.")},
    {"id": "5", "image": "cut.png", "conversations": turns("<image>", "Half.")},
    {"id": "6", "conversations": [{"from": "gpt"}]},
    {"id": "7", "conversations": turns("Only a question.")},
    {"id": "8", "image": "a.png", "conversations": turns("<image> <image>", "Several marks are one.")},
    {"id": "9", "image": ["a.png", "b.png"], "conversations": turns("<image>", "One mark for two.")},
]


@pytest.fixture
def check(run_script, folder):
    def run(records, *flags):
        (folder / "chat.json").write_text(json.dumps(records))
        return run_script("llava.data.check", "--data_path", folder, *flags)

    return run


def test_good_records_are_counted(check):
    code, out, err = check(GOOD)
    assert code == 0, err
    assert "records   4 (one picture 2, several pictures 1, text only 1)" in out
    assert "turns     10, 2.5 a record" in out
    assert "words     26; a record 6.5, median 6, 95 % 9, at most 9" in out
    assert "pictures  4 named, 2 different; 0 missing; 2 opened" in out and "0 broken" in out
    assert out.endswith("\nnothing is wrong\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_problem_is_found_once(check, folder, monkeypatch, workers):
    monkeypatch.setattr("llava.data.check.AT_A_TIME", 3)
    report = folder / "problems.jsonl"
    code, out, _ = check(GOOD + BAD, "--num_workers", workers, "--report", report)
    assert code == 1 and "nothing is wrong" not in out
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    found = [(row["kind"], int(re.search(r"record (\d+)", row["where"])[1])) for row in rows]
    assert found == [
        *(("missing picture", 4), ("broken picture", 5)),
        *(("refused record", number) for number in (6, 7, 9)),
    ]
    assert "gone.png" in rows[0]["message"] and "cut.png" in rows[1]["message"]
    assert "pictures  9 named, 4 different; 1 missing; 2 opened" in out and "1 broken" in out
    assert "refused   3 records" in out and "mend or remove them" in out


def test_rows_are_counted_in_tokens(check, loaded):
    """As the tokenizer and the template give them, by hand."""
    tokenizer = loaded[0]
    flags = ["--model_name_or_path", MODEL, "--version", "v1"]
    code, out, _ = check(GOOD[2:3], *flags)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    whole = tokenizer(f"{system} USER: Say a word. ASSISTANT: Word.</s>").input_ids
    learnt = len(whole) - len(tokenizer(f"{system} USER: Say a word. ASSISTANT:").input_ids)
    assert code == 0
    assert f"tokens    {len(whole)}; a record {len(whole)}.0" in out and f"to learn  {learnt}; " in out
    code, out, _ = check(GOOD, *flags)
    pixels = 16  # of the recorded tower: (30 / 7)^2, whole patches
    assert f"a picture has {pixels}" in out and "cut       0 answers" in out
    # The last answer of a conversation, and the one text-only answer, are behind the cut.
    code, out, _ = check(GOOD[2:3], *flags, "--model_max_length", len(whole) - 2)
    assert code == 1 and "1 of 1 answers are cut, 0 of them whole (2 of" in out
    code, out, _ = check(GOOD[2:3], *flags, "--model_max_length", len(whole) - learnt)
    assert code == 1 and f"1 of them whole ({learnt} of {learnt} tokens" in out


def test_a_mixture_and_mistakes(run_script, folder, check):
    check(GOOD)
    (folder / "mix.yaml").write_text(
        f"datasets:\n- {{json_path: {folder}/chat.json, image_folder: {folder}/images}}\n"
        f"- {{json_path: {folder}/chat.json, image_folder: {folder}}}\n"
    )
    code, out, _ = run_script("llava.data.check", "--data_path", folder / "mix.yaml", "--open_images", "False")
    assert code == 1 and out.count("records   4") == 2
    assert "missing picture: 4 record(s)" in out and "opened" not in out
    for flags, said in (
        (["--data_path", "no.json"], "--data_path no.json: no such file"),
        (["--data_path", folder, "--num_workers", 0], "--num_workers 0"),
        (["--data_path", folder, "--vision_tower", "x"], "without --model_name_or_path"),
        (["--data_path", folder, "--model_name_or_path", GOLDEN / "tiny-vicuna"], "pass --vision_tower"),
    ):
        code, _, err = run_script("llava.data.check", *flags)
        assert code == 2 and said in err.splitlines()[-1], err
