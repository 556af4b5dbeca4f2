"""Runs on a real Slurm: two nodes with a network, a /tmp and four pretend cards each (``slurm_cluster``)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import losses_of, succeed
from slurm_cluster import Cluster, Unavailable, wait_until

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, request) -> Iterator[Cluster]:
    base = tmp_path_factory.getbasetemp()
    cluster = None
    try:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            cluster = Cluster(tmp_path_factory.mktemp("slurm"), shared=(base,))
            cluster.start()
    except Unavailable as why:
        if os.environ.get("CI") == "true" and os.geteuid() == 0:
            pytest.fail(f"no Slurm could be started: {why}")
        pytest.skip(f"no Slurm here: {why}")
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True, scope="module")
def in_the_repository() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")  # several threads on a busy core mostly wait for each other
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """32 preference pairs: eight steps of four an epoch."""
    pictures = ["a_wide_97x41.png", "b_tall_33x120.png", "c_square_64x64.png"]
    things = ["dog", "cat", "car", "cup", "tree", "man", "boat", "lamp"]
    rows = [
        {
            "image": pictures[i % 3],
            "prompt": f"Is there a {things[i % 8]}?",
            "chosen": f"No, only a {things[i * 3 % 8]}.",
            "rejected": f"Yes, a {things[i % 8]} and a {things[i * 5 % 7]}.",
        }
        for i in range(32)
    ]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def dpo(golden, pairs):
    """``dpo(folder, batch)``: the command of a short training, four pairs a step over all processes."""

    def command(folder: Path, batch: int, *more: object) -> list[object]:
        return [
            "train_dpo.py",
            *("--lora_enable", True, "--lora_r", 8, "--lora_alpha", 16, "--learning_rate", 1e-4, "--beta", 0.1),
            *("--model_name_or_path", golden / "tiny-llava-original", "--model_max_length", 512),
            *("--data_path", pairs, "--image_folder", golden / "images", "--warmup_steps", 0),
            *("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", 1, "--max_steps", STEPS),
            *("--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 10, "--save_total_limit", 2),
            *("--report_to", "tensorboard", "--dataloader_num_workers", 0, "--output_dir", folder, *more),
        ]

    return command


@pytest.fixture
def submit(cluster, tmp_path):
    """``submit(*options, *command) -> (job, log)``: through slurm/submit.py."""

    def put(*parts: object) -> tuple[str, Path]:
        done = cluster.run(sys.executable, "slurm/submit.py", "--logs", tmp_path, *parts, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        job = re.search(r"job (\d+)", done.stdout)[1]
        return job, tmp_path / f"dpo-{job}.log"

    return put


ZERO2 = ("--deepspeed", "zero_configs/zero2.json")


@pytest.fixture(scope="module")
def trained(cluster, dpo, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two nodes, two processes on each, ZeRO-2, from beginning to end; and what ``--watch`` showed of it."""
    folder = tmp_path_factory.mktemp("two_nodes")
    command = ["slurm/submit.py", "--nodes", 2, "--gpus", 2, "--logs", folder / "logs", "--watch"]
    done = cluster.run(sys.executable, *command, "--", *dpo(folder / "out", 1, *ZERO2), timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done


def text_of(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def reach(log: Path, step: int, part: int = 1) -> None:
    """Wait until the job's ``part`` (1: the first start) has done that step."""

    def reached() -> bool:
        parts = text_of(log).split("node 0 of ")
        return len(parts) > part and any(int(at) >= step for at in re.findall(rf"step (\d+)/{STEPS}", parts[part]))

    assert wait_until(reached, 300), text_of(log)


def pid_of(job: str, node: str, local_rank: int) -> int:
    """A job's rank, as this process sees it."""
    marks = {f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}", f"LOCAL_RANK={local_rank}"}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if marks <= set((process / "environ").read_bytes().decode().split("\0")):
                found.append(int(process.name))
    assert len(found) == 1, found
    return found[0]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Weights, logged losses and TensorBoard's steps are those of the run that was never stopped."""
    import torch
    from safetensors.torch import load_file
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    def weights_of(run: Path) -> dict[str, torch.Tensor]:
        rest = torch.load(run / "non_lora_trainables.bin", weights_only=True)
        return {**load_file(run / "adapter_model.safetensors"), **rest}

    got, want = weights_of(folder), weights_of(whole)
    assert got.keys() == want.keys()
    assert max((got[name] - want[name]).abs().max().item() for name in want) < 1e-6
    assert losses_of(folder) == pytest.approx(losses_of(whole), abs=1e-6)
    steps = [
        event.step
        for file in sorted((folder / "runs").rglob("*tfevents*"))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    ]
    assert steps == list(range(1, STEPS + 1))
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["max_steps"]) == ("finished", STEPS, STEPS)


def test_two_nodes_of_two_processes_compute_what_one_process_does(trained, dpo, run_script, tmp_path):
    folder, watched = trained
    succeed(run_script("train_dpo", *dpo(tmp_path / "one", 4)[1:]))
    assert losses_of(folder) == pytest.approx(losses_of(tmp_path / "one"), abs=1e-4)
    assert len(losses_of(folder)) == STEPS
    engine = json.loads((folder / "run.json").read_text())["engine"]["model"]
    assert "DeepSpeedEngine" in engine
    for rank, place in enumerate(["local 0 on n1", "local 1 on n1", "local 0 on n2", "local 1 on n2"]):
        assert watched.stdout.count(f"rank {rank} ({place}): cpu") == 1
    for state in ("RUNNING", "COMPLETED"):
        assert state in watched.stdout


@pytest.fixture(scope="module")
def questions(pope_world, tmp_path_factory) -> dict[str, Path]:
    """COCO_PATH and POPE_PATH: the first 24 of each of POPE's sets, about four pictures."""
    folder = tmp_path_factory.mktemp("questions")
    for file in (pope_world / "pope").iterdir():
        (folder / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:24]))
    return {"COCO_PATH": pope_world / "coco", "POPE_PATH": folder}


