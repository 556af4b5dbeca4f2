"""Sweeps: what a file means, what is refused, what is done once and never again; here and in the queue.

Fast tests play the scripts, the launcher and the report with small programs in a folder of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from llava.errors import UserError
from llava.interruption import Stopped
from slurm import foreground, gpus, launch, runs, submit, sweep, sweep_file, sweep_stages, watch
from slurm.sweep_stages import Record, Run, Stage, carry_out, last_error, unfinished

ROOT = Path(__file__).resolve().parent.parent

LAUNCH = """\
import signal, subprocess, sys
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
sys.exit(subprocess.call([sys.executable, *sys.argv[sys.argv.index("--") + 1:]]))
"""
SCRIPT = """\
import datetime, json, os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: os._exit(75))
words = sys.argv[1:]
if "--help" in words:
    print("--output_dir --beta --seed --tune --model_name_or_path --loss_type --coco_path --pope_path --set --scores "
          "--model-path --dtype --data_seed")
    sys.exit()
value = dict(zip(words, words[1:]))
folder = pathlib.Path(value["--output_dir"])
folder.mkdir(parents=True, exist_ok=True)
name = pathlib.Path(sys.argv[0]).stem
with open("starts", "a") as file:
    file.write(f"{name} {folder} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\\n")
while os.path.exists("hold"):
    time.sleep(0.01)
if name != "pope_eval" and value.get("--beta") == "9" and not os.path.exists("mended"):
    print("error: beta 9 is too much", file=sys.stderr, flush=True)
    print("error: rank 0 (local rank 0 on here) failed with exit code 2", flush=True)
    sys.exit(2)
card = {"status": "finished", "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
if name == "pope_eval":
    card["metrics"] = {"random": {"accuracy": 0.9}, "adversarial": {"accuracy": 0.78125}}
else:
    first = not os.path.exists("hidden")
    open("hidden", "w")
    took = (8, 0, 4.1) if first else (0, 8, 0.1)
    card["caches"] = {"hidden": dict(zip(("computed", "found", "seconds"), took))}
(folder / ("run_all.json" if name == "pope_eval" else "run.json")).write_text(json.dumps(card))
"""
MODULE = """\
import json, pathlib, sys
if "--help" in sys.argv:
    print("--model-path --coco_path --pope_path --set --output_dir --base_cache --dtype")
    sys.exit()
with open("starts", "a") as file:
    file.write(" ".join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]) + "\\n")
if "--output_dir" in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
    (folder / "diagnostics_adversarial.json").write_text("{}")
print("THE TABLE")
"""
SWEEP = """\
output_dir: out
train: train_dpo.py --tune lm_head --model_name_or_path base/model
grid: {beta: [0.1, 9], seed: [0, 1]}
pope: --coco_path coco --pope_path pope
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with scripts that only write what ours leave, and questions about pictures 1 to 3; the current one."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "llava" / "eval").mkdir(parents=True)
    for name, text in {
        "slurm/launch.py": LAUNCH,
        "train_dpo.py": SCRIPT,
        "train_pretrain.py": SCRIPT,
        "pope_eval.py": SCRIPT,
        "llava/eval/report.py": MODULE,
        "llava/eval/diagnose.py": MODULE,
    }.items():
        (tmp_path / name).write_text(text)
    for module in (launch, foreground, runs, sweep_file, sweep_stages):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(foreground, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(submit, "SETTINGS", tmp_path / "env.sh")
    (tmp_path / "env.sh").touch()
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)
    (tmp_path / "coco").mkdir()
    questions(tmp_path / "pope", 1, 2, 3)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


