"""POPE's real questions about 60 drawn pictures, answered by the recorded checkpoint through both scripts."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.eval.pope import parse_answer, read_labels
from llava.interruption import EXIT_STOPPED
from llava.status import read_status

SETS = ("random", "popular", "adversarial")


def flags(pope_world, golden, folder, name="popular", tokens=4):
    return [
        *("--coco_path", pope_world / "coco", "--pope_path", pope_world / "pope", "--set", name),
        *("--model-path", golden / "tiny-llava-original", "--output_dir", folder, "--max_new_tokens", tokens),
    ]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def asked_in(pope_world: Path, name: str) -> list[dict[str, Any]]:
    return lines_of(pope_world / "pope" / f"coco_pope_{name}.json")


def distinct(pope_world: Path, *names: str) -> set[tuple[str, str]]:
    """Pairs of picture and question, read from the files themselves."""
    return {(row["image"], row["text"]) for name in names for row in asked_in(pope_world, name)}


@pytest.fixture
def counted(monkeypatch) -> dict[str, Any]:
    """What a run asks of the model: pictures it encodes, questions it is asked, files that are opened."""
    from llava.eval import answer
    from llava.eval.answer import Answerer
    from llava.model.llava_arch import LlavaMetaForCausalLM

    seen: dict[str, Any] = {"encoded": 0, "groups": [], "opened": []}
    encode, ask, open_image = LlavaMetaForCausalLM.look, Answerer.ask, answer.open_image

    def encoding(self, images, *args):
        seen["encoded"] += len(images)
        return encode(self, images, *args)

    def asking(self, pixels, questions, batch_size, seeds):
        seen["groups"].append((len(pixels), len(questions)))
        if len(seen["groups"]) == seen.get("fails at"):
            raise KeyboardInterrupt
        return ask(self, pixels, questions, batch_size)

    def opening(path, where):
        seen["opened"].append(Path(path).name)
        return open_image(path, where)

    monkeypatch.setattr(LlavaMetaForCausalLM, "look", encoding)
    monkeypatch.setattr(Answerer, "ask", asking)
    monkeypatch.setattr(answer, "open_image", opening)
    return seen


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


def prompt_of(question: str, human: str = "human") -> str:
    return (
        f"A chat between a curious {human} and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the {human}'s questions. USER: <image>\n{question} ASSISTANT:"
    )


class OneByOne:
    """The model asked as upstream asks: a question at a time, through ``generate``."""

    def __init__(self, loaded: Any, pope_world: Path) -> None:
        self.tokenizer, self.model, self.image_processor = loaded
        self.folder = pope_world / "coco" / "val2014"

    def inputs(self, image: str, question: str) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        from llava.mm_utils import process_images, tokenizer_image_token

        ids = tokenizer_image_token(prompt_of(question), self.tokenizer, return_tensors="pt")[None]
        with Image.open(self.folder / image) as picture:
            return ids, process_images([picture], self.image_processor, self.model.config)

    def ids(self, image: str, question: str, tokens: int) -> list[int]:
        ids, images = self.inputs(image, question)
        return self.model.generate(ids, images=images, do_sample=False, max_new_tokens=tokens)[0].tolist()

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def one_by_one(loaded, pope_world) -> OneByOne:
    return OneByOne(loaded, pope_world)


@pytest.fixture(scope="module")
def alone(one_by_one, pope_world) -> Iterator[dict[tuple[str, str], list[int]]]:
    """24 new ids for every question of the three sets, each asked by itself."""
    return {pair: one_by_one.ids(*pair, 24) for pair in sorted(distinct(pope_world, *SETS))}


def test_every_question_is_answered_in_the_files_order(answered, pope_world):
    for name in SETS:
        rows, asked = lines_of(answered / f"pope_{name}.jsonl"), asked_in(pope_world, name)
        assert [(r["question_id"], r["question"]) for r in rows] == [(a["question_id"], a["text"]) for a in asked]
        assert all(list(r) == ["question_id", "question", "answer", "protocol"] for r in rows)
        assert all(r["answer"] == r["answer"].strip() and "</s>" not in r["answer"] for r in rows)
        assert {r["protocol"] for r in rows} == {"hadpo"}
    assert not list(answered.glob("*.part*"))
    card = json.loads((answered / "run_all.json").read_text())
    assert (card["protocol"], card["arguments"]["conv_mode"]) == ("hadpo", "llava_v1")


@pytest.mark.parametrize("tokens", [1, 4, 24])
def test_every_answer_is_that_of_its_question_alone(
    alone, one_by_one, pope_world, golden, tmp_path, run_script, tokens
):
    """Greedy ids of a short answer are the first ones of a long one."""
    code, _, err = run_script("pope_eval", *flags(pope_world, golden, tmp_path, "all", tokens))
    assert code == 0, err
    assert len({tuple(ids) for ids in alone.values()}) > 60
    for name in SETS:
        said = [row["answer"] for row in lines_of(tmp_path / f"pope_{name}.jsonl")]
        pairs = [(row["image"], row["text"]) for row in asked_in(pope_world, name)]
        assert said == [one_by_one.text(alone[pair][:tokens]) for pair in pairs]


@pytest.mark.parametrize(("name", "names"), [("all", SETS), ("adv", ("adversarial",))])
def test_nothing_is_seen_or_asked_twice(counted, pope_world, golden, tmp_path, run_script, name, names):
    code, _, err = run_script("pope_eval", *flags(pope_world, golden, tmp_path, name, 1))
    assert code == 0, err
    assert counted["encoded"] == 60
    assert sorted(counted["opened"]) == sorted({image for image, _ in distinct(pope_world, *names)})
    assert sum(questions for _, questions in counted["groups"]) == len(distinct(pope_world, *names))
    assert max(questions for _, questions in counted["groups"]) <= 48


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
    for name in SETS:
        rows = lines_of(answered / f"pope_{name}.jsonl")
        labels = read_labels(pope_world / "pope" / f"coco_pope_{name}.json")
        right = sum(parse_answer(r["answer"]) == labels[r["question_id"]].label for r in rows)
        assert scored[name]["accuracy"] == pytest.approx(right / 360)


def test_two_processes_write_the_same_file(answered, pope_world, golden, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29871"]
    command = [*torchrun, "pope_eval.py", *map(str, flags(pope_world, golden, tmp_path, "all"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in SETS:
        assert (tmp_path / f"pope_{name}.jsonl").read_bytes() == (answered / f"pope_{name}.jsonl").read_bytes()
    assert done.stdout.count("| Model | Set |") == 1  # rank 0 speaks


@pytest.mark.parametrize("size", [1, 11])
def test_other_numbers_at_a_time_give_the_same_answers(
    counted, answered, pope_world, golden, tmp_path, run_script, size
):
    command = [*flags(pope_world, golden, tmp_path, "random"), "--batch_size", size]
    code, _, err = run_script("pope_eval", *command)
    assert code == 0, err
    assert (tmp_path / "pope_random.jsonl").read_bytes() == (answered / "pope_random.jsonl").read_bytes()
    assert set(counted["groups"]) == {(1, 6)}  # a picture is never parted, two do not fit
    assert counted["encoded"] == (360 if size == 1 else 60)


def test_models_that_cannot_compute_trees_are_asked_by_rows(answered, pope_world, golden, tmp_path, run_script):
    command = [*flags(pope_world, golden, tmp_path, "random"), "--attn_implementation", "eager"]
    code, _, err = run_script("pope_eval", *command)
    assert code == 0, err
    assert "note: questions are asked by separate rows: attn_implementation eager" in err
    assert (tmp_path / "pope_random.jsonl").read_bytes() == (answered / "pope_random.jsonl").read_bytes()


def test_a_killed_run_goes_on(counted, answered, pope_world, golden, tmp_path, run_script):
    """Half-way the power fails; the second run asks only what is missing. Same files."""
    command = [*flags(pope_world, golden, tmp_path, "all"), "--batch_size", 25]
    counted["fails at"] = 20
    with pytest.raises(KeyboardInterrupt):
        run_script("pope_eval", *command)
    kept = 0
    for name in SETS:
        (part,) = tmp_path.glob(f"pope_{name}.*.part0.jsonl")
        rows = part.read_text().splitlines()
        kept += len(rows)
        assert not (tmp_path / f"pope_{name}.jsonl").exists()
    groups, pictures = len(counted["groups"]), sum(number for number, _ in counted["groups"][:-1])
    assert kept == 18 * pictures  # every set asks six questions about a picture
    # The last line of one set was cut off: its picture's group is asked again, and no line is written twice.
    part.write_text("\n".join(rows[:-1]) + "\n" + rows[-1][:40])
    code, _, err = run_script("pope_eval", *command)
    assert code == 0, err
    assert counted["groups"][groups] == counted["groups"][groups - 2]
    again = sum(number for number, _ in counted["groups"][groups:])
    assert again == 60 - pictures + counted["groups"][groups][0]
    for name in SETS:
        assert (tmp_path / f"pope_{name}.jsonl").read_bytes() == (answered / f"pope_{name}.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_a_signal_ends_a_run_between_two_groups(
    counted, answered, pope_world, golden, tmp_path, run_script, monkeypatch
):
    """It leaves with 75, and the same command asks only the rest; a signal while the files are written is too late."""
    from llava.eval.answer import Answerer
    from llava.eval.answer_files import AnswerFile

    command = [*flags(pope_world, golden, tmp_path, "all"), "--batch_size", 25]
    asking = Answerer.ask

    def signalled(self, *args):
        if len(counted["groups"]) == 9:
            os.kill(os.getpid(), signal.SIGUSR2)
        return asking(self, *args)

    monkeypatch.setattr(Answerer, "ask", signalled)
    code, out, err = run_script("pope_eval", *command)
    assert code == EXIT_STOPPED and out == ""
    line = "stopped by SIGUSR2; its answers are written, and the same command asks only the rest"
    assert err.strip().splitlines()[-1] == f"note: {line}"
    assert len(counted["groups"]) == 10
    status = read_status(tmp_path / "status_all.json")
    assert (status["state"], status["message"], status["max_steps"]) == ("stopped", line, 1080)

    finish = AnswerFile.finish
    monkeypatch.setattr(AnswerFile, "finish", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or finish(*a))
    code, out, err = run_script("pope_eval", *command)
    assert code == 0 and "| random |" in out, err
    pictures = sum(number for number, _ in counted["groups"][:10])
    assert f"{18 * pictures} of 1080 questions are answered already; the other {1080 - 18 * pictures} are asked" in err
    assert sum(number for number, _ in counted["groups"]) == 60
    for name in SETS:
        assert (tmp_path / f"pope_{name}.jsonl").read_bytes() == (answered / f"pope_{name}.jsonl").read_bytes()
    status = read_status(tmp_path / "status_all.json")
    assert (status["state"], status["step"], status["seconds_left"]) == ("finished", 1080, None)
    card = json.loads((tmp_path / "run_all.json").read_text())
    assert status["metrics"]["popular/f1"] == round(card["metrics"]["popular"]["f1"], 4)


def test_a_finished_run_asks_nothing_again(counted, answered, pope_world, golden, tmp_path, run_script):
    """Unless someone has changed its file, which is kept."""
    for file in answered.iterdir():
        shutil.copy(file, tmp_path)
    command = flags(pope_world, golden, tmp_path, "all")
    code, out, err = run_script("pope_eval", *command)
    assert code == 0 and out.count("| random |") == 1
    assert "1080 of 1080 questions are answered already; nothing is asked" in err
    assert counted["groups"] == [] and not list(tmp_path.glob("*.earlier.jsonl"))

    file = tmp_path / "pope_popular.jsonl"
    edited = file.read_text().replace('"question_id": 7,', '"question_id":7,')
    file.write_text(edited)
    code, _, err = run_script("pope_eval", *command)
    assert code == 0 and "720 of 1080 questions are answered already; the other 360 are asked" in err
    assert (tmp_path / "pope_popular.earlier.jsonl").read_text() == edited
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in answered.iterdir()} | {"pope_popular.earlier.jsonl"}
    for name in SETS:
        assert (tmp_path / f"pope_{name}.jsonl").read_bytes() == (answered / f"pope_{name}.jsonl").read_bytes()


@pytest.mark.parametrize(
    "more", [("--scores",), ("--prompt", "llava", "--conv-mode", "llava_v1"), ("--batch_size", 13)]
)
def test_other_settings_begin_afresh(counted, pope_world, golden, tmp_path, run_script, more):
    command = flags(pope_world, golden, tmp_path, "random", 1)
    counted["fails at"] = 3
    with pytest.raises(KeyboardInterrupt):
        run_script("pope_eval", *command)
    code, _, err = run_script("pope_eval", *command, *more)
    assert code == 0, err
    assert sum(questions for _, questions in counted["groups"][3:]) == 360
    assert len(list(tmp_path.glob("*.part*"))) == 1  # the killed run's: it can still go on


def test_a_broken_picture_takes_only_its_own_questions_along(answered, pope_world, golden, tmp_path, run_script):
    folder = tmp_path / "coco"
    shutil.copytree(pope_world / "coco" / "val2014", folder)
    broken = asked_in(pope_world, "random")[30]["image"]
    (folder / broken).write_bytes((folder / broken).read_bytes()[:200])
    command = flags(pope_world, golden, tmp_path / "out", "all")
    command[1] = folder
    code, _, err = run_script("pope_eval", *command)
    assert code == 2 and err.strip().splitlines()[-1].startswith("error: ") and broken in err
    code, _, err = run_script("pope_eval", *command, "--skip_missing_images")
    assert code == 0, err
    assert sum("its questions are left out" in line for line in err.splitlines()) == 1
    for name in SETS:
        images = {row["question_id"]: row["image"] for row in asked_in(pope_world, name)}
        whole = [r for r in lines_of(answered / f"pope_{name}.jsonl") if images[r["question_id"]] != broken]
        assert len(whole) == 354 and lines_of(tmp_path / "out" / f"pope_{name}.jsonl") == whole


def test_the_prompt_of_llava(pope_world, golden, tmp_path, run_script, monkeypatch):
    """What LLaVA's model_vqa_loader.py makes of llava_pope_test.jsonl; the bare question is written down."""
    from llava.eval import answer

    prompts = []
    tokenize = answer.tokenizer_image_token
    monkeypatch.setattr(
        answer, "tokenizer_image_token", lambda text, tokenizer: prompts.append(text) or tokenize(text, tokenizer)
    )
    code, _, err = run_script("pope_eval", *flags(pope_world, golden, tmp_path, "random", 1), "--prompt", "llava")
    assert code == 0, err
    asked = asked_in(pope_world, "random")
    suffix = "\nAnswer the question using a single word or phrase."
    assert prompts == [prompt_of(row["text"] + suffix, "user") for row in asked]
    rows = lines_of(tmp_path / "pope_random.jsonl")
    assert [(r["question"], r["protocol"]) for r in rows] == [(a["text"], "llava") for a in asked]
    card = json.loads((tmp_path / "run_random.json").read_text())
    assert (card["protocol"], card["arguments"]["conv_mode"]) == ("llava", "vicuna_v1")

    labels = pope_world / "pope" / "coco_pope_random.json"
    code, out, err = run_script("evaluate_pope", "--answers", tmp_path / "pope_random.jsonl", "--labels", labels)
    assert code == 0 and "| random |" in out, err

    prompts.clear()
    more = ("--prompt", "llava", "--conv-mode", "llava_v1")
    code, _, err = run_script("pope_eval", *flags(pope_world, golden, tmp_path, "random", 1), *more)
    assert code == 0, err
    assert prompts == [prompt_of(row["text"] + suffix, "human") for row in asked]