@pytest.fixture
def ask(cluster, questions):
    """``ask(variables, *arguments) -> log``: ``sbatch slurm/pope.sh`` to the end; the log is where the README says."""
    logs = []

    def run(variables: dict[str, object], *arguments: object) -> str:
        job = cluster.submit(*arguments, **{name: str(value) for name, value in (variables | questions).items()})
        logs.append(ROOT / "slurm" / "logs" / f"pope-{job}.log")
        ended = cluster.wait(job)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), text_of(logs[-1])
        return text_of(logs[-1])

    yield run
    for log in logs:
        log.unlink(missing_ok=True)


@pytest.fixture
def asked_here(run_script, questions):
    """``asked_here(model, set, *flags) -> (folder with the answers, table)``: pope_eval.py by itself."""

    def run(model: Path, name: str, folder: Path, *flags: object) -> str:
        paths = ("--coco_path", questions["COCO_PATH"], "--pope_path", questions["POPE_PATH"])
        return succeed(
            run_script("pope_eval", "--model-path", model, *paths, "--set", name, "--output_dir", folder, *flags)
        )

    return run


def test_pope_sh_asks_one_set_of_the_model(ask, asked_here, golden, tmp_path):
    model = tmp_path / "tiny-llava"
    shutil.copytree(golden / "tiny-llava-original", model)
    shutil.copytree(golden / "tiny-clip", tmp_path / "tiny-clip")
    log = ask({"MODEL_PATH": model}, "slurm/pope.sh", "random")
    table = asked_here(model, "random", tmp_path / "here")
    name = "pope_random.jsonl"
    assert (model / "pope" / name).read_text() == (tmp_path / "here" / name).read_text()
    assert row_of(log, "random") == row_of(table, "random")


def test_pope_sh_asks_all_sets_of_a_run_on_two_nodes(ask, asked_here, trained, tmp_path):
    run = trained[0]
    log = ask({}, "--nodes=2", "slurm/pope.sh", "all", run, "--max_new_tokens", 4)
    assert "rank 0 (local 0 on n1)" in log
    assert "rank 1 (local 0 on n2)" in log
    table = asked_here(run, "all", tmp_path / "here", "--max_new_tokens", 4)
    for name in ("random", "popular", "adversarial"):
        answers = (run / "pope" / f"pope_{name}.jsonl").read_text()
        assert answers == (tmp_path / "here" / f"pope_{name}.jsonl").read_text()
        assert len({json.loads(line)["question_id"] for line in answers.splitlines()}) == 24
        assert row_of(log, name) == row_of(table, name)


