"""LLaVA's command over a question file: its lines, sampled answers that nothing but their seed changes, restarts."""

from __future__ import annotations

import json
import shutil

import forked
import pytest
import torch
from conftest import GOLDEN, draw_picture

from llava.conversation import template
from llava.eval.answer import Answerer, Question
from llava.eval.model_vqa_loader import seed_of
from llava.mm_utils import tokenizer_image_token
from llava.model.generation import Draw, Sampling

MODEL = GOLDEN / "tiny-llava-original"
TEXTS = ("What is this?", "Is there a dog in the image?", "Describe it.")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Seven questions about three pictures, in no order; two of them the same, and ids that repeat as TextVQA's do."""
    folder = tmp_path_factory.mktemp("vqa")
    (folder / "pictures").mkdir()
    for name in "abc":
        draw_picture(folder / "pictures" / f"{name}.jpg", name)
    asked = [("a", 0), ("b", 0), ("a", 1), ("c", 2), ("b", 0), ("a", 2), ("c", 1)]
    rows = [{"question_id": f"id {p}", "image": f"{p}.jpg", "text": TEXTS[t], "category": "x"} for p, t in asked]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def ask(run_script, world, tmp_path):
    def run(name, *flags):
        out = tmp_path / "answers" / f"{name}.jsonl"
        common = ["--model-path", MODEL, "--question-file", world / "questions.jsonl", "--image-folder"]
        common += [world / "pictures", "--answers-file", out, "--conv-mode", "vicuna_v1", "--max_new_tokens", 8]
        code, _, err = run_script("llava.eval.model_vqa_loader", *common, *flags)
        assert code == 0, err
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def texts(rows):
    return [row["text"] for row in rows]


@pytest.fixture
def answerer(loaded):
    return lambda **how: Answerer(*loaded[1::-1], loaded[2], template("vicuna_v1"), 8, **how)


def test_llavas_lines_with_the_greedy_answers(ask, world, answerer):
    rows = ask("greedy", "--temperature", 0)
    questions = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]
    assert [(r["question_id"], r["prompt"]) for r in rows] == [(q["question_id"], q["text"]) for q in questions]
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert {row["model_id"] for row in rows} == {"tiny-llava-original"}
    assert len({row["answer_id"] for row in rows}) == 7
    by_row = answerer().answer([Question(str(world / "pictures" / q["image"]), q["text"], "") for q in questions])
    assert texts(rows) == by_row
    beams = ask("beams", "--temperature", 0, "--num_beams", 2)
    assert len(beams) == 7 and texts(beams) != texts(rows)


def test_samples_depend_on_nothing_but_their_seed(ask, world, tmp_path, run_script):
    rows = ask("k", "--temperature", 1, "--num_samples", 5)
    assert [(row["question_id"][-1], row["sample"]) for row in rows[:6]] == [*(("a", k) for k in range(5)), ("b", 0)]
    assert len(rows) == 35 and len(set(texts(rows))) > 25
    assert texts(rows[5:10]) != texts(rows[20:25])  # the same question again gets draws of its own
    for other in (["--batch_size", 1], ["--batch_size", 3]):
        assert texts(ask("other", "--temperature", 1, "--num_samples", 5, *other)) == texts(rows)
    assert texts(ask("fewer", "--temperature", 1, "--num_samples", 2)) == [
        row["text"] for row in rows if row["sample"] < 2
    ]
    chunks = [ask(f"3_{i}", "--temperature", 1, "--num-chunks", 3, "--chunk-idx", i) for i in range(3)]
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    first = [row["text"] for row in rows if row["sample"] == 0]
    assert [text for chunk in chunks for text in texts(chunk)] == first
    assert texts(ask("seed", "--temperature", 1, "--seed", 1)) != first
    archive = shutil.make_archive(str(tmp_path / "pictures"), "zip", world / "pictures")
    zipped = ask("zipped", "--temperature", 1, "--image-folder", archive)
    assert texts(zipped) == first