@pytest.mark.parametrize(("tokens", "size"), [(4, ()), (1, ("--batch_size", 1))])
def test_scores_are_the_softmax_of_the_first_logits(
    one_by_one, answered, pope_world, golden, tmp_path, run_script, tokens, size
):
    """SentencePiece's pieces behind "ASSISTANT:"; this small vocabulary writes "yes" as two, and the first counts."""
    command = [*flags(pope_world, golden, tmp_path, "popular", tokens), "--scores", *size]
    code, _, err = run_script("pope_eval", *command)
    assert code == 0, err
    rows, asked = lines_of(tmp_path / "pope_popular.jsonl"), asked_in(pope_world, "popular")
    if tokens == 4:
        assert [r["answer"] for r in rows] == [r["answer"] for r in lines_of(answered / "pope_popular.jsonl")]
    tokenizer = one_by_one.tokenizer
    yes, no = (tokenizer.convert_tokens_to_ids(pieces) for pieces in (["▁Yes", "▁y"], ["▁No", "▁no"]))
    assert tokenizer.unk_token_id not in [*yes, *no]
    for number in random.Random(0).sample(range(360), 40):
        ids, images = one_by_one.inputs(asked[number]["image"], asked[number]["text"])
        with torch.no_grad():
            p = one_by_one.model(ids, images=images).logits[0, -1].double().softmax(-1)
        want = float(p[yes].sum() / (p[yes].sum() + p[no].sum()))
        assert rows[number]["score"] == pytest.approx(want, abs=1e-5)
    scores = [row["score"] for row in rows]
    assert all(0 < score < 1 and math.isfinite(score) for score in scores) and len(set(scores)) > 100


