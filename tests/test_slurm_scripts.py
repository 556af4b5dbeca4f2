"""slurm/*.sh: what they run, where they find it, and what they tell sbatch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import TRAINING, clean_environment, parse_training  # noqa: F401 (a fixture)

import pope_eval
from llava.train.trainable import choose_parts
from slurm import launch

ROOT = Path(__file__).resolve().parent.parent
SLURM = ROOT / "slurm"
JOBS = ("pope", "dpo", "pretrain", "finetune")

FAKE = {
    "sbatch": 'printf "%s\\0" "$@" > "$FAKE/sbatch"; env -0 > "$FAKE/env"',
    "srun": 'printf "%s\\0" "$@" > "$FAKE/srun"; exit ${SRUN:-0}',
    "scontrol": 'printf "   Partition=main\\n   Command=%s\\n   WorkDir=/\\n" "$COMMAND"',
}


@pytest.fixture
def start(tmp_path):
    """``start(script, *args, **env)``: with stand-ins for Slurm's programs, which record their arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in FAKE.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "SBATCH_", "LLAVA_", "CUDA_"))}
    base = {**clean, "FAKE": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}"}

    def run(script: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", script, *args], cwd=tmp_path, env={**base, **env}, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.fixture
def in_job(start, tmp_path):
    """``in_job(name, *args, **env)``: as Slurm starts it, from a copy in a folder of its own."""
    spool = tmp_path / "spool"
    spool.mkdir()

    def run(name: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        copy = spool / "slurm_script"
        shutil.copy(SLURM / f"{name}.sh", copy)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "main", "SLURM_GPUS_ON_NODE": "1", "OUTPUT_ROOT": "runs"}
        return start(copy, *args, **{**slurm, "COMMAND": " ".join([str(SLURM / f"{name}.sh"), *args]), **env})

    return run


def recorded(file: Path) -> list[str]:
    return file.read_text().split("\0")[:-1]


def launched(folder: Path):
    """Options of launch.py, script and arguments, as srun was told them."""
    words = recorded(folder / "srun")
    args, (script, *argv) = launch.parse_args(words[words.index(str(SLURM / "launch.py")) + 1 :])
    assert Path(script).parent == ROOT
    return args, Path(script).name, argv


def asked(monkeypatch, argv: list[str]):
    monkeypatch.setattr(sys, "argv", ["pope_eval.py", *argv])
    return pope_eval.parse_args()


@pytest.mark.parametrize("file", sorted(SLURM.glob("*.sh")), ids=lambda file: file.name)
def test_syntax(file):
    assert subprocess.run(["bash", "-n", file], capture_output=True, text=True).stderr == ""
    assert os.access(file, os.X_OK) == (file.stem in JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_what_sbatch_reads(name):
    lines = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (SLURM / f"{name}.sh").read_text(), flags=re.MULTILINE))
    assert lines == {
        "job-name": name,
        "output": "slurm/logs/%x-%j.log",
        "open-mode": "append",
        "nodes": "1",
        "ntasks-per-node": "1",
        "gpus-per-node": "1",
        "cpus-per-task": "8",
        "requeue": "",
        "signal": "B:USR2@180",
    }
    assert (SLURM / "logs" / ".gitignore").exists(), "Slurm makes no folder for the log, and fails without a word"


def test_pope(in_job, tmp_path, monkeypatch):
    done = in_job("pope", "random", COCO_PATH="my coco", LAUNCHER="deepspeed", PROCESSES="2")
    assert (done.returncode, done.stderr) == (0, "")
    options, script, argv = launched(tmp_path)
    assert (options.launcher, options.processes, script) == ("deepspeed", 2, "pope_eval.py")
    args = asked(monkeypatch, argv)
    assert (args.set, args.model_path, args.model_base) == ("random", "runs/ha_dpo", None)
    assert (args.coco_path, args.pope_path) == ("my coco", str(ROOT / "data/POPE"))

    in_job("pope", "all", "--scores", MODEL_PATH="a", MODEL_BASE="b")
    args = asked(monkeypatch, launched(tmp_path)[2])
    assert (args.set, args.model_path, args.model_base, args.scores) == ("all", "a", "b", True)

    in_job("pope", "adv", "runs/my run", "--batch_size", "4", MODEL_PATH="a")
    args = asked(monkeypatch, launched(tmp_path)[2])
    assert (args.set, args.model_path, args.batch_size) == ("adv", "runs/my run", 4)


def test_pope_wants_a_set(in_job, tmp_path):
    for args, message in (((), "no SET"), (("ramdom",), "SET 'ramdom' is not known")):
        done = in_job("pope", *args)
        assert done.returncode == 2
        assert re.fullmatch(rf"error: {message}; expected: .*random, popular, adv, all\n", done.stderr)
    assert not (tmp_path / "srun").exists()


@pytest.mark.parametrize(
    ("name", "script", "parts", "batch"),
    [
        ("dpo", "train_dpo.py", {"lora"}, 16),
        ("pretrain", "train_pretrain.py", {"projector"}, 32),
        ("finetune", "train_pretrain.py", {"projector", "backbone", "lm_head"}, 16),
    ],
)
@pytest.mark.usefixtures("clean_environment")
def test_training(in_job, tmp_path, monkeypatch, name, script, parts, batch):
    data = {"PRETRAIN_DATA": "pre.json", "FINETUNE_DATA": "fine.json", "DPO_MODEL": "m", "LANGUAGE_MODEL": "l"}
    assert in_job(name, "--learning_rate", "0.5", "--max_steps", "3", **data).returncode == 0
    _, started, argv = launched(tmp_path)
    assert started == script
    assert script in TRAINING
    monkeypatch.chdir(tmp_path)
    model, _, train = parse_training(script, argv, tmp_path)
    assert choose_parts(model, train) == parts
    assert (train.per_device_train_batch_size, train.learning_rate, train.max_steps) == (batch, 0.5, 3)
    assert (train.save_strategy, train.save_total_limit) == ("steps", 1)
    assert train.save_steps <= 500, "a job that is killed goes on from here"
    assert train.output_dir.startswith("runs/")