@pytest.fixture
def call(here, monkeypatch, capsys):
    """``call(*words) -> (exit code, stdout, stderr)`` of ``submit.py --sweep sweep.yaml``, in this process."""
    before = {number: signal.getsignal(number) for number in (*foreground.STOPPING, signal.SIGINT)}

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["submit.py", "--sweep", "sweep.yaml", "--logs", str(here / "logs"), *map(str, words)]
        )
        monkeypatch.setattr("llava.files._CLAIMED", {})
        capsys.readouterr()
        try:
            code = submit.main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def questions(folder: Path, *pictures: int) -> None:
    folder.mkdir()
    rows = [
        {"question_id": n, "image": f"{n}.jpg", "text": "Is there a dog in the image?", "label": "no"} for n in pictures
    ]
    for name in ("random", "popular", "adversarial"):
        (folder / f"coco_pope_{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def starts(folder: Path) -> list[str]:
    """What the scripts say of their starts since the last look."""
    lines = (folder / "starts").read_text().splitlines() if (folder / "starts").exists() else []
    (folder / "starts").unlink(missing_ok=True)
    return lines


# --- what a file means


def test_every_combination_in_the_files_order(here):
    (here / "sweep.yaml").write_text(
        "output_dir: out\n"
        "train: [train_dpo.py, --tune, lm_head]\n"
        "list: [{model_name_or_path: org/m, data_seed: 3}, {model_name_or_path: org/n}]\n"
        "grid: {beta: [1e-1, 0.2], loss_type: [[sigmoid, ipo], hinge]}\n"
        "pope: --coco_path coco --pope_path pope\n"
    )
    found = sweep_file.read_sweep(here / "sweep.yaml", select=False)
    trained = [run for run in found.runs if run.trains]
    assert [run.name for run in trained][:3] == [
        "model_name_or_path=org-m_data_seed=3_beta=1e-1_loss_type=sigmoid-ipo",
        "model_name_or_path=org-m_data_seed=3_beta=1e-1_loss_type=hinge",
        "model_name_or_path=org-m_data_seed=3_beta=0.2_loss_type=sigmoid-ipo",
    ]
    assert len(trained) == 8
    folder = f"out/{trained[0].name}"
    assert trained[0].first == [
        Stage(
            "train",
            "train_dpo.py --tune lm_head --model_name_or_path org/m --data_seed 3 --beta 1e-1 --loss_type sigmoid ipo "
            f"--output_dir {folder}".split(),
            folder,
        ),
        Stage(
            "pope",
            f"pope_eval.py --model-path {folder} --coco_path coco --pope_path pope --set all --scores "
            f"--output_dir {folder}/pope".split(),
            f"{folder}/pope",
        ),
    ]
    # Two models: each is asked untrained.
    assert [(run.name, run.first[0].command[2]) for run in found.runs if not run.trains] == [
        ("baseline_model=org-m", "org/m"),
        ("baseline_model=org-n", "org/n"),
    ]


def test_a_long_name_is_short_and_still_its_own(here):
    (here / "sweep.yaml").write_text(
        SWEEP.replace("beta: [0.1, 9]", f"tune: [{'x' * 200}a, {'x' * 200}b]").replace("--tune lm_head ", "")
    )
    names = [run.name for run in sweep_file.read_sweep(here / "sweep.yaml", select=False).runs if run.trains]
    assert len(set(names)) == 4 and {len(name) for name in names} == {120}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("grid", "gird", "unknown key gird; expected output_dir, train, grid, list"),
        ("output_dir: out\n", "", "output_dir is missing"),
        ("grid: {beta: [0.1, 9], seed: [0, 1]}", "", "nothing varies"),
        ("grid: {beta: [0.1, 9], seed: [0, 1]}", "grid: {}", "nothing varies"),
        ("beta: [0.1, 9]", "beta: [0.1, 0.10]", "beta=0.1_seed=0 and beta=0.10_seed=0 are the same run"),
        ("beta: [0.1, 9]", "tune: [a/b, 'a,b']", "tune stands in train and in grid or list"),
        ("beta: [0.1, 9]", "loss_type: [a/b, 'a,b']", "two runs would have the folder loss_type=a-b_seed=0"),
        ("beta: [0.1, 9]", "beta: [0.1, 9], beta: [3]", "line 3: beta stands there twice"),
        ("beta: [0.1, 9]", "beta: 0.1", "expected flags with a list of values"),
        ("beta: [0.1, 9]", "bta: [0.1, 9]", "train_dpo.py: unknown flag --bta; did you mean --beta?"),
        ("beta: [0.1, 9]", "output_dir: [a, b]", "output_dir has no place in a sweep"),
        ("seed: [0, 1]", "seed: [0, 1.5]", "seed: 1.5 is no seed"),
        ("grid:", "list: [{seed: 1}]\ngrid:", "seed stands in grid and in list"),
        ("--tune lm_head", "--tune lm_head --output-dir x", "train: --output-dir has no place in a sweep"),
        ("train_dpo.py", "python train_dpo.py", "train: expected train_dpo.py or train_pretrain.py"),
        ("train_dpo.py", "pope_eval.py", "found 'pope_eval.py'"),
        ("--tune lm_head", "--tune 'lm_head", "train: No closing quotation; quote as in a shell"),
        ("--model_name_or_path base/model", "", "train has no --model_name_or_path; name the baseline"),
        ("pope: --coco", "pope: --model-path x --coco", "pope: --model-path has no place in a sweep"),
        ("--coco_path coco", "--coco_path cocoa", "--coco_path cocoa: expected the folder of the pictures"),
        ("--pope_path pope", "--pope_path popes", "--pope_path popes: no coco_pope_*.json there"),
        ("--pope_path pope", "--pope_path pope/coco_pope_random.json", "no questions of the set 'popular' there"),
        ("--pope_path pope", "--pope_path pope --scors", "pope_eval.py: unknown flag --scors; did you mean --scores?"),
        ("pope:", "diagnose: --sat all\npope:", "diagnose: unknown flag --sat"),
        ("grid: {", "grid: [{", "sweep.yaml: line 4:"),
    ],
)
def test_a_file_is_refused_in_one_line_before_anything_starts(call, here, old, new, message):
    assert old in SWEEP
    (here / "sweep.yaml").write_text(SWEEP.replace(old, new, 1))
    code, out, err = call("--local")
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert not (here / "out").exists() and not (here / "starts").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--", "train_dpo.py"), "leave out what stands behind --"),
        (("--array", "runs.txt"), "--array and --sweep both say which runs"),
        (("--local", "--watch"), "--watch has no meaning with --local"),
        (("--select-on", "dev", "--local"), "--select-on dev needs dev"),
    ],
)
def test_flags_that_do_not_go_with_a_sweep(call, words, message):
    code, _, err = call(*words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_select_on_needs_a_sweep(call, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["submit.py", "--select-on", "dev", "--", "x.py"])
    with pytest.raises(SystemExit):
        submit.main()


def test_the_demos_file_is_six_runs_with_two_seeds_on_the_demos_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    content = sweep_file._load(ROOT / "demo" / "sweep.yaml")
    words = sweep_file._words(ROOT / "demo" / "sweep.yaml", "train", content["train"], {})
    varying = sweep_file._flags(ROOT / "demo" / "sweep.yaml", content, words)
    assert len(varying) == 12 and len({str({**run, "seed": 0}) for run in varying}) == 6
    recipe = (ROOT / "demo" / "run.py").read_text()
    start = words.index("--per_device_train_batch_size")
    for flag, value in itertools.pairwise(words[start : words.index("--save_strategy")]):
        assert not flag.startswith("--") or f"{flag} {value}" in recipe


# --- here


def test_a_sweep_is_done_once_and_what_failed_is_tried_again(call, here):
    code, out, err = call("--local")
    assert code == 1
    lines = out.splitlines()
    assert re.fullmatch(
        r"\[1/5\] baseline: POPE asked in \d+\.\d s; accuracy random 90\.00, adversarial 78\.12", lines[0]
    )
    assert re.fullmatch(r"\[2/5\] beta=0\.1_seed=0: trained in \d+\.\d s; hidden states computed in 4\.1 s", lines[1])
    assert re.fullmatch(r"\[3/5\] beta=0\.1_seed=1: trained in \d+\.\d s; hidden states found \(0\.1 s\)", lines[3])
    failed = r"training failed with exit code 2: beta 9 is too much; log: .*/logs/sweep-[\d-]+_4\.log"
    assert re.fullmatch(rf"\[5/5\] beta=9_seed=1: {failed}", lines[6])
    assert re.fullmatch(
        r"hidden states: computed in 4\.1 s by beta=0\.1_seed=0, whose training took .* s; found by 1 others, .*",
        lines[7],
    )
    assert lines[9] == "THE TABLE"
    assert lines[10] == "2 of 5 runs failed (out/failed.md); the same command tries them again:"
    assert lines[11].startswith("- beta=9_seed=0: training: beta 9 is too much (")
    assert (here / "out" / "failed.md").read_text().splitlines() == lines[11:]
    done = ["out/baseline", "out/beta=0.1_seed=0", "out/beta=0.1_seed=1"]
    assert starts(here) == [
        "pope_eval out/baseline/pope -",
        "train_dpo out/beta=0.1_seed=0 -",
        "pope_eval out/beta=0.1_seed=0/pope -",
        "train_dpo out/beta=0.1_seed=1 -",
        "pope_eval out/beta=0.1_seed=1/pope -",
        "train_dpo out/beta=9_seed=0 -",  # and no POPE of it
        "train_dpo out/beta=9_seed=1 -",
        f"report {' '.join(done)} --out out/report --baseline out/baseline",
    ]
    known = json.loads((here / "out/beta=9_seed=0/sweep.json").read_text())["stages"]
    assert known.keys() == {"train"}
    assert (known["train"]["state"], known["train"]["exit_code"]) == ("failed", 2)
    assert known["train"]["reason"] == "beta 9 is too much"

    (here / "mended").touch()
    code, out, err = call("--local")
    assert code == 0 and not (here / "out" / "failed.md").exists()
    assert "[2/5] beta=0.1_seed=0: training, POPE: done before\n" in out
    assert out.endswith("all 5 runs are done; report: out/report\n")
    assert [line.split()[:2] for line in starts(here)[:-1]] == [
        ["train_dpo", "out/beta=9_seed=0"],
        ["pope_eval", "out/beta=9_seed=0/pope"],
        ["train_dpo", "out/beta=9_seed=1"],
        ["pope_eval", "out/beta=9_seed=1/pope"],
    ]

    # Another file: one run is new, two are no longer in it.
    (here / "sweep.yaml").write_text(SWEEP.replace("[0.1, 9]", "[0.1, 0.2]").replace("seed: [0, 1]", "seed: [1]"))
    code, out, err = call("--local")
    assert code == 0
    assert "left alone and not reported: beta=0.1_seed=0, beta=9_seed=0, beta=9_seed=1\n" in err
    assert starts(here) == [
        "train_dpo out/beta=0.2_seed=1 -",
        "pope_eval out/beta=0.2_seed=1/pope -",
        "report out/baseline out/beta=0.1_seed=1 out/beta=0.2_seed=1 --out out/report --baseline out/baseline",
    ]
    # What is common to all has changed: the finished trainings are not those of the file.
    (here / "sweep.yaml").write_text(SWEEP.replace("lm_head", "projector"))
    code, _, err = call("--local")
    assert code == 2 and "out/beta=0.1_seed=0 holds a finished training with other flags" in err
    # Other questions are asked of the same trainings.
    (here / "sweep.yaml").write_text(
        SWEEP.replace("pope: ", "pope: --dtype float32 ").replace("seed: [0, 1]", "seed: [0]")
    )
    assert call("--local")[0] == 0
    assert [line.split()[0] for line in starts(here)] == ["pope_eval"] * 3 + ["report"]


def test_a_signal_ends_it_with_75_and_nothing_is_lost(call, here):
    (here / "mended").touch()
    (here / "hold").touch()

    def stop() -> None:
        while not (here / "starts").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    code, out, _ = call("--local")
    thread.join()
    assert code == 75
    assert out.splitlines() == [
        "[1/5] baseline: POPE stopped; the same command goes on from there",
        "stopped; the same command goes on from there",
    ]
    began = Record(Run("", "out/baseline", [], [])).stages["pope"]["started"]
    (here / "hold").unlink()
    assert call("--local")[0] == 0
    assert [line.split()[0] for line in starts(here)] == ["pope_eval"] * 2 + ["train_dpo", "pope_eval"] * 4 + ["report"]
    assert Record(Run("", "out/baseline", [], [])).stages["pope"]["started"] == began


def test_a_run_that_outlived_its_starter_is_waited_for(call, here):
    """As after kill -9 of submit.py alone: a second process would be refused by the first one's lock."""
    (here / "hold").touch()
    (here / "mended").touch()
    planned = sweep_file.read_sweep(here / "sweep.yaml", select=False).runs[1]
    left = subprocess.Popen([sys.executable, "slurm/launch.py", "--", *planned.first[0].command])
    record = Record(planned)
    record.begin(planned.first[0], None)
    record.runs_as(planned.first[0], left.pid)
    time.sleep(0.3)
    threading.Timer(0.1, (here / "hold").unlink).start()
    code, _, err = call("--local", "--parallel", 5)
    assert code == 0
    assert f"{planned.folder}: process {left.pid} of an earlier start is still at work; waiting for it\n" in err
    assert sum(line.startswith(f"train_dpo {planned.folder} ") for line in starts(here)) == 1
    assert 0.3 < Record(planned).of(planned.first[0])["seconds"] < 5  # both starters' time
    left.wait()


def test_what_counts_as_done(here):
    stage = Stage("train", ["train_dpo.py", "--beta", "1"], str(here / "run"))
    run = Run("run", stage.folder, [stage], [])
    record = Record(run)
    record.begin(stage, None)
    card = here / "run" / "run.json"
    for content, done in [
        ({"status": "running", "started": "9"}, False),
        ({"status": "finished", "started": "1999-01-01T00:00:00+00:00"}, False),  # of an earlier training
        (
            {"status": "finished", "started": record.of(stage)["started"], "wall_time_s": 2.5},
            True,
        ),  # killed before it could be noted
    ]:
        card.write_text(json.dumps(content))
        assert Record(run).is_done(stage) == done
    assert carry_out(run, run.first, sweep._never, sweep._nothing) == "done"
    noted = json.loads((here / "run/sweep.json").read_text())["stages"]["train"]
    assert (noted["state"], noted["seconds"]) == ("done", 2.5)
    assert unfinished(run, [Stage("train", ["train_dpo.py", "--beta", "2"], stage.folder)])
    card.unlink()
    assert unfinished(run, run.first)

    def silent(stage: Stage, record: Record) -> int:
        record.begin(stage, None)
        return 0

    assert carry_out(run, run.first, silent, sweep._nothing) == "failed"
    assert "no finished" in Record(run).of(stage)["reason"]


def test_two_sweeps_in_one_folder(call, here):
    holder = (
        "import sys; from llava.files import claim_folder; claim_folder('out', 'sweep'); print(1, flush=True); input()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", holder], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "1\n"
    code, out, err = call("--local")
    assert (code, out) == (2, "") and f"out is being written by process {other.pid}" in err
    other.communicate("\n")


def test_reasons(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: of an earlier stage\n")
    offset = log.stat().st_size
    assert last_error(log, offset) is None
    for said, reason in [
        ("Killed\n", "Killed"),
        ("Traceback (most recent call last):\n  x\nValueError: odd: 1\nerror: rank 0 (local rank 0 on n) failed with "
         "exit code 1\n", "ValueError: odd: 1"),
        ("[rank 1] error: no such file\nnote: that was all\n", "[rank 1] error: no such file"),
        ("error: rank 0 (local rank 0 on n) was ended by SIGKILL\n", "rank 0 (local rank 0 on n) was ended by SIGKILL"),
    ]:  # fmt: skip
        log.write_text("error: of an earlier stage\n" + said)
        assert last_error(log, offset) == reason


def test_runs_share_the_cards_of_a_box(call, here, monkeypatch):
    """Two runs of one card each at a time on a box of two; a third card is too small."""
    box = [gpus.Card(0, "GPU-0", 24000, 24576), gpus.Card(1, "GPU-1", 24000, 24576), gpus.Card(2, "GPU-2", 8000, 8192)]
    monkeypatch.setattr(gpus, "cards", lambda: box)
    monkeypatch.setattr(gpus, "LOCK_FOLDER", here)
    monkeypatch.setattr(gpus, "POLL_SECONDS", 0.01)
    (here / "mended").touch()
    (here / "hold").touch()
    seen = []

    def release() -> None:
        while len(seen) < 2:
            seen[:] = (here / "starts").read_text().splitlines() if (here / "starts").exists() else []
            time.sleep(0.01)
        time.sleep(0.2)
        seen[:] = (here / "starts").read_text().splitlines()
        (here / "hold").unlink()

    thread = threading.Thread(target=release)
    thread.start()
    code, out, err = call("--local", "--wait-gpus", 1, "--min-free", "22G")
    thread.join()
    assert code == 0, out + err
    assert sorted(line.split()[-1] for line in seen) == ["0", "1"]
    lines = starts(here)
    assert {line.split()[-1] for line in lines[:-1]} == {"0", "1"} and len(lines) == 10
    assert out.count(": trained in") == 4


def test_waiting_for_cards_ends_when_it_shall(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "cards", lambda: [gpus.Card(0, "GPU-0", 100, 24576)])
    monkeypatch.setattr(gpus, "LOCK_FOLDER", tmp_path)
    asked = iter([False, True])
    monkeypatch.setattr(gpus, "POLL_SECONDS", 0.001)
    with pytest.raises(Stopped, match="nothing was begun"), gpus.taken(1, None, stop=lambda: next(asked)):
        pass


# --- chosen on other pictures


def test_test_questions_are_for_the_best_on_dev(call, here, monkeypatch):
    questions(here / "dev", 7, 8)
    text = (
        SWEEP.replace("[0.1, 9]", "[0.1, 0.2]") + "dev: --coco_path coco --pope_path dev\ndiagnose: --set adversarial\n"
    )
    (here / "sweep.yaml").write_text(text)
    asked = []

    def chosen(folders: list[Path]) -> set[Path]:
        asked.append([folder.name for folder in folders])
        return {Path("out/beta=0.2_seed=0").resolve(), Path("out/beta=0.2_seed=1").resolve()}

    monkeypatch.setattr(sweep, "chosen", chosen)
    code, out, err = call("--local", "--select-on", "dev")
    assert code == 0, out + err
    assert asked == [[f"beta={beta}_seed={seed}" for beta in ("0.1", "0.2") for seed in (0, 1)]]
    lines = starts(here)
    assert [line.split()[1] for line in lines if line.startswith("pope_eval")] == [
        "out/baseline/dev",
        *(f"out/beta={beta}_seed={seed}/dev" for beta in ("0.1", "0.2") for seed in (0, 1)),
        *("out/baseline/pope", "out/beta=0.2_seed=0/pope", "out/beta=0.2_seed=1/pope"),
    ]
    assert [line for line in lines if line.startswith("diagnose")] == [
        f"diagnose --model-path out/beta=0.2_seed={seed} --coco_path coco --pope_path pope --base_cache "
        f"out/diagnose_base --set adversarial --output_dir out/beta=0.2_seed={seed}/pope"
        for seed in (0, 1)
    ]
    assert lines[-1].endswith("--baseline out/baseline --select-on dev")
    assert "best on the development set: beta=0.2_seed=0, beta=0.2_seed=1\n" in err
    assert call("--local", "--select-on", "dev")[0] == 0
    assert [line.split()[0] for line in starts(here)] == ["report"]

    shutil.rmtree(here / "dev")
    questions(here / "dev", 3, 4)
    code, _, err = call("--local", "--select-on", "dev")
    assert code == 2 and "dev and pope ask about 1 of the same pictures (3.jpg: dev/coco_pope_random.json" in err


# --- in the queue


@pytest.fixture
def slurm(here, monkeypatch):
    """Slurm's part, played: what was submitted, and the states of jobs."""
    played = {"put": [], "states": {}, "next": 70}

    def put(args, name, tasks, **options):
        played["put"].append((name, tasks, options))
        number, played["next"] = played["next"], played["next"] + 1
        ids = [f"{number}_{task}" for task in range(len(tasks))] if len(tasks) > 1 else [str(number)]
        return [(job, here / "logs" / f"{name}-{job}.log") for job in ids]

    monkeypatch.setattr(submit, "put", put)
    monkeypatch.setattr(watch, "states", lambda job: played["states"].get(job, {}))
    return played


def test_an_array_and_a_last_job_that_waits_for_it(call, here, slurm, monkeypatch):
    code, _, err = call("--gpus", 1, "--parallel", 2)
    assert code == 0, err
    (name, tasks, options), (last_name, last, last_options) = slurm["put"]
    assert (name, len(tasks), options) == ("sweep", 5, {})
    assert (last_name, last_options) == ("sweep-report", {"dependency": "afterany:70"})
    assert json.loads((here / "out/sweep_jobs.json").read_text()) == {"jobs": ["70", "71"]}
    json.dumps([call for call, _ in [*tasks, *last]])  # nothing that a node would have to import to read it

    # The tasks, as nodes run them: the first is queued again between its stages, another one fails.
    ran = []

    def run_job(command: list[str], **how: object) -> int:
        ran.append(command[0])
        if ran.count("pope_eval.py") == 2:
            return 75
        return subprocess.run([sys.executable, *command], stdout=log.open("a"), stderr=subprocess.STDOUT).returncode

    monkeypatch.setattr(sweep, "run_job", run_job)
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    (here / "logs").mkdir(exist_ok=True)
    codes = []
    for number in (0, 1, 1, 2, 3, 4):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        log = here / "logs" / f"sweep-70_{number}.log"
        (module, function, arguments), _ = tasks[number]
        assert (module, function) == ("slurm.sweep", "run_task")
        codes.append(sweep.run_task(**arguments))
    assert codes == [0, 75, 0, 0, 2, 2]
    assert ran[:4] == ["pope_eval.py", "train_dpo.py", "pope_eval.py", "pope_eval.py"]
    assert Record(Run("", "out/beta=9_seed=1", [], [])).stages["train"]["reason"] == "beta 9 is too much"
    starts(here)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert sweep.run_last(**last[0][0][2]) == 1
    assert starts(here)[-1].startswith("report out/baseline out/beta=0.1_seed=0 out/beta=0.1_seed=1 --out")
    assert len((here / "out/failed.md").read_text().splitlines()) == 2

    slurm["states"]["71"] = {"71": watch.State("PENDING")}
    code, _, err = call()
    assert code == 2 and "job 71 of this sweep still waits or runs; wait for it, or scancel 71" in err
    assert "still waits" in call("--local")[2]
    slurm["states"]["71"] = {"71": watch.State("COMPLETED")}
    assert call()[0] == 0
    _, tasks, _ = slurm["put"][2]
    assert [words[-1] for _, words in tasks] == ["out/beta=9_seed=0", "out/beta=9_seed=1"]
    (here / "mended").touch()
    assert call("--local")[0] == 0
    assert call()[0] == 0
    assert [(name, options) for name, _, options in slurm["put"][4:]] == [("sweep-report", {})]  # the table alone


def test_dry_run_prints_both_scripts(call, here):
    code, out, _ = call("--gpus", 1, "--parallel", 2, "--dry-run")
    assert code == 0
    assert "#SBATCH --array=0-4%2" in out and "#SBATCH --dependency=afterany:SWEEP" in out
    assert out.count("# runs: train_dpo.py") == 4 and out.count("# runs: -m llava.eval.report") == 1
    code, out, _ = call("--local", "--dry-run")
    assert code == 0 and out.count(" -- train_dpo.py ") == 4
    assert not (here / "out").exists() and not (here / "logs").exists()


# --- the real scripts


@pytest.mark.slow
def test_a_run_says_what_it_computed_and_what_it_found(run_script, dpo_flags, tmp_path):
    """Twelve pairs, eight distinct (tests/test_hidden_cache.py); six pictures (tests/test_work_saved.py)."""

    def caches(name: str, *flags: object) -> dict[str, dict[str, float]]:
        assert run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / name)[0] == 0
        return json.loads((tmp_path / name / "run.json").read_text())["caches"]

    head = ("--tune", "lm_head", "--cache_hidden", tmp_path / "hidden", "--reference", "cache")
    first, again = caches("first", *head), caches("again", *head)
    assert first.keys() == again.keys() == {"hidden", "reference"}
    for cache in first:
        assert (first[cache]["computed"], first[cache]["found"]) == (8, 0)
        assert (again[cache]["computed"], again[cache]["found"]) == (0, 8)
        assert again[cache]["seconds"] >= 0
    assert caches("plain", "--lora_enable", True) == {}
    seen = [caches(name, "--lora_enable", True, "--feature_cache", tmp_path / "seen")["features"] for name in "ab"]
    assert seen[0]["computed"] == seen[1]["found"] > 0 == seen[0]["found"] == seen[1]["computed"]


@pytest.mark.slow
def test_a_sweep_killed_halfway_goes_on_and_one_table_comes_out(golden, pope_world, tmp_path):
    """Six configurations, two seeds, the real scripts; kill -9 of submit.py and of all that it has started."""
    for name in ("pope", "coco"):
        (tmp_path / name).mkdir()
    for file in (pope_world / "pope").iterdir():
        (tmp_path / "pope" / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:12]))
    write_sweep(tmp_path, golden, pope_world / "coco")
    command = [sys.executable, ROOT / "slurm/submit.py", "--sweep", tmp_path / "sweep.yaml", "--local"]
    command += ["--logs", tmp_path / "logs"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("[4/13]") and "trained in" in line:
            break
    everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everything, timeout=30)
    before = cards_of(tmp_path / "out")
    assert 5 <= len(before) <= 7
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = cards_of(tmp_path / "out")
    assert {path: after[path] for path in before} == before
    assert len(after) == 12 + 13
    assert re.search(
        r"hidden states: computed in .* s by learning_rate=1e-3_beta=0.1_seed=0, .* found by 11 others", done.stdout
    )
    table = (tmp_path / "out/report/table.md").read_text()
    assert table in done.stdout or table.splitlines()[0] in done.stdout
    for rate in ("0.001", "0.002", "0.003"):
        assert rate in table
    status = subprocess.run(
        [sys.executable, ROOT / "slurm/submit.py", "--logs", tmp_path / "logs", "--status", tmp_path / "out"],
        **{"cwd": ROOT, "capture_output": True, "text": True},
    )
    assert status.stdout.count("finished") == 25