def test_first_tokens_where_nothing_stands_between(loaded):
    """A byte-level tokenizer that writes no space in front of an answer, and one that cannot tell yes from no."""
    from llava.conversation import conv_templates
    from llava.errors import UserError
    from llava.eval.answer import Answerer

    class Bytes:
        bos_token_id = eos_token_id = unk_token_id = None
        pad_token_id = 0

        def __init__(self, first: str) -> None:
            self.first = first

        def __call__(self, text, add_special_tokens=True):
            from types import SimpleNamespace

            for word in ("Yes", "yes", "No", "no"):
                text = text.replace(word, self.first + word)
            return SimpleNamespace(input_ids=list(text.encode()))

        def convert_tokens_to_ids(self, token):
            return 1

    _, model, image_processor = loaded
    found = Answerer(model, Bytes(""), image_processor, conv_templates["qwen"], scores=True).yes_no
    assert found == ([ord("Y"), ord("y")], [ord("N"), ord("n")])
    with pytest.raises(UserError, match="begins 'Yes' and 'No' with the same token"):
        Answerer(model, Bytes("_"), image_processor, conv_templates["qwen"], scores=True)


def test_pictures_are_grouped_whole_and_in_order():
    from llava.eval.asking import Picture, in_groups

    numbers = [6, 10, 12, 3, 2, 30, 1]
    pictures = [Picture(str(i), "", {f"{i} {n}": [] for n in range(count)}) for i, count in enumerate(numbers)]
    sizes = {size: [[len(p.asked) for p in group] for group in in_groups(pictures, size)] for size in (1, 16, 17, 1000)}
    assert sizes[1] == [[n] for n in numbers]
    assert sizes[16] == [[6, 10], [12, 3], [2], [30], [1]]
    assert sizes[17] == [[6, 10], [12, 3, 2], [30], [1]]
    assert sizes[1000] == [numbers]