def row_of(text: str, name: str) -> list[str]:
    """The numbers in the table's row of a set."""
    (row,) = [line for line in text.splitlines() if f"| {name} |" in line]
    return row.split("|")[3:]


def test_a_preempted_run_and_one_whose_time_is_up_go_on(cluster, trained, dpo, submit, tmp_path):
    """A job of the higher partition takes the nodes; later comes the signal that announces the time limit."""
    job, log = submit("--nodes", 2, "--gpus", 2, "--", *dpo(tmp_path / "out", 1, *ZERO2))
    reach(log, 3)
    other = cluster.submit(
        *("--partition=high", "--nodes=2", "--gpus-per-node=4", "--output=/dev/null", "--wrap", "sleep 1")
    )
    cluster.wait(other, "COMPLETED")
    reach(log, 15, part=2)
    cluster.run("scancel", "--signal=USR2", "--batch", job)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), text_of(log)
    assert_same_run(tmp_path / "out", trained[0])
    assert json.loads((tmp_path / "out" / "status.json").read_text())["restarts"] == 2


def test_a_rank_killed_on_the_second_node_costs_the_steps_since_the_checkpoint(cluster, trained, dpo, submit, tmp_path):
    job, log = submit("--nodes", 2, "--gpus", 2, "--", *dpo(tmp_path / "out", 1, *ZERO2))
    reach(log, 12)
    os.kill(pid_of(job, "n2", local_rank=1), signal.SIGKILL)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), text_of(log)
    first, second = text_of(log).split("node 0 of ")[1:]
    assert "SIGKILL" in first
    assert int(re.search(rf"step (\d+)/{STEPS}", second)[1]) % 10 == 1  # on from a periodic checkpoint
    assert_same_run(tmp_path / "out", trained[0])


def test_a_job_is_queued_again_no_more_often_than_allowed(cluster, dpo, submit, tmp_path):
    job, log = submit("--gpus", 1, "--max-requeues", 1, "--", *dpo(tmp_path / "out", 4))
    for part in (1, 2):
        reach(log, 2, part)
        cluster.run("scancel", "--signal=USR2", "--batch", job)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "1"), text_of(log)
    assert "--max-requeues 1" in text_of(log)
    table = cluster.run(sys.executable, "slurm/submit.py", "--logs", tmp_path, "--status").stdout
    (row,) = [line.split() for line in table.splitlines() if str(tmp_path / "out") in line]
    assert row[1] == "stopped"
    assert row[-1] == job


def test_a_cancelled_job_is_reported_without_sacct(cluster, dpo, tmp_path):
    assert cluster.run("sacct").returncode != 0
    # Cancelled long before its end, though ``--watch`` looks only every few seconds.
    training = dpo(tmp_path / "out", 4, "--max_steps", 20_000)
    command = ["slurm/submit.py", "--gpus", 1, "--logs", tmp_path, "--watch", "--", *training]
    watching = subprocess.Popen(
        cluster.command(sys.executable, *command), stdout=subprocess.PIPE, text=True, env=cluster.environment
    )
    lines = []
    for line in watching.stdout:
        lines.append(line)
        if "step 3/20000" in line:
            job = re.search(r"job (\d+)", "".join(lines))[1]
            cluster.run("scancel", job)
    assert watching.wait(60) not in (0, None), lines
    assert "CANCELLED" in "".join(lines[-5:])
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "0"


