"""What POPE runs have left, read back: joined by id, told apart by how the models were trained."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava.errors import UserError
from llava.eval.evaluated import ASKED, NOT_DECIDING, Group, differing, grouped, read_runs

ROOT = Path(__file__).resolve().parent.parent

# Six questions about two pictures; the answers below are right for 1, 4 and 6.
QUESTIONS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "a.jpg", "text": "Is there a car in the image?", "label": "yes"},
    {"question_id": 4, "image": "b.jpg", "text": "Is there a dog in the image?", "label": "no"},
    {"question_id": 5, "image": "b.jpg", "text": "Is there a cup in the image?", "label": "yes"},
    {"question_id": 6, "image": "b.jpg", "text": "Is there a bed in the image?", "label": "no"},
]
ANSWERS = {1: "Yes.", 2: "Yes, there is.", 3: "No.", 4: "No, there is no dog.", 5: "Perhaps not.", 6: "no"}
COUNTS = {"tp": 1, "fp": 1, "tn": 2, "fn": 2}


def lines(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class World:
    """A working directory with label files, in which scripts are said to have run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.labels = lines(folder / "POPE" / "coco_pope_random.json", QUESTIONS)

    def train(self, name: str, start: str = "org/base-7b", *, status: str = "finished", data: str = "1", **arguments):
        arguments = {"world_size": 1, "model_name_or_path": start, "output_dir": name, "seed": 0} | arguments
        card = {
            "command": "python train_dpo.py",
            "working_directory": str(self.folder),
            "arguments": arguments,
            "data": {"pairs.jsonl": {"sha256": data}},
            "seed": arguments["seed"],
            "started": "2026-01-01T00:00:00+00:00",
            "status": status,
        }
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / name / "run.json").write_text(json.dumps(card))
        return self.folder / name

    def ask(
        self,
        folder: str,
        model: str,
        *,
        sets=("random",),
        answers=ANSWERS,
        scores=None,
        metrics=COUNTS,
        name="all",
        card=(),
        **arguments,
    ):
        where = self.folder / folder
        files = {name: self.labels.with_name(f"coco_pope_{name}.json") for name in sets}
        for set_name, file in files.items():
            if not file.exists():
                lines(file, QUESTIONS)
            rows = [{"question_id": i, "question": q["text"], "answer": answers[i]} for i, q in asked(answers)]
            for row in rows if scores else ():
                row["score"] = scores[row["question_id"]]
            lines(where / f"pope_{set_name}.jsonl", rows)
        content = {
            "command": "python pope_eval.py",
            "working_directory": str(self.folder),
            "arguments": {"model_path": model, "model_base": None, "set": name} | arguments,
            "data": {f"POPE/{f.name}": {"sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files.values()},
            "hardware": {"gpus": []},
            "started": "2026-01-02T00:00:00+00:00",
            "status": "finished",
            "metrics": dict.fromkeys(sets, metrics),
        } | dict(card)
        (where / f"run_{name}.json").write_text(json.dumps(content))
        return where


def asked(answers):
    return [(q["question_id"], q) for q in QUESTIONS if q["question_id"] in answers]


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        read_runs(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# Answers


def test_answers_are_joined_to_their_labels_by_id(world):
    shuffled = dict(reversed(ANSWERS.items()))
    scores = {1: 0.9, 2: 0.8, 3: 0.4, 4: 0.1, 5: 0.3, 6: 0.2}
    (run,) = read_runs([world.ask("answers", "org/base-7b", answers=shuffled, scores=scores)])
    answers = run.sets["random"]
    assert answers.ids.tolist() == [1, 2, 3, 4, 5, 6] and answers.ids.dtype == np.int64
    assert answers.images.tolist() == ["a.jpg"] * 3 + ["b.jpg"] * 3
    assert answers.truth.tolist() == [True, False, True, False, True, False]
    assert answers.said.tolist() == [True, True, False, False, False, False]
    assert answers.scores.tolist() == [0.9, 0.8, 0.4, 0.1, 0.3, 0.2]
    assert answers.texts[4] == "Perhaps not." and answers.questions[5] == "Is there a bed in the image?"
    assert answers.unparsed == 0
    counts = answers.confusion()
    assert (counts.tp, counts.fp, counts.tn, counts.fn) == (1, 1, 2, 2)
    assert counts.accuracy == pytest.approx(3 / 6)
    assert answers.sha256 == hashlib.sha256(world.labels.read_bytes()).hexdigest()
    assert answers.labels_file == world.labels


def test_sets_come_in_the_order_of_the_table_and_scores_only_where_all_have_one(world):
    where = world.ask("answers", "m/m", sets=("objects", "adversarial", "random", "popular"))
    rows = [json.loads(line) for line in (where / "pope_popular.jsonl").read_text().splitlines()]
    lines(where / "pope_popular.jsonl", [rows[0] | {"score": 0.5}, *rows[1:]])
    (run,) = read_runs([where])
    assert list(run.sets) == ["random", "popular", "adversarial", "objects"]
    assert run.sets["popular"].scores is None


def test_questions_left_out_with_their_pictures_are_missing(world, capsys):
    half = {i: ANSWERS[i] for i in (1, 2, 3)}
    counts = {"tp": 1, "fp": 1, "tn": 0, "fn": 1}
    flags = {"answers": half, "metrics": counts}
    (run,) = read_runs([world.ask("answers", "m/m", skip_missing_images=True, **flags)])
    assert run.sets["random"].ids.tolist() == [1, 2, 3]
    assert "3 of 6 questions were left out" in capsys.readouterr().err
    assert "no answer to 3 of the 6 questions" in refused([world.ask("other", "m/m", **flags)])


def test_answers_that_the_card_did_not_count_are_refused(world):
    where = world.ask("answers", "m/m", metrics=COUNTS | {"tp": 2})
    assert "counts tp 1, but run_all.json says 2" in refused([where])
    where = world.ask("odd", "m/m", scores=dict.fromkeys(ANSWERS, 1.5))
    assert "line 1: score 1.5 is no probability" in refused([where])
    (where / "pope_random.jsonl").unlink()
    assert "pope_random.jsonl: missing, though run_all.json" in refused([where])


def test_label_files_that_changed_or_moved(world, tmp_path):
    where = world.ask("answers", "m/m")
    moved = tmp_path / "elsewhere" / "output" / "coco" / world.labels.name
    moved.parent.mkdir(parents=True)
    world.labels.rename(moved)
    assert "is not there; pass the folder of the one it was asked from as --labels" in refused([where])
    (run,) = read_runs([where], tmp_path / "elsewhere")
    assert run.sets["random"].labels_file == moved
    lines(world.labels, QUESTIONS[:5])
    assert "has another content" in refused([where])
    (run,) = read_runs([where], tmp_path / "elsewhere")
    assert len(run.sets["random"].ids) == 6
    lines(moved, QUESTIONS[1:])
    assert "--labels" in refused([where], tmp_path / "elsewhere")
    assert "no such folder" in refused([where], tmp_path / "nowhere")


def test_sets_of_several_cards(world):
    world.ask("answers", "m/m", sets=("popular",), name="popular")
    world.ask("answers", "./m", sets=("random",), name="random")
    assert "model_path is" in refused([world.folder / "answers"])
    world.ask("answers", "m/m", sets=("random",), name="random", prompt="llava")
    assert "prompt is 'hadpo', but 'llava' in run_random.json beside it" in refused([world.folder / "answers"])
    world.ask("answers", "m/m", sets=("random",), name="random")
    (run,) = read_runs([world.folder / "answers"])
    assert list(run.sets) == ["random", "popular"] and run.card["arguments"]["set"] == "random"


# Folders


def test_folders_are_walked_and_count_once(world, tmp_path):
    world.train("sweep/a/seed=0", lora_r=64)
    world.train("sweep/b/seed=0", lora_r=128)
    world.ask("sweep/a/seed=0/pope", "sweep/a/seed=0")
    world.ask("sweep/b/answers", "sweep/b/seed=0")
    world.ask("sweep/baseline/pope", "org/base-7b")
    world.ask("sweep/.hidden/pope", "m/m")
    world.ask("sweep/a/seed=0/checkpoint-10/pope", "m/m")
    world.ask("sweep/a/seed=0.rerun/pope", "m/m")
    world.ask("sweep/1/2/3/4/5/pope", "m/m")
    (tmp_path / "sweep" / "link").symlink_to(tmp_path / "sweep" / "a")
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path / "sweep")
    sweep = tmp_path / "sweep"
    runs = read_runs([sweep / "baseline", sweep, sweep / "a" / "seed=0" / "pope", sweep / "a" / ".." / "b"])
    assert [run.name for run in runs] == ["baseline", "a/seed=0", "b/seed=0"]
    assert [run.folder for run in runs] == [sweep / "baseline" / "pope", sweep / "a" / "seed=0", sweep / "b" / "seed=0"]
    assert runs[2].answers == sweep / "b" / "answers"


def test_two_runs_of_one_model_are_called_by_their_answers(world, tmp_path):
    world.train("tuned")
    world.ask("tuned/pope", "tuned")
    world.ask("again", "tuned", prompt="llava")
    runs = read_runs([tmp_path])
    assert {run.name: run.answers.name for run in runs} == {"again": "again", "tuned": "pope"}


def test_a_development_set_lies_beside_the_test_set(world, tmp_path):
    world.train("one")
    world.train("two")
    world.ask("one/pope", "one")
    world.ask("one/dev", "one", sets=("popular",))
    world.ask("two/dev", "two", sets=("random",))
    world.ask("base/pope", "org/base-7b")
    world.ask("base/dev", "somebody/else")
    base, one, two, other = sorted(read_runs([tmp_path]), key=lambda run: (run.model, str(run.folder)))
    assert list(one.sets) == ["random"] and list(one.dev) == ["popular"]
    assert list(two.sets) == [] and list(two.dev) == ["random"] and two.folder == tmp_path / "two"
    assert list(base.sets) == ["random"] and not base.dev and list(other.dev) == ["random"]
    (given,) = read_runs([tmp_path / "one" / "pope"])
    assert list(given.dev) == ["popular"]


def test_runs_that_are_not_finished_are_left_out(world, tmp_path, capsys):
    world.train("stopped", status="stopped")
    world.ask("stopped/pope", "stopped")
    world.train("done")
    world.ask("done/pope", "done")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "pope_random.0123456789ab.part0.jsonl").write_text("")
    (tmp_path / "begun" / "status_all.json").write_text('{"state": "failed"}')
    world.train("unasked")
    (run,) = read_runs([tmp_path])
    assert run.name == "done"
    said = capsys.readouterr().err
    assert "begun: its POPE run is not finished (failed)" in said
    assert "stopped: its training is not finished (stopped)" in said
    assert f"trained, but not asked POPE's questions: {tmp_path / 'unasked'}\n" in said
    assert "not finished: " in refused([tmp_path / "begun"])


def test_folders_without_answers(world, tmp_path, capsys):
    world.ask("answers", "m/m")
    (tmp_path / "empty").mkdir()
    assert len(read_runs([tmp_path / "answers", tmp_path / "empty"])) == 1
    assert f"note: {tmp_path / 'empty'}: no finished POPE run in it" in capsys.readouterr().err
    assert "looked 4 levels down for run_*.json" in refused([tmp_path / "empty"])
    assert "no such folder" in refused([tmp_path / "nothing"])
    assert "a file; expected a folder" in refused([world.labels])
    (tmp_path / "empty" / "run_list.json").write_text("[]")  # another program's
    (tmp_path / "empty" / "run_mine.json").write_text('{"arguments": {}}')
    assert "no finished POPE run" in refused([tmp_path / "empty"])
    (tmp_path / "empty" / "run_all.json").write_text('{"argum')
    assert "run_all.json: broken JSON" in refused([tmp_path / "empty"])


# Models


def test_the_chain_goes_down_to_a_model_that_was_not_trained_here(world, tmp_path):
    world.train("sft", "org/base-7b", seed=3)
    world.train("dpo", "sft", beta=0.1, seed=5)
    world.train("more", f"{tmp_path}/sft,dpo", tune="lm_head", seed=6)
    for name in ("sft", "dpo", "more"):
        world.ask(f"{name}/pope", f"{name}/")
    world.ask("base/pope", "org/base-7b")
    runs = {run.name: run for run in read_runs([tmp_path])}
    assert {run.root for run in runs.values()} == {"org/base-7b"}
    assert {run.model for run in runs.values()} == {"base-7b"}
    assert {name: run.start for name, run in runs.items()} == {
        "base": "",
        "sft": "org/base-7b",
        "dpo": str(tmp_path / "sft"),
        "more": str(tmp_path / "dpo"),
    }
    assert {name: run.hadpo for name, run in runs.items()} == {"base": False, "sft": False, "dpo": True, "more": True}
    assert {name: run.seed for name, run in runs.items()} == {"base": None, "sft": 3, "dpo": 5, "more": 6}
    assert runs["base"].training is None and runs["base"].folder == tmp_path / "base" / "pope"
    assert "start" not in runs["sft"].settings and runs["more"].settings["start"] == "dpo"


def test_a_delta_of_another_program_stands_on_what_was_given(world, tmp_path):
    for name in ("lora", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    world.ask("one", "lora", model_base="base")
    world.ask("two", "base,lora")
    world.ask("three", "hub/lora", model_base="base")
    world.ask("four", "base")
    runs = read_runs([tmp_path])
    assert {run.root for run in runs} == {str(tmp_path / "base")}
    named = {run.name: run.settings.get("delta") for run in runs}
    assert named == {"four": None, "one": "lora", "three": "lora", "two": "lora"}
    assert len(grouped(runs)) == 2


def test_deltas_of_one_base_together_are_another_model_than_each(world, tmp_path):
    world.train("one", "org/base-7b", beta=0.1)
    world.train("two", "org/base-7b")
    world.ask("a", "two")
    world.ask("b", "one,two")
    world.ask("c", "org/base-7b,two")
    alone, both, named = read_runs([tmp_path])
    assert (alone.settings.get("with"), both.settings["with"], named.settings.get("with")) == (None, "one", None)
    assert (alone.hadpo, both.hadpo) == (False, True)
    groups = grouped([alone, both])
    assert len(groups) == 2 and differing(groups) == ["with"]


def test_a_base_that_moved_is_found_by_model_base(world, tmp_path):
    world.train("tuned", f"{tmp_path}/gone/base")
    (tmp_path / "base").mkdir()
    world.ask("tuned/pope", "tuned", model_base="base")
    (run,) = read_runs([tmp_path / "tuned"])
    assert run.start == run.root == str(tmp_path / "base")


@pytest.mark.parametrize("absolute", [True, False])
def test_a_run_that_was_moved_takes_its_answers_with_it(world, tmp_path, monkeypatch, absolute):
    world.train("tuned", "org/base-7b")
    world.ask("tuned/pope", f"{tmp_path}/tuned" if absolute else "tuned")
    (tmp_path / "tuned").rename(tmp_path / "moved")
    (tmp_path / "now" / "tuned").mkdir(parents=True)  # what a relative path means here is another thing
    monkeypatch.chdir(tmp_path / "now")
    (run,) = read_runs([tmp_path / "moved"])
    assert run.folder == tmp_path / "moved" and run.start == "org/base-7b"


def test_a_model_that_stands_on_itself_is_refused(world):
    world.train("one", "two")
    world.train("two", "one")
    assert "its training began from itself" in refused([world.ask("one/pope", "one")])


def test_answers_older_than_the_training_are_told(world, capsys):
    world.train("tuned")
    read_runs([world.ask("tuned/pope", "tuned", card={"started": "2025-01-01"})])
    assert "before the training of" in capsys.readouterr().err


# Groups


def test_groups_differ_in_more_than_seed_and_place(world, tmp_path):
    shared = {"beta": 0.1, "lora_enable": True, "lora_r": 64, "report_to": ["tensorboard"], "deepspeed": None}
    for rate in (2e-6, 1e-6):
        for seed in (1, 0):
            name = f"lr={rate}_seed={seed}"
            world.train(name, learning_rate=rate, seed=seed, save_steps=seed, run_name=name, **shared)
            world.ask(f"{name}/pope", name, batch_size=seed + 1)
    groups = grouped(read_runs([tmp_path / f"lr={rate}_seed={seed}" for seed in (1, 0) for rate in (2e-6, 1e-6)]))
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1], [0, 1]]
    assert [group.settings["learning_rate"] for group in groups] == [2e-6, 1e-6]
    assert "seed" not in groups[0].settings and groups[0].runs[0].settings["seed"] == 0
    assert not {"output_dir", "save_steps", "run_name", "report_to"} & groups[0].settings.keys()
    assert differing(groups) == ["learning_rate"]