def test_questions_at_a_time_follow_the_card_and_not_who_else_uses_it(loaded, monkeypatch):
    from llava.conversation import conv_templates
    from llava.eval.answer import Answerer, default_batch_size

    tokenizer, model, image_processor = loaded
    answerer = Answerer(model, tokenizer, image_processor, conv_templates["llava_v1"], max_new_tokens=8)
    assert default_batch_size(answerer, on_cuda=False) == 48
    # Two layers, keys and values of four heads of 16 float32 numbers; a picture's 16 + 64 tokens and six answers of 40.
    a_picture = 2 * 2 * 64 * 4 * (model.get_vision_tower().num_features + 64 + 6 * 40)
    weights = sum(p.nbytes for p in model.parameters())
    for free in (0, 10**9):
        total = 3 * (4 * a_picture + 5) + weights
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free, total=total: (free, total))
        assert default_batch_size(answerer, on_cuda=True) == 24
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, weights))
    assert default_batch_size(answerer, on_cuda=True) == 6
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**12))
    assert default_batch_size(answerer, on_cuda=True) == 96


def test_running_out_of_memory_names_the_flag(pope_world, golden, tmp_path, run_script, monkeypatch):
    from llava.eval.answer import Answerer

    def failing(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Answerer, "ask", failing)
    code, _, err = run_script("pope_eval", *flags(pope_world, golden, tmp_path), "--batch_size", 12)
    assert code == 2
    assert err.strip().splitlines()[-1] == (
        "error: out of memory with 12 questions about 2 picture(s) at a time; pass a --batch_size below 12"
    )