def write_sweep(folder: Path, golden: Path, coco: Path) -> None:
    """Six configurations of the tiny model's head with two seeds each, and a dozen questions of each of POPE's sets."""
    train = (
        f"train_dpo.py --model_name_or_path {golden}/tiny-llava-original --tune lm_head "
        f"--cache_hidden {folder}/hidden --vg_path {golden}/mini_vg "
        f"--desc_data_path {golden}/hadpo_data/desc_data.json --pope_data_path {golden}/hadpo_data/pope_data.json "
        "--image_aspect_ratio pad --model_max_length 2048 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 1 --num_train_epochs 1 --warmup_steps 0 --dataloader_num_workers 0 "
        "--save_strategy no --report_to none --gradient_checkpointing False --use_cpu True --bf16 False"
    )
    (folder / "sweep.yaml").write_text(
        f"output_dir: {folder}/out\ntrain: {train}\n"
        "grid: {learning_rate: [1e-3, 2e-3, 3e-3], beta: [0.1, 0.2], seed: [0, 1]}\n"
        f"pope: --coco_path {coco} --pope_path {folder}/pope --max_new_tokens 1\n"
    )


def cards_of(out: Path) -> dict[Path, int]:
    """When each finished training and POPE run has written its card."""
    cards = [*out.glob("*/run.json"), *out.glob("*/pope/run_all.json")]
    finished = [card for card in cards if json.loads(card.read_text())["status"] == "finished"]
    return {card: card.stat().st_mtime_ns for card in finished}


def test_a_file_that_is_no_text(here):
    (here / "sweep.yaml").write_bytes(b"output_dir: \xff")
    with pytest.raises(UserError, match=r"sweep\.yaml: not UTF-8 text at byte 12"):
        sweep_file.read_sweep(here / "sweep.yaml", select=False)


def test_bad_records_are_told(here):
    (here / "out/baseline").mkdir(parents=True)
    (here / "out/baseline/sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"out/baseline/sweep\.json: broken JSON"):
        Record(Run("baseline", "out/baseline", [], []))
