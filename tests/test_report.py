"""``python -m llava.eval.report`` on runs that lie on the disk, in its three modes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval import report
from llava.files import sha256

ROOT = Path(__file__).resolve().parent.parent
SAID = {"base": "yyyyyynn", "lr1": "yyynyyyn", "lr2": "ynynynyn"}


def pope(folder, said, labels, scores=True, model="/models/llava-7b", pictures="test"):
    """One set as ``pope_eval.py`` leaves it: of two questions about each of four pictures the first is to be a yes."""
    labels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    file = labels / "coco_pope_random.json"
    things = [
        (i + 1, f"{pictures}{i // 2}.jpg", f"Is there a {('dog', 'cat')[i % 2]} in the image?", "yn"[i % 2])
        for i in range(8)
    ]
    file.write_text(
        "".join(
            json.dumps({"question_id": n, "image": image, "text": text, "label": {"y": "yes", "n": "no"}[label]}) + "\n"
            for n, image, text, label in things
        )
    )
    rows = [
        {"question_id": n, "question": text, "answer": {"y": "Yes", "n": "No"}[c]}
        | ({"score": {"y": 0.9, "n": 0.2}[c] + n / 1000} if scores else {})
        for (n, _, text, _), c in zip(things, said, strict=True)
    ]
    (folder / "pope_random.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = [(label, c) for (_, _, _, label), c in zip(things, said, strict=True)]
    metrics = {"tp": ("y", "y"), "fp": ("n", "y"), "tn": ("n", "n"), "fn": ("y", "n")}
    card = {
        "command": f"python pope_eval.py --model-path {model} --set random",
        "working_directory": str(folder),
        "arguments": {"model_path": str(model), "model_base": None, "set": "random", "coco_path": "coco"},
        "git": None,
        "versions": {"python": "3.11"},
        "data": {str(file): {"sha256": sha256(file), "bytes": file.stat().st_size}},
        "hardware": {"gpus": [], "world_size": 1},
        "seed": None,
        "started": "2026-01-01T00:00:00+00:00",
        "status": "finished",
        "protocol": "hadpo",
        "metrics": {"random": {name: counts.count(pair) for name, pair in metrics.items()}},
    }
    (folder / "run_random.json").write_text(json.dumps(card))


def training(folder, learning_rate, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {"model_name_or_path": "/models/llava-7b", "learning_rate": learning_rate, "beta": 0.1, "seed": seed}
    card = {
        "command": f"python train_dpo.py --learning_rate {learning_rate} --output_dir {folder}",
        "working_directory": str(folder.parent),
        "arguments": arguments,
        "git": None,
        "versions": {"python": "3.11"},
        "data": {},
        "hardware": {"gpus": [], "world_size": 1},
        "seed": seed,
        "started": "2026-01-01T00:00:00+00:00",
        "status": "finished",
        "metrics": {},
    }
    (folder / "run.json").write_text(json.dumps(card))


@pytest.fixture
def sweep(tmp_path):
    """A base and two trained models, asked test and development questions."""
    folder = tmp_path / "sweep"
    labels = tmp_path / "labels"
    pope(folder / "base" / "pope", SAID["base"], labels / "test")
    for name, dev in (("lr1", "ynynynyn"), ("lr2", "ynynynyy")):
        training(folder / name, {"lr1": 1e-6, "lr2": 2e-6}[name])
        pope(folder / name / "pope", SAID[name], labels / "test", model=folder / name)
        pope(folder / name / "dev", dev, labels / "dev", model=folder / name, pictures="dev")
    return folder


@pytest.fixture
def run_report(monkeypatch, capsys, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        monkeypatch.setattr("llava.status.current", None)
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code = 0
        try:
            report.main()
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def table_of(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]


def test_report_of_a_sweep(sweep, run_report, tmp_path):
    (sweep / "failed.md").write_text("- lr3: training: error: out of memory (lr3/log)\n")
    code, out, err = run_report(sweep, "--out", "made", "--no-plots", "--bootstrap", 200)
    assert code == 0, err
    made = tmp_path / "made"
    names = {"table.md", "table.csv", "table.tex", "objects.csv", "report.json", "report.html", "tensorboard"}
    assert {file.name for file in made.iterdir()} == names
    assert (made / "table.md").read_text("utf-8") == out
    rows = table_of(out)
    assert [(row["HA-DPO"], row["learning_rate"], row["Accuracy"]) for row in rows[:3]] == [
        ("✗", "-", "50.00"),  # 3 of 4 dogs and 1 of 4 cats
        ("✓", "1e-06", "75.00"),
        ("✓", "2e-06", "100.00"),
    ]
    assert "Better, or only more reluctant to say yes?" in out and "at the same yes ratio" in out
    assert "- Failed: lr3: training: error: out of memory (lr3/log)" in out
    assert err.splitlines()[-1] == (
        "note: the report is in made (report.html, table.md, table.csv, table.tex, objects.csv, report.json)"
    )
    content = json.loads((made / "report.json").read_text("utf-8"))
    assert [len(content[key]) for key in ("groups", "rows", "at_ratio")] == [3, 5, 2] and content["selected"] is None
    assert content["objects"]["lr1"][0]["object"] == "cat"
    with (made / "objects.csv").open(newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"lr1", "lr2"}
    # Our own tables pass our own check.
    for name in ("table.md", "table.csv", "table.tex"):
        assert run_report("--check", made / name, "--questions", 8)[:2] == (0, ""), name


def test_given_folders_of_a_sweep_find_its_failures(sweep, run_report):
    (sweep / "failed.md").write_text("- lr3: training: error: out of memory\n")
    code, out, _ = run_report(sweep / "base", sweep / "lr1", "--out", "made", "--no-plots", "--bootstrap", 50)
    assert code == 0 and out.count("Failed: lr3") == 1


def test_selection_on_the_development_set(sweep, run_report, tmp_path):
    code, out, err = run_report(sweep, "--select-on", "dev", "--out", "made", "--no-plots", "--bootstrap", 50)
    assert code == 0, err
    development, test = out.split("## Test sets")
    assert [row["learning_rate"] for row in table_of(development)] == ["1e-06", "2e-06"]
    assert [row["Accuracy"] for row in table_of(test.split("##")[0])] == ["50.00", "75.00"]
    assert "Chosen on the development set among 2: llava-7b (learning_rate 1e-06): mean accuracy 100.00, 12.50" in test
    selected = json.loads((tmp_path / "made" / "report.json").read_text("utf-8"))["selected"]
    assert selected["folders"] == [str(sweep / "lr1")] and selected["settings"]["learning_rate"] == 1e-6
    assert (selected["value"], selected["next"], selected["metric"]) == (1.0, 0.875, "accuracy")


def test_a_run_without_test_answers(sweep, run_report):
    for name in ("pope_random.jsonl", "run_random.json"):
        (sweep / "lr1" / "pope" / name).unlink()
    code, out, err = run_report(sweep, "--out", "made", "--no-plots", "--bootstrap", 50)
    assert code == 0 and "lr1 has no answers to the test questions; it is left out" in err and "1e-06" not in out
    code, _, err = run_report(sweep, "--select-on", "dev", "--out", "made", "--no-plots")
    assert code == 2 and "lr1 has no answers to the test questions; ask it" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which runs? Pass the folders"),
        (["--check", "x.md", "runs"], "--check and FOLDER are different things to do"),
        (["--check", "x.md", "--rerun", "runs"], "--check and --rerun are different things to do"),
        (["--check", "x.md", "--out", "y"], "--out has no meaning with --check"),
        (["--rerun", "runs", "--no-plots"], "--no-plots has no meaning with --rerun"),
        (["--rerun", "runs", "--questions", "9"], "--questions has no meaning with --rerun"),
        (["runs", "--questions", "9"], "--questions has no meaning with FOLDER"),
        (["runs", "--metric", "f1"], "pass --select-on dev with it"),
        (["runs", "--bootstrap", "0"], "--bootstrap 0: expected 1 or more"),
        (["runs", "--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--check", "gone.md"], "--check gone.md: no such file"),
        (["--rerun", "gone"], "--rerun gone: no such folder"),
        (["gone"], "gone: no such folder"),
        (["--chek", "x"], "unknown flag --chek; did you mean --check?"),
    ],
)
def test_what_is_refused(run_report, arguments, message):
    code, out, err = run_report(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_out_must_be_a_folder_and_the_baseline_a_run(sweep, run_report, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out file: expected a folder" in run_report(sweep, "--out", "file")[2]
    assert "--baseline nobody: none of the runs" in run_report(sweep, "--baseline", "nobody")[2]
    assert not (tmp_path / "report").exists()


def test_check_exits_1_with_findings(run_report, tmp_path):
    head = "| Model | Set | Accuracy | Precision | Recall | F1 Score | Yes Ratio (%) |\n|---|---|---|---|---|---|---|\n"
    file = tmp_path / "table.md"
    # tp 1360 and fp 273 of 3000: accuracy 86.23, and 89.62 cannot be.
    file.write_text(head + "| A | popular | 89.62 | 83.28 | 90.67 | 86.82 | 54.43 |\n")
    code, out, err = run_report("--check", file)
    assert code == 1 and "86.23" in out and "line 3" in out and "1 finding" in err
    file.write_text(head + "| A | popular | 86.23 | 83.28 | 90.67 | 86.82 | 54.43 |\n")
    assert run_report("--check", file)[:2] == (0, "")


def test_rerun_prints_a_command(sweep, run_report):
    code, out, _ = run_report("--rerun", sweep / "lr1")
    assert code == 0 and "train_dpo.py --learning_rate 1e-06" in out and out.startswith("cd ")


def test_neither_torch_nor_transformers_is_needed(sweep, tmp_path):
    argv = ["report", str(sweep), "--out", str(tmp_path / "made"), "--no-plots", "--bootstrap", "50"]
    code = (
        f"import runpy, sys\nsys.argv = {argv}\n"
        "try:\n    runpy.run_module('llava.eval.report', run_name='__main__')\n"
        "finally:\n    print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_help_needs_not_even_numpy():
    code = (
        "import runpy, sys\nsys.argv = ['report', '--help']\n"
        "try:\n    runpy.run_module('llava.eval.report', run_name='__main__')\n"
        "except SystemExit:\n    print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "--select-on" in done.stdout