def test_parts_of_another_run_are_not_used(pope_world, golden, tmp_path, run_script):
    stale = tmp_path / "pope_random.another00000.part3.jsonl"
    stale.write_text('{"question_id": 1, "question": "?", "answer": "stale"}\n')
    code, _, err = run_script("pope_eval", *flags(pope_world, golden, tmp_path, "random", tokens=1))
    assert code == 0, err
    assert "stale" not in (tmp_path / "pope_random.jsonl").read_text()
    assert stale.exists()  # it may belong to a run that is going on


def test_answers_may_hold_any_character(tmp_path):
    from llava.eval.answer_files import AnswerFile

    file = AnswerFile(tmp_path / "a.jsonl", {})
    assert file.answered() == {}
    file.begin()
    rows = [{"question_id": n, "answer": text} for n, text in enumerate(["No\u2028dog", "a\u0085b\nc", "d"])]
    file.append(rows)
    assert file.finish([0, 1, 2]) == rows
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().split("\n")[:-1]] == rows


def test_answers_go_into_the_checkpoint_by_default(tmp_path):
    from llava.eval.pope_run import output_dir

    assert output_dir(str(tmp_path), None) == tmp_path / "pope"
    assert str(output_dir("liuhaotian/llava-v1.5-7b", None)) == "pope_results/llava-v1.5-7b"
    assert str(output_dir(str(tmp_path), "elsewhere")) == "elsewhere"