def test_two_processes_and_a_run_that_goes_on(ask, world, tmp_path):
    want = ask("one", "--temperature", 0.8, "--num_samples", 3)
    flags = ["--model-path", MODEL, "--question-file", world / "questions.jsonl", "--image-folder"]
    flags += [world / "pictures", "--conv-mode", "vicuna_v1", "--max_new_tokens", 8, "--temperature", 0.8]
    out = tmp_path / "answers" / "two.jsonl"
    flags += ["--num_samples", 3, "--batch_size", 4, "--answers-file", out]
    run = forked.run("llava.eval.model_vqa_loader", flags, world_size=2)
    assert run.codes == [0, 0], run.text
    assert [json.loads(line) for line in out.read_text().splitlines()] == want
    # What a killed run leaves: whole lines, and half of one.
    made = json.loads((out.parent / "two.made.json").read_text())
    lines = out.read_text().splitlines(keepends=True)
    part = out.parent / f"two.{made['key'][:12]}.part0.jsonl"
    part.write_text("".join(lines[:9]) + lines[9][:20])
    out.unlink()
    code = forked.run("llava.eval.model_vqa_loader", flags, world_size=1)
    assert code.codes == [0] and "9 of 21 questions are answered already" in code.text
    assert "".join(lines) == out.read_text()
    assert not part.exists()


def test_draws_follow_the_models_probabilities(loaded, answerer, world):
    """4,000 first tokens of one question against the softmax of a forward without a cache."""
    tokenizer, model, _ = loaded
    how = Sampling(temperature=0.7, top_p=0.8, top_k=40)
    sampler = answerer(sampling=how)
    pixels = sampler.prepare(str(world / "pictures" / "a.jpg"), "")[None]
    ids = torch.tensor([tokenizer_image_token(sampler.prompt("What is this?"), tokenizer)])
    with torch.inference_mode():
        logits = model(ids, images=pixels).logits[0, -1].double()
    # By hand: the 40 likeliest, of these the fewest whose shares come to 0.8.
    ranked = (logits / 0.7).sort(descending=True)
    shares = ranked.values[:40].softmax(0)
    kept = int((shares.cumsum(0) < 0.8).sum()) + 1
    want = dict(zip(ranked.indices[:kept].tolist(), (shares[:kept] / shares[:kept].sum()).tolist(), strict=True))
    draw = Draw(how, [seed_of(0, place, 4000) for place in range(4000)], 1, torch.device("cpu"))
    rows = torch.arange(4000)
    got = draw.tokens(rows[:, None], logits.float().expand(4000, -1), rows, 0).bincount(minlength=len(logits)) / 4000
    assert set(got.nonzero()[:, 0].tolist()) <= want.keys()
    for token, share in want.items():  # 4 standard errors
        assert abs(float(got[token]) - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--num_samples", 3, "--temperature", 0], ["--num_samples", "the same"]),
        (["--num_beams", 2], ["--num_beams", "--temperature 0"]),
        (["--top_p", 0.5, "--temperature", 0], ["--top_p", "leave one out"]),
        (["--num-chunks", 2, "--chunk-idx", 2], ["--chunk-idx 2", "0 to 1"]),
        (["--question-file", "no.jsonl"], ["--question-file no.jsonl", "no such file"]),
        (["--image-folder", "no"], ["--image-folder no", "no such folder"]),
        (["--conv-mode", "v9"], ["--conv-mode", "v9"]),
    ],
)
def test_mistakes_are_one_line(run_script, world, tmp_path, flags, parts):
    common = ["--model-path", MODEL, "--question-file", world / "questions.jsonl", "--image-folder", world / "pictures"]
    code, _, err = run_script("llava.eval.model_vqa_loader", *common, "--answers-file", "a.jsonl", *flags)
    assert code == 2 and err.count("\n") == 1 and all(part in err for part in parts), err
    assert not list(tmp_path.iterdir())


def test_records_that_cannot_be_asked(run_script, world, tmp_path):
    rows = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]
    asked = tmp_path / "q.jsonl"
    common = ["--model-path", MODEL, "--question-file", asked, "--image-folder", world / "pictures"]
    for row, said in (
        ({"question_id": 1, "text": "?"}, "key 'image'"),
        ({"image": "a.jpg", "text": "?"}, "key 'question_id'"),
        ({"question_id": 1, "text": "?", "image": "no.jpg"}, "no.jpg"),
    ):  # the last one is what is asked below
        asked.write_text("".join(json.dumps(r) + "\n" for r in [rows[0], row]))
        code, _, err = run_script("llava.eval.model_vqa_loader", *common, "--answers-file", "a.jsonl")
        assert code == 2 and f"{asked}: line 2" in err and said in err
    flags = ["--answers-file", "a.jsonl", "--skip_missing_images", "--temperature", 0, "--max_new_tokens", 2]
    code, _, err = run_script("llava.eval.model_vqa_loader", *common, *flags)
    assert code == 0 and len((tmp_path / "a.jsonl").read_text().splitlines()) == 1