@pytest.mark.parametrize(
    ("nodes", "cards", "processes", "own", "expected"),
    [
        ("1", "1", "", [], "8"),
        ("1", "2", "", [], "4"),
        ("2", "4", "", [], "1"),
        ("1", "0", "4", [], "2"),
        ("1", "3", "", [], None),
        ("1", "16", "", [], None),
        ("1", "3", "", ["--gradient-accumulation-steps", "5"], "5"),
    ],
)
def test_a_step_has_as_many_records_on_fewer_cards(in_job, tmp_path, nodes, cards, processes, own, expected):
    job = {"SLURM_JOB_NUM_NODES": nodes, "SLURM_GPUS_ON_NODE": cards, "PROCESSES": processes}
    done = in_job("dpo", *own, DPO_MODEL="m", **job)
    if expected is None:
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {cards} processes cannot share the batch of a recipe for 8 GPUs; pass ")
        assert not (tmp_path / "srun").exists()
        return
    argv = launched(tmp_path)[2]
    flags = [arg.replace("-", "_") for arg in argv]
    last = len(flags) - 1 - flags[::-1].index("__gradient_accumulation_steps")
    assert (done.returncode, argv[last + 1]) == (0, expected)


def test_a_failed_step_fails_the_job(in_job):
    done = in_job("pope", "random", SRUN="3")
    assert (done.returncode, done.stderr) == (3, "job 7: failed with exit code 3\n")
    assert in_job("pope", "random", MAX_REQUEUES="-1").returncode == 2


def test_settings_that_sbatch_did_not_see(in_job):
    ours = {"PARTITION": "gpu,long", "ACCOUNT": "me", "GPUS_PER_NODE": "a100:4", "SLURM_JOB_ACCOUNT": "me"}
    done = in_job("pope", "random", **ours)
    assert done.stderr == (
        "note: the job has partition main and not gpu,long, GPUs a node: 1 and not 4: "
        "sbatch does not read slurm/env.sh; bash in its place submits with it\n"
    )
    for change in ({"LLAVA_SETTINGS": "taken"}, {"SLURM_JOB_PARTITION": "long", "SLURM_GPUS_ON_NODE": "4"}):
        assert in_job("pope", "random", **{**ours, **change}).stderr == ""


def test_repository_not_found(in_job):
    done = in_job("dpo", COMMAND="(null)")
    assert done.returncode == 2
    assert done.stderr == "error: no common.sh; give sbatch the path of slurm/dpo.sh itself\n"


def test_started_by_hand_it_submits_itself(start, tmp_path):
    cluster = {"PARTITION": "gpu", "ACCOUNT": "me", "QOS": "q", "CONSTRAINT": "c", "HOURS": "8", "MEMORY": "9G"}
    ours = {**cluster, "GPUS_PER_NODE": "a100:4", "SIGNAL_LEAD": "60", "NODES": "2", "CPUS_PER_TASK": "6"}
    done = start(SLURM / "dpo.sh", "--beta", "0.2", SBATCH_ACCOUNT="you", **ours)
    assert (done.returncode, done.stderr) == (0, "")
    assert recorded(tmp_path / "sbatch") == [
        f"--output={SLURM}/logs/%x-%j.log",
        "--nodes=2",
        "--cpus-per-task=6",
        str(SLURM / "dpo.sh"),
        "--beta",
        "0.2",
    ]
    variables = dict(line.split("=", 1) for line in recorded(tmp_path / "env"))
    assert {name: value for name, value in variables.items() if name.startswith("SBATCH_")} == {
        "SBATCH_PARTITION": "gpu",
        "SBATCH_ACCOUNT": "you",
        "SBATCH_QOS": "q",
        "SBATCH_CONSTRAINT": "c",
        "SBATCH_TIMELIMIT": "8:00:00",
        "SBATCH_MEM_PER_NODE": "9G",
        "SBATCH_GPUS_PER_NODE": "a100:4",
        "SBATCH_SIGNAL": "B:USR2@60",
    }
    start(SLURM / "dpo.sh")
    assert recorded(tmp_path / "sbatch")[1:] == [str(SLURM / "dpo.sh")]
    assert not [line for line in recorded(tmp_path / "env") if line.startswith("SBATCH_")]


def test_no_slurm_here(start, tmp_path):
    programs = tmp_path / "few"
    programs.mkdir()
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    done = start(SLURM / "pope.sh", "random", PATH=str(programs))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: there is no Slurm on this machine; .*--local.*\n", done.stderr)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_settings_can_be_sourced(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} on this machine")
    text = f'. "{SLURM}/env.sh"; echo "$LLAVA_ROOT $SBATCH_PARTITION $MODEL_PATH"'
    env = {"PATH": os.environ["PATH"], "PARTITION": "gpu"}
    done = subprocess.run([shell, "-c", text], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{ROOT} gpu {ROOT}/checkpoints/ha_dpo\n", "")