def test_answers_of_an_earlier_run_are_kept(tmp_path, capsys):
    from llava.eval.answer_files import AnswerFile

    path = tmp_path / "pope_random.jsonl"
    for settings, answer in (("a", "Yes"), ("b", "No"), ("b", "No")):
        file = AnswerFile(path, {"settings": settings})
        file.begin()
        file.append([{"question_id": 1, "answer": answer}])
        file.finish([1])
    kept = tmp_path / "pope_random.earlier.jsonl"
    assert [json.loads(f.read_text())["answer"] for f in (kept, path)] == ["Yes", "No"]
    assert capsys.readouterr().err.count("kept in pope_random.earlier.jsonl") == 1


class Killed(BaseException):
    """What no ``except Exception`` stops; and nothing that cleans up afterwards gets anything done."""


class Mortal:
    """Changes of files, the ``number``-th of which kills: before it (odd) or after it (even)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = self.after = self.dead = None
        for owner, name in ((os, "replace"), (os, "unlink"), (Path, "unlink"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, original: Any) -> Any:
        def change(*args, **kwargs):
            if self.dead:
                raise Killed
            if self.left is None:
                return original(*args, **kwargs)
            self.left -= 1
            self.dead = self.left == 0
            if self.dead and not self.after:
                raise Killed
            done = original(*args, **kwargs)
            if self.dead:
                raise Killed
            return done

        return change

    def kills(self, number: int, what: Any) -> bool:
        """Whether ``what`` was killed at its ``number``-th moment."""
        self.left, self.after, self.dead = (number + 1) // 2, number % 2 == 0, False
        try:
            what()
        except Killed:
            return True
        finally:
            self.left, self.dead = None, False
        return False


def test_killed_at_every_moment_of_the_end(tmp_path, monkeypatch, capsys):
    """Two ranks' answers to two sets, one in the place of an older file; killed twice, then all is there once."""
    from llava.eval.answer_files import AnswerFile

    mortal, order = Mortal(monkeypatch), [3, 1, 2, 4]
    whole = {
        name: "".join(json.dumps({"question_id": n, "answer": f"{name} {n}"}) + "\n" for n in order) for name in "ab"
    }
    moment, files = 0, {}

    def finish():
        for file in files.values():
            file.begin()
            file.finish(order)

    while True:
        moment += 1
        folder = tmp_path / str(moment)
        folder.mkdir()
        (folder / "a.jsonl").write_text("older\n")
        for name, lines in whole.items():
            for rank in (0, 1):
                file = AnswerFile(folder / f"{name}.jsonl", {}, rank)
                file.begin()
                file.append(map(json.loads, lines.splitlines()[rank::2]))
        files = {name: AnswerFile(folder / f"{name}.jsonl", {}) for name in "ab"}
        was_killed = mortal.kills(moment, finish)
        for _ in range(2):
            for file in files.values():
                assert sorted(file.answered()) == sorted(order)
            mortal.kills(moment, finish)
        finish()
        for name, file in files.items():
            assert file.path.read_text() == whole[name] and file._is_whole()
        kept = folder / "a.earlier.jsonl"
        assert kept.read_text() == "older\n"
        assert sorted(f.name for f in folder.iterdir()) == [
            *("a.earlier.jsonl", "a.jsonl", "a.made.json", "b.jsonl", "b.made.json")
        ]
        if not was_killed:
            break
    assert moment > 30