def test_a_copy_is_no_other_seed(world, tmp_path, capsys):
    world.train("a", beta=0.1)
    card = json.loads((tmp_path / "a/run.json").read_text())
    (tmp_path / "a/run.json").write_text(json.dumps({**card, "run": "5f"}))
    world.ask("a/pope", "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (group,) = grouped(read_runs([tmp_path]))
    assert [run.folder.name for run in group.runs] == ["a"]
    assert f"{tmp_path}/b/pope: answers of the training that {tmp_path}/a/pope is of too" in capsys.readouterr().err


def test_an_argument_without_effect_parts_no_group(world, tmp_path, capsys):
    world.train("a", beta=0.1, lora_enable=False, lora_r=64, bits=16, quant_type="nf4", eval_steps=5)
    world.train("b", beta=0.1, lora_enable=False, lora_r=32, bits=16, quant_type="fp4", eval_steps=9, tf32=None)
    for name in "ab":
        world.ask(f"{name}/pope", name)
    (group,) = grouped(read_runs([tmp_path]))
    assert [run.name for run in group.runs] == ["a", "b"]
    assert f"seed 0 is there twice: {tmp_path}/a/pope and {tmp_path}/b/pope" in capsys.readouterr().err
    world.train("a", beta=0.1, lora_enable=True, lora_r=64, bits=16)
    assert differing(grouped(read_runs([tmp_path]))) == ["lora_enable", "lora_r"]


def test_data_of_one_path_and_two_contents_are_two(world, tmp_path, capsys):
    world.train("a", beta=0.1, data_path="pairs.jsonl", data="1234567890")
    world.train("b", beta=0.1, data_path="pairs.jsonl", data="abcdefghij", seed=1)
    for name in "ab":
        world.ask(f"{name}/pope", name)
    groups = grouped(read_runs([tmp_path]))
    assert [g.settings["data_path"] for g in groups] == ["pairs.jsonl (12345678)", "pairs.jsonl (abcdefgh)"]
    assert differing(groups) == ["data_path"]
    assert "2 different contents" in capsys.readouterr().err


def test_what_differs_comes_in_the_order_of_the_arguments(world, tmp_path):
    world.train("sft", "org/base-7b", num_train_epochs=1.0, learning_rate=1e-5)
    world.train("a", "sft", num_train_epochs=1.0, learning_rate=1e-6, beta=0.1, reference="auto", tune="lm_head")
    world.train("b", "sft", num_train_epochs=2.0, learning_rate=1e-6, beta=0.1, reference="auto", tune=None)
    world.train("c", "sft", num_train_epochs=2.0, learning_rate=1e-6, tune=None)
    for name in ("sft", "a", "b", "c"):
        world.ask(f"{name}/pope", name, **({"max_new_tokens": 8} if name == "b" else {}))
    world.ask("base", "org/base-7b", attn_implementation="eager")
    groups = grouped(read_runs([tmp_path]))
    # All went on from sft, whose learning rate is therefore none of their differences; beta is train_dpo.py's alone.
    assert differing(groups) == ["script", "num_train_epochs", "tune", "pope.attn_implementation", "max_new_tokens"]


def test_older_cards_mean_the_default_protocol(world):
    runs = [read_runs([world.ask("old", "m/m")])[0]]
    card = {"protocol": "hadpo", "hardware": {"gpus": ["A100"]}}
    runs += read_runs([world.ask("new", "m/m", conv_mode="llava_v1", dtype="float32", scores=None, card=card)])
    assert runs[0].settings == runs[1].settings
    assert runs[0].settings == dict(zip(ASKED, ("hadpo", "llava_v1", "float32", False, False, None, 512), strict=True))
    assert read_runs([world.ask("llava", "m/m", card={"protocol": "llava"})])[0].settings["conv_mode"] == "vicuna_v1"


def test_groups_made_by_hand(world):
    (run,) = read_runs([world.ask("answers", "m/m")])
    trained = replace(run, training={})
    groups = [Group((trained,), {"lora_r": 64}), Group((trained,), {}), Group((run,), {"beta": 1})]
    assert differing(groups) == ["lora_r"]


def test_it_is_free_of_torch():
    code = "import sys, llava.eval.evaluated, llava.eval.rerun; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_what_does_not_decide_are_arguments_of_the_scripts():
    from dataclasses import fields

    from llava.eval.evaluated import DATA_FILES, MEASURING
    from llava.train.arguments import (
        CaptionArguments,
        DPOTrainingArguments,
        ModelArguments,
        PreferenceArguments,
        PretrainTrainingArguments,
    )

    groups = (CaptionArguments, DPOTrainingArguments, ModelArguments, PreferenceArguments, PretrainTrainingArguments)
    known = {f.name for group in groups for f in fields(group)}
    assert {*NOT_DECIDING, *MEASURING, *DATA_FILES} <= known
    assert "beta" not in {f.name for f in fields(PretrainTrainingArguments)}
