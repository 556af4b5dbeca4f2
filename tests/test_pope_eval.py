"""POPE's real questions about 60 drawn pictures, answered by the recorded checkpoint through both scripts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llava.eval.pope import parse_answer, read_labels

SETS = {"random": "random", "popular": "popular", "adv": "adversarial"}


def flags(pope_world, golden, folder, name="popular", tokens=4):
    return [
        *("--coco_path", pope_world / "coco", "--pope_path", pope_world / "pope", "--set", name),
        *("--model-path", golden / "tiny-llava-original", "--output_dir", folder, "--max_new_tokens", tokens),
    ]


@pytest.fixture(scope="module")
def answered(pope_world, golden, tmp_path_factory):
    """All three sets answered in one process; the folder."""
    folder = tmp_path_factory.mktemp("one")
    import importlib

    script = importlib.import_module("pope_eval")
    argv, sys.argv = sys.argv, ["pope_eval.py", *map(str, flags(pope_world, golden, folder, "all"))]
    try:
        script.main()
    finally:
        sys.argv = argv
    return folder


def test_every_question_is_answered_in_the_files_order(answered, pope_world):
    for name in SETS.values():
        rows = [json.loads(line) for line in (answered / f"pope_{name}.jsonl").read_text().splitlines()]
        file = pope_world / "pope" / f"coco_pope_{name}.json"
        asked = [json.loads(line) for line in file.read_text().splitlines()]
        assert [(r["question_id"], r["question"]) for r in rows] == [(a["question_id"], a["text"]) for a in asked]
        assert all(r["answer"] == r["answer"].strip() and "</s>" not in r["answer"] for r in rows)
    assert not list(answered.glob("*.part*"))


def test_an_answer_is_the_models_own(answered, pope_world, golden, loaded):
    from PIL import Image

    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token

    tokenizer, model, image_processor = loaded
    rows = (answered / "pope_random.jsonl").read_text().splitlines()
    asked = (pope_world / "pope" / "coco_pope_random.json").read_text().splitlines()
    for index in (0, 7, 359):
        row, question = json.loads(rows[index]), json.loads(asked[index])
        conversation = conv_templates["llava_v1"].copy()
        conversation.append_message("USER", "<image>\n" + question["text"])
        conversation.append_message("ASSISTANT", None)
        picture = Image.open(pope_world / "coco" / "val2014" / question["image"])
        new = model.generate(
            tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None],
            images=process_images([picture], image_processor, model.config),
            do_sample=False,
            max_new_tokens=4,
        )
        assert tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip() == row["answer"]


def test_both_scripts_give_the_same_numbers(answered, pope_world, run_script):
    code, out, err = run_script(
        "evaluate_pope",
        *("--answers", *sorted(answered.glob("pope_*.jsonl"))),
        *("--labels", *sorted((pope_world / "pope").glob("coco_pope_*.json")), "--json", "-"),
    )
    assert code == 0, err
    scored = json.loads(out)
    card = json.loads((answered / "run_all.json").read_text())
    assert scored == card["metrics"]
    for name in SETS.values():
        rows = [json.loads(line) for line in (answered / f"pope_{name}.jsonl").read_text().splitlines()]
        labels = read_labels(pope_world / "pope" / f"coco_pope_{name}.json")
        right = sum(parse_answer(r["answer"]) == labels[r["question_id"]].label for r in rows)
        assert scored[name]["accuracy"] == pytest.approx(right / 360)


def test_two_processes_write_the_same_file(answered, pope_world, golden, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29871"]
    command = [*torchrun, "pope_eval.py", *map(str, flags(pope_world, golden, tmp_path, "all"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in SETS.values():
        assert (tmp_path / f"pope_{name}.jsonl").read_bytes() == (answered / f"pope_{name}.jsonl").read_bytes()
    assert done.stdout.count("| Model | Set |") == 1  # rank 0 speaks


def test_larger_batches_give_the_same_answers(answered, pope_world, golden, tmp_path, run_script):
    code, _, err = run_script("pope_eval", *flags(pope_world, golden, tmp_path, "random"), "--batch_size", 11)
    assert code == 0, err
    assert (tmp_path / "pope_random.jsonl").read_bytes() == (answered / "pope_random.jsonl").read_bytes()


def test_a_killed_run_goes_on(answered, pope_world, golden, tmp_path, run_script, monkeypatch):
    """One question at a time; half-way the power fails; the second run asks only what is missing. Same file."""
    from llava.eval.answer import Answerer

    asked = []
    answer = Answerer.answer

    def failing(self, questions):
        asked.append(len(questions))
        if len(asked) == 100:
            raise KeyboardInterrupt
        return answer(self, questions)

    monkeypatch.setattr(Answerer, "answer", failing)
    command = [*flags(pope_world, golden, tmp_path, "random"), "--batch_size", 1]
    with pytest.raises(KeyboardInterrupt):
        run_script("pope_eval", *command)
    (part,) = tmp_path.glob("pope_random.*.part0.jsonl")
    assert len(part.read_text().splitlines()) == 100  # the key and 99 answers
    assert not (tmp_path / "pope_random.jsonl").exists()
    with part.open("a") as file:
        file.write('{"question_id": 100, "ques')  # and the last line was cut off
    code, _, err = run_script("pope_eval", *command)
    assert code == 0, err
    assert len(asked) == 100 + 261
    assert (tmp_path / "pope_random.jsonl").read_bytes() == (answered / "pope_random.jsonl").read_bytes()


def test_parts_of_another_run_are_not_used(pope_world, golden, tmp_path, run_script):
    stale = tmp_path / "pope_random.another00000.part3.jsonl"
    stale.write_text('{"key": "another"}\n{"question_id": 1, "question": "?", "answer": "stale"}\n')
    code, _, err = run_script("pope_eval", *flags(pope_world, golden, tmp_path, "random", tokens=1))
    assert code == 0, err
    assert "stale" not in (tmp_path / "pope_random.jsonl").read_text()
    assert stale.exists()  # it may belong to a run that is going on


def test_answers_may_hold_any_character(tmp_path):
    from llava.eval.answer_files import AnswerFile

    file = AnswerFile(tmp_path / "a.jsonl", {}, 0, lambda: None)
    assert file.resume() == {}
    rows = [{"question_id": n, "answer": text} for n, text in enumerate(["No\u2028dog", "a\u0085b\nc", "d"])]
    file.append(rows)
    assert file.merge([0, 1, 2]) == rows
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().split("\n")[:-1]] == rows


def test_answers_go_into_the_checkpoint_by_default(tmp_path):
    from llava.eval.pope_run import output_dir

    assert output_dir(str(tmp_path), None) == tmp_path / "pope"
    assert str(output_dir("liuhaotian/llava-v1.5-7b", None)) == "pope_results/llava-v1.5-7b"
    assert str(output_dir(str(tmp_path), "elsewhere")) == "elsewhere"