def test_a_file_without_all_answers_is_not_written(tmp_path):
    from llava.errors import UserError
    from llava.eval.answer_files import AnswerFile

    file = AnswerFile(tmp_path / "a.jsonl", {})
    file.begin()
    file.append([{"question_id": 1, "answer": "Yes"}])
    with pytest.raises(UserError, match="2 answers are missing, the first of question_id 5"):
        file.finish([1, 5, 2])
    assert list(tmp_path.iterdir()) == [file.part] and list(file.answered()) == [1]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    from llava.errors import UserError
    from llava.eval.answer_files import AnswerFile

    file, full = AnswerFile(tmp_path / "a.jsonl", {}), AnswerFile(tmp_path / "a.jsonl", {}, 1)
    file.begin()
    file.append([{"question_id": 1, "answer": "Yes"}])
    full.part.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"part1\.jsonl: cannot be written \(No space left on device\); make room"):
        full.append([{"question_id": 2, "answer": "No"}])
    full.part.unlink()
    assert list(file.answered()) == [1]


def test_the_heartbeat_scales_rank_0s_share(tmp_path, monkeypatch):
    from llava import status
    from llava.distributed import World
    from llava.eval.asking import Picture, Progress

    monkeypatch.setattr(status, "current", None)
    heartbeat = status.Status(tmp_path, "pope_eval.py", "questions", 2, writer=True)
    monkeypatch.setattr(heartbeat, "update", lambda **fields: heartbeat._content.update(fields))
    groups = [[Picture(str(g), "", {str(q): [("random", 10 * g + q)] for q in range(10)})] for g in range(5)]
    done = {("random", number) for number in (*range(10), 15)}  # a whole group, and one question of the next
    with Progress("POPE random", 50, groups[1:], groups[1::2], done, World(0, 0, 2)) as progress:
        assert heartbeat._content["step"] == 11
        progress.began -= 10
        progress.add(groups[1])  # 9 of its own 19 questions, of all 39
    told = {name: heartbeat._content[name] for name in ("state", "step", "max_steps", "rate", "seconds_left")}
    rate = pytest.approx(9 * 39 / 19 / 10, rel=0.1)
    assert told == {
        "state": "running",
        "step": 29,
        "max_steps": 50,
        "rate": rate,
        "seconds_left": pytest.approx(11, abs=1),
    }


@pytest.mark.parametrize(
    ("visible", "rank", "device"),
    [
        (None, 1, "cuda:1 = GPU 1 (Card 1)"),
        ("2,3", 1, "cuda:1 = GPU 3 of CUDA_VISIBLE_DEVICES=2,3 (Card 1)"),
        ("GPU-1e8c, MIG-07d4", 0, "cuda:0 = GPU-1e8c of CUDA_VISIBLE_DEVICES=GPU-1e8c, MIG-07d4 (Card 0)"),
    ],
)
def test_every_rank_says_its_physical_device(monkeypatch, capsys, visible, rank, device):
    from llava.distributed import World, say_device

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    say_device(World(rank + 4, rank, 8))
    assert capsys.readouterr().err == f"rank {rank + 4} (local {rank} on {platform.node()}): {device}\n"
    say_device(World(5, 1, 8), on_cuda=False)
    unused = f", although CUDA_VISIBLE_DEVICES={visible}" if visible else ""
    said = capsys.readouterr().err
    assert re.fullmatch(rf"rank 5 \(local 1 on \S+\): cpu, \d+ threads?{re.escape(unused)}\n", said)


def test_a_rank_without_a_card_of_its_own_is_refused(monkeypatch):
    from llava.distributed import World, take_card
    from llava.errors import UserError

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert take_card(World(5, 1, 8)) == "cuda:1" and chosen == [1]
    with pytest.raises(UserError, match=r"local rank 2 on .* has no GPU of its own, 2 can be seen"):
        take_card(World(2, 2, 4))


def test_near_misses_of_the_variable_are_warned_about(monkeypatch, capsys):
    from llava.distributed import check_device_variables

    wrong = ("CUDA_VISIABLE_DEVICES", "CUDA_VISIBLE_DEVICE", "cuda_visible_devices", "CUDAVISIBLE_DEVICES")
    right = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    for name in (*wrong, *right, "ASCEND_RT_VISIBLE_DEVICES", "MUSA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "0")
    check_device_variables()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"warning: {name} is set, which nothing reads; CUDA_VISIBLE_DEVICES chooses the GPUs" for name in sorted(wrong)
    ]
    monkeypatch.setenv("RANK", "1")
    check_device_variables()
    assert capsys.readouterr().err == ""