def test_an_array_is_a_job_for_every_line(cluster, dpo, tmp_path):
    rates = ["1e-5", "1e-4", "1e-3"]
    lines = [f"--learning_rate {rate} --output_dir {tmp_path / rate} --max_steps 2\n" for rate in rates]
    (tmp_path / "runs.txt").write_text("".join(lines))
    done = cluster.run(
        *(sys.executable, "slurm/submit.py", "--gpus", 1, "--logs", tmp_path, "--watch"),
        *("--array", tmp_path / "runs.txt", "--", *dpo(tmp_path / "unused", 4)),
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job = re.search(r"job (\d+)", done.stdout)[1]
    for task, rate in enumerate(rates):
        assert cluster.job(f"{job}_{task}")["JobState"] == "COMPLETED"
        run = json.loads((tmp_path / rate / "run.json").read_text())
        assert float(run["arguments"]["learning_rate"]) == float(rate)
        assert json.loads((tmp_path / rate / "status.json").read_text())["job"] == f"{job}_{task}"
    first = [losses_of(tmp_path / rate)[0] for rate in rates]
    assert first == pytest.approx([first[0]] * 3, abs=1e-6)
    assert len({losses_of(tmp_path / rate)[1] for rate in rates}) == 3


def test_a_sweep_is_an_array_and_a_job_that_reports(cluster, dpo, golden, questions, tmp_path):
    """One run is stopped and queued again while it trains, another cannot train; only that one is tried again."""
    out, logs = tmp_path / "out", tmp_path / "logs"

    def write(rate: str) -> None:
        words = [str(word) for word in dpo(Path("unused"), 4)]
        for flag in ("--output_dir", "--learning_rate"):  # the sweep's
            at = words.index(flag)
            del words[at : at + 2]
        content = {
            "output_dir": str(out),
            "train": words,
            "grid": {"learning_rate": ["1e-4", rate]},
            "pope": f"--coco_path {questions['COCO_PATH']} --pope_path {questions['POPE_PATH']} --max_new_tokens 1",
            "baseline": str(golden / "tiny-llava-original"),
        }
        (tmp_path / "sweep.yaml").write_text(json.dumps(content))  # which is YAML too

    def submit_sweep(*more: object) -> subprocess.CompletedProcess[str]:
        command = ["slurm/submit.py", "--sweep", tmp_path / "sweep.yaml", "--gpus", 1, "--logs", logs, *more]
        return cluster.run(sys.executable, *command, timeout=500)

    write("nonsense")
    done = submit_sweep()
    assert done.returncode == 0, done.stdout + done.stderr
    array, last = re.findall(r"submitted job (\d+)", done.stdout)
    assert "Dependency=afterany:" + array in cluster.run("scontrol", "show", "job", last).stdout
    refused = submit_sweep()
    assert refused.returncode == 2 and f"job {array} of this sweep still waits or runs" in refused.stderr
    reach(logs / f"sweep-{array}_1.log", 3)
    cluster.run("scancel", "--signal=USR2", "--batch", f"{array}_1")
    ended = cluster.wait(last)
    said = text_of(logs / f"sweep-report-{last}.log")
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), said
    assert cluster.job(f"{array}_1")["Restarts"] == "1"
    states = [cluster.job(f"{array}_{task}")["JobState"] for task in range(3)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]
    assert re.search(r"- learning_rate=nonsense: training: .*nonsense", (out / "failed.md").read_text())
    assert "1 of 3 runs failed" in said
    card = json.loads((out / "learning_rate=1e-4" / "run.json").read_text())
    assert (card["status"], len(card["earlier"])) == ("finished", 1)

    write("2e-4")
    done = submit_sweep("--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    again = re.findall(r"submitted job (\d+)", done.stdout)[0]
    assert re.findall(r"job (\d+(?:_\d+)?): COMPLETED", done.stdout)[0] == again  # no array: one run was left
    assert json.loads((out / "learning_rate=1e-4" / "run.json").read_text()) == card
    assert not (out / "failed.md").exists()
    table = (out / "report" / "table.md").read_text()
    assert "0.0001" in table and "0.0002" in table
    status = cluster.run(sys.executable, "slurm/submit.py", "--logs", logs, "--status").stdout
    assert status.count("finished") >= 5


def test_bad_input_fails_the_job_once(cluster, golden, tmp_path):
    log = tmp_path / "job.log"
    job = cluster.submit(
        *("--gpus-per-node=1", "--cpus-per-task=1", f"--output={log}", "slurm/dpo.sh", "--vg_path", tmp_path / "VG"),
        OUTPUT_ROOT=str(tmp_path),
        DPO_MODEL=str(golden / "tiny-llava-original"),
        VISION_TOWER=str(golden / "tiny-clip"),
        DESC_DATA=str(golden / "hadpo_data" / "desc_data.json"),
        POPE_DATA=str(golden / "hadpo_data" / "pope_data.json"),
    )
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), text_of(log)
    (error,) = [line for line in text_of(log).splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "VG") in error
    assert "Traceback" not in text_of(log)
