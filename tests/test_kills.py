"""Runs that end without warning, and are started again until they are done: they end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import forked
import pytest
import torch
from conftest import GOLDEN, ROOT, logs_of
from forked import AtCall, AtFile
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

# Dropout draws from the generators; checkpoints fall inside epochs, and every other one between two log lines.
STEPS, LOG, SAVE = 12, 2, 3
FLAGS = (
    *("--model_name_or_path", GOLDEN / "tiny-llava-original", "--vg_path", GOLDEN / "mini_vg"),
    *("--desc_data_path", GOLDEN / "hadpo_data" / "desc_data.json"),
    *("--pope_data_path", GOLDEN / "hadpo_data" / "pope_data.json", "--model_max_length", 2048, "--beta", 0.1),
    *("--lora_enable", True, "--lora_r", 8, "--lora_alpha", 16, "--lora_dropout", 0.1, "--learning_rate", 1e-3),
    *("--lr_scheduler_type", "cosine", "--warmup_steps", 2, "--gradient_accumulation_steps", 2),
    *("--per_device_train_batch_size", 1, "--logging_steps", LOG),
    *("--save_strategy", "steps", "--save_steps", SAVE, "--save_total_limit", 2),
)
# Processes, the flags that make STEPS of the 12 pairs, and the largest difference from the run that was never killed.
KINDS = {
    "one process": (1, ("--num_train_epochs", 2), 0.0),
    "workers": (1, ("--num_train_epochs", 2, "--dataloader_num_workers", 2), 0.0),
    "zero2": (2, ("--num_train_epochs", 4, "--deepspeed", ROOT / "zero_configs" / "zero2.json"), 1e-6),
}
SEEDS = {"one process": 20, "workers": 4, "zero2": 20}
STEP = "llava.train.trainer.DPOTrainer.training_step"
# Files of checkpoints and of the end; the heartbeat and TensorBoard's follow the clock.
SAVED = r"^(?!.* (runs/|\.?status\.json))"


def start(kind, folder, die=None):
    size, flags, _ = KINDS[kind]
    return forked.start("train_dpo", [*FLAGS, *flags, "--output_dir", folder], world_size=size, die=die)


def finish(kind, folder):
    run = start(kind, folder)
    assert run.wait() == [0] * KINDS[kind][0], run.text
    return run


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """``never_killed(kind)``: folder and run that the others must equal."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("whole") / "out"
            made[kind] = folder, finish(kind, folder)
        return made[kind]

    return get


def weights(folder):
    return load_file(folder / "adapter_model.safetensors") | torch.load(
        folder / "non_lora_trainables.bin", weights_only=True
    )


def lines(folder):
    """What was logged of each step, without what the clock decides."""
    logs = [log for log in logs_of(folder) if "loss" in log]
    assert [log["step"] for log in logs] == list(range(LOG, STEPS + 1, LOG))
    return logs


def points(folder):
    """Every point of ``train/loss`` in any of the folder's TensorBoard files, in the order of steps."""
    found = []
    for file in (folder / "runs").rglob("*tfevents*"):
        for event in LegacyEventFileLoader(str(file)).Load():
            found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "train/loss"]
    return sorted(found)


def files_of(folder):
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if not name.startswith("runs/")]


def check_equal(kind, folder, whole):
    """Weights, logs, TensorBoard, heartbeat and files of a run that was killed, against those of one that was not."""
    tolerance = KINDS[kind][2]
    got, want = weights(folder), weights(whole)
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).abs().max().item() <= tolerance, name
    for mine, theirs in zip(lines(folder), lines(whole), strict=True):
        assert mine == (pytest.approx(theirs, rel=1e-5, abs=1e-6) if tolerance else theirs)
    assert points(folder) == [(log["step"], pytest.approx(log["loss"], rel=1e-6)) for log in lines(folder)]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", STEPS)
    # Nothing is left over, and every checkpoint has all its files.
    assert not list(folder.rglob(".*"))
    assert files_of(folder) == files_of(whole)
    for file in folder.glob("checkpoint-*/**/*"):
        if file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix in (".pt", ".pth", ".bin"):
            assert zipfile.ZipFile(file).testzip() is None
        elif file.suffix == ".json":
            json.loads(file.read_text())


def start_and_kill(rng, kind, folder, whole_run):
    """A run that dies beside a random batch, inside a random save, or some time after it has written so much."""
    rank, how = rng.randrange(KINDS[kind][0]), rng.choice(("batch", "file", "file", "clock"))
    if how == "batch":
        run = start(kind, folder, AtCall(STEP, rng.randint(1, 2 * STEPS), after=rng.random() < 0.5, rank=rank))
    elif how == "file":
        changes = sum(bool(re.search(SAVED, line)) for line in whole_run.events(rank))
        run = start(kind, folder, AtFile(rng.randint(1, changes), SAVED, rank))
    else:
        run, written = start(kind, folder), rng.uniform(0, 0.8) * len(whole_run.stdout())
        while None in run.poll() and len(run.stdout()) < written:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        run.kill()
    codes = run.wait()
    assert set(codes) <= {0, -signal.SIGKILL}, run.text
    return any(codes)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind in KINDS for seed in range(SEEDS[kind])])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(never_killed, tmp_path, kind, seed):
    whole, whole_run = never_killed(kind)
    rng, folder = random.Random(seed), tmp_path / "out"
    assert start_and_kill(rng, kind, folder, whole_run)
    for _ in range(rng.randint(0, 2)):
        if not start_and_kill(rng, kind, folder, whole_run):  # what was left to do was done before that moment
            break
    finish(kind, folder)
    check_equal(kind, folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_saves_on_all_ranks_and_the_run_goes_on_from_there(never_killed, tmp_path, kind, name):
    """One rank alone is told, in the middle of an accumulated step: all finish that step."""
    size, folder = KINDS[kind][0], tmp_path / "out"
    batches = 2 * 5 - 1
    one = AtCall(STEP, batches, rank=size - 1, signal=getattr(signal, name), group=False)
    run = start(kind, folder, one)
    assert run.wait() == [75] * size, run.text
    assert run.stderr().count(f"stopped by {name} after step 5; checkpoint-5 is whole") == 1
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    finish(kind, folder)
    check_equal(kind, folder, never_killed(kind)[0])


# In a checkpoint of one process.
CUT_OFF = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT_OFF)
def test_a_checkpoint_that_was_cut_off_is_passed_over(never_killed, tmp_path, name):
    folder = tmp_path / "out"
    assert start("one process", folder, AtCall(STEP, 2 * 7)).wait() == [-signal.SIGKILL]
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    file = folder / "checkpoint-6" / name
    os.truncate(file, file.stat().st_size // 2)
    run = finish("one process", folder)
    (warning,) = (line for line in run.stderr().splitlines() if line.startswith("warning: "))
    assert f"checkpoint-6 is passed over: {name}" in warning
    check_equal("one process", folder, never_killed("one process")[0])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 16 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(disk, leave=0):
    """Take all the room but ``leave`` bytes."""
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - leave))


def check_refused(run, folder, before, rank=0):
    """One line and exit code 2 on the rank that writes, none that ends well, and the last checkpoint as it was."""
    codes = run.wait(grace=2)
    assert codes[rank] == 2 and 0 not in codes, run.text
    (error,) = (line for line in run.stderr(rank).splitlines() if "error: " in line)
    assert str(folder) in error and "checkpoint-3 is untouched" in error
    assert "Traceback" not in run.stderr(rank), run.text
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3"}
    assert contents(folder / "checkpoint-3") == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one process", "zero2"])
def test_no_checkpoint_is_begun_where_there_is_less_room_than_the_last_one_took(never_killed, small_disk, kind):
    size, folder = KINDS[kind][0], small_disk / "out"
    assert start(kind, folder, AtCall(STEP, 2 * 3 + 1)).wait() == [-signal.SIGKILL] * size
    before = contents(folder / "checkpoint-3")
    fill(small_disk, leave=sum(map(len, before.values())) * 3 // 4)
    run = start(kind, folder)
    check_refused(run, folder, before)
    assert not any("checkpoint-6" in line for line in run.events())
    (small_disk / "ballast").unlink()
    finish(kind, folder)
    check_equal(kind, folder, never_killed(kind)[0])


# Files of a checkpoint, each written by another library, and the rank that writes it.
WRITTEN = {
    "one process": ("adapter_model.safetensors", "tokenizer.model", "optimizer.pt", "rng_state", "trainer_state.json"),
    "zero2": ("non_lora_trainables.bin", "mp_rank_00_model_states.pt", "zero_pp_rank_1", "latest", "complete.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in WRITTEN for name in WRITTEN[kind]])
def test_a_disk_that_fills_while_a_file_is_written_costs_the_new_checkpoint_only(never_killed, small_disk, kind, name):
    folder, rank = small_disk / "out", int(name == "zero_pp_rank_1")
    run = start(kind, folder, AtFile(1, rf"(open|save|safetensors) .*checkpoint-6/.*{name}", rank, signal.SIGSTOP))
    while None in run.poll() and not stopped(run):
        time.sleep(0.01)
    before = contents(folder / "checkpoint-3")
    fill(small_disk)
    run.send(signal.SIGCONT)
    check_refused(run, folder, before, rank)
    (small_disk / "ballast").unlink()
    finish(kind, folder)
    check_equal(kind, folder, never_killed(kind)[0])


def stopped(run):
    return all(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T" for pid in run.pids)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_records(tmp_path, size):
    """One record alone has a word whose embedding is no number."""
    model, folder = tmp_path / "model", tmp_path / "out"
    shutil.copytree(GOLDEN / "tiny-llava-original", model)
    for shard in model.glob("*.bin"):
        state = torch.load(shard, weights_only=True)
        if "model.embed_tokens.weight" in state:
            state["model.embed_tokens.weight"][596] = float("nan")  # of "quiz"
            torch.save(state, shard)
    answers = ["A man.", "A street.", "A bicycle.", "A red bicycle.", "A man.", "A quiz.", "A dog.", "A man."]
    picture = {"image": str(GOLDEN / "images" / "c_square_64x64.png"), "prompt": "What is it?", "rejected": "No."}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({**picture, "chosen": answer}) + "\n" for answer in answers))
    flags = ["--model_name_or_path", model, "--vision_tower", GOLDEN / "tiny-clip", "--data_path", pairs]
    flags += ["--lora_enable", True, "--num_train_epochs", 1]
    flags += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2 // size, "--warmup_steps", 0]
    flags += ["--save_strategy", "steps", "--save_steps", 1, "--output_dir", folder]
    run = forked.start("train_dpo", flags, world_size=size)
    codes = run.wait(grace=2)
    assert 2 in codes and 0 not in codes, run.text
    (error,) = (line for line in run.text.splitlines() if "error: step " in line)
    (report,) = folder.glob("nonfinite-step-*.json")
    assert str(report) in error and "nan" in error
    content = json.loads(report.read_text())
    assert f"{pairs}: line 6" in [record["place"] for record in content["records"]]
    assert len(content["records"]) <= 2
    assert {path.name for path in folder.glob("checkpoint-*")} <= {f"checkpoint-{content['step'] - 1}"}
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "nan" in status["message"]
