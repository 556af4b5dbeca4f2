"""A run that is stopped, killed, or finds its disk full or its numbers broken, and what it goes on from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import losses_of, succeed
from safetensors.torch import load_file

from llava import interruption
from llava.status import read_status
from llava.train import checkpoints

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def flags(dpo_flags):
    """Six steps of two pairs; a log line every two steps, a checkpoint every three; dropout and a shuffled order."""
    return [
        *dpo_flags,
        *("--lora_enable", True, "--lora_dropout", 0.1, "--per_device_train_batch_size", 1),
        *("--gradient_accumulation_steps", 2, "--logging_steps", 2),
        *("--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 2),
    ]


@pytest.fixture
def after_step(monkeypatch):
    """``after_step(n, action)``: do something when optimizer step n has ended and before anything is saved."""
    from llava.train.guards import StopWhenAsked

    original = StopWhenAsked.on_step_end

    def install(number, action):
        def on_step_end(self, args, state, control, **rest):
            if state.global_step == number:
                action()
            return original(self, args, state, control, **rest)

        monkeypatch.setattr(StopWhenAsked, "on_step_end", on_step_end)

    yield install
    monkeypatch.setattr(StopWhenAsked, "on_step_end", original)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the run that nothing happened to is kept, once it was made."""
    return tmp_path_factory.mktemp("whole") / "out"


def make_whole(run_script, flags, whole):
    if not whole.exists():
        succeed(run_script("train_dpo", *flags, "--output_dir", whole))
    return whole


def same_run(got: Path, want: Path, timed: tuple[str, ...] = ()) -> None:
    """Weights to the bit, every logged number but those that are ``timed``, and nothing left lying about."""
    for name in ("adapter_model.safetensors",):
        mine, theirs = load_file(got / name), load_file(want / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    others = [torch.load(folder / "non_lora_trainables.bin", weights_only=True) for folder in (got, want)]
    assert all(torch.equal(others[0][key], others[1][key]) for key in others[1])
    logs = [
        [
            {k: v for k, v in log.items() if not k.startswith(("train_", *timed))}
            for log in json.loads(text)["log_history"]
        ]
        for text in ((folder / "trainer_state.json").read_text() for folder in (got, want))
    ]
    assert logs[0] == logs[1]
    assert not [path.name for path in got.iterdir() if path.name.startswith(".")]
    assert json.loads((got / "run.json").read_text())["status"] == "finished"


SLOW = pytest.mark.slow  # what differs little from its neighbour


@pytest.mark.parametrize("name", ["SIGUSR2", pytest.param("SIGUSR1", marks=SLOW), pytest.param("SIGTERM", marks=SLOW)])
def test_a_signal_saves_a_checkpoint_from_which_the_run_ends_as_if_nothing_had_been(
    run_script, flags, whole, after_step, tmp_path, name
):
    make_whole(run_script, flags, whole)
    after_step(5, lambda: os.kill(os.getpid(), getattr(signal, name)))
    code, _, err = run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")
    assert code == interruption.EXIT_STOPPED == 75
    assert f"note: stopped by {name} after step 5; checkpoint-5 is whole" in err
    assert checkpoints.fault(tmp_path / "out" / "checkpoint-5") is None
    assert read_status(tmp_path / "out")["last_checkpoint"] == "checkpoint-5"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()  # the run has not ended
    after_step(0, None)
    out = succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    assert "step 6/6" in out and "step 4/6" not in out
    same_run(tmp_path / "out", whole)


def test_a_signal_at_the_last_step_changes_nothing(run_script, flags, whole, after_step, tmp_path):
    make_whole(run_script, flags, whole)
    after_step(6, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    same_run(tmp_path / "out", whole)


def test_with_save_only_model_a_stopped_run_still_goes_on(run_script, flags, whole, after_step, tmp_path):
    make_whole(run_script, flags, whole)
    flags = [*flags, "--save_only_model", True]
    after_step(2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")[0] == 75
    after_step(0, None)
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    assert not (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").exists()
    same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("held", [False, True])
def test_a_process_with_nothing_to_save_leaves_at_once(held):
    script = (
        "import os, signal, contextlib; from llava import interruption; interruption.listen()\n"
        f"with interruption.held() if {held} else contextlib.nullcontext():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(interruption.requested())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    if held:
        assert (done.returncode, done.stdout) == (0, "SIGTERM\n")
    else:
        assert (done.returncode, done.stdout, done.stderr) == (75, "", "note: SIGTERM: leaving, with nothing to save\n")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own code runs after it."""


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("seal", 2),
        ("remove", 1),
        pytest.param("publish_checkpoint", 2, marks=SLOW),
        pytest.param("rotate", 2, marks=SLOW),
    ],
)
def test_killed_inside_a_save(run_script, flags, whole, tmp_path, monkeypatch, where, call):
    """The second save, at step 6, does not get to its end; what it had begun is no checkpoint, the first one stays."""
    make_whole(run_script, flags, whole)
    flags = [*flags, "--save_total_limit", 1]
    module = checkpoints if where in ("seal", "remove") else sys.modules["llava.train.trainer"]
    original, calls = getattr(module, where), []

    def die(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            if where == "remove":  # half of it is done
                os.rename(args[0], args[0].with_name(f".removed-{args[0].name}"))
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, where, die)
    monkeypatch.setattr("llava.errors.status.failed", lambda message: None)
    with pytest.raises(Killed):
        run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")
    monkeypatch.undo()
    done = {"publish_checkpoint": 3, "seal": 3, "rotate": 6, "remove": 6}[where]
    assert (tmp_path / "out" / f"checkpoint-{done}").is_dir()
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    same_run(tmp_path / "out", whole)
    assert checkpoints.fault(tmp_path / "out" / "checkpoint-6") is None


def test_killed_before_the_first_checkpoint(run_script, flags, whole, after_step, tmp_path):
    make_whole(run_script, flags, whole)

    def die():
        raise Killed

    after_step(2, die)
    with pytest.raises(Killed):
        run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")
    first = json.loads((tmp_path / "out" / "run.json").read_text())
    after_step(0, None)
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    same_run(tmp_path / "out", whole)
    card = json.loads((tmp_path / "out" / "run.json").read_text())
    assert card["run"] == first["run"] and len(card["earlier"]) == 1


@pytest.fixture
def two_checkpoints(run_script, flags, whole, tmp_path):
    """The whole run's folder as it would be, had it been killed behind step 6."""
    make_whole(run_script, flags, whole)
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(whole / name, tmp_path / "out" / name)
    shutil.copy(whole / "run.json", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("file", "how", "says"),
    [
        ("optimizer.pt", "cut", "optimizer.pt has"),
        ("adapter_model.safetensors", "cut", "adapter_model.safetensors has"),
        ("scheduler.pt", "remove", "scheduler.pt is missing"),
        ("optimizer.pt", "zeros", "optimizer.pt: its end is missing"),
        ("complete.json", "cut", "its complete.json is damaged"),
        ("complete.json", "remove", "it has no complete.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(two_checkpoints, file, how, says, capsys):
    path = two_checkpoints / "checkpoint-6" / file
    content = path.read_bytes()
    if how == "remove":
        path.unlink()
    else:
        half = content[: len(content) // 2]
        path.write_bytes(half + b"\0" * (len(content) - len(half)) if how == "zeros" else half)
    assert checkpoints.newest_whole(two_checkpoints) == two_checkpoints / "checkpoint-3"
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {two_checkpoints / 'checkpoint-6'} is passed over: {says}")
    assert err.count("\n") == 1


def test_where_none_is_whole_the_user_decides(run_script, flags, two_checkpoints):
    for name in ("checkpoint-3", "checkpoint-6"):
        (two_checkpoints / name / "complete.json").unlink()
    code, _, err = run_script("train_dpo", *flags, "--output_dir", two_checkpoints)
    assert code == 2
    assert f"--resume_from_checkpoint {two_checkpoints / 'checkpoint-6'} where you know better" in err
    named = two_checkpoints / "checkpoint-3"
    succeed(run_script("train_dpo", *flags, "--output_dir", two_checkpoints, "--resume_from_checkpoint", named))


def test_a_run_started_afresh_does_not_take_the_old_ones_checkpoints(
    run_script, flags, whole, two_checkpoints, after_step
):
    def die():
        raise Killed

    after_step(2, die)
    with pytest.raises(Killed):
        run_script("train_dpo", *flags, "--output_dir", two_checkpoints, "--resume_from_checkpoint", False)
    after_step(0, None)
    out = succeed(run_script("train_dpo", *flags, "--output_dir", two_checkpoints))
    assert "step 2/6" in out
    same_run(two_checkpoints, whole)


@pytest.mark.parametrize(
    ("now", "extra", "says"),
    [
        (2, (), "its optimizer steps had 2 records, these would have 4: choose --per_device_train_batch_size and "),
        (4, (), "cannot share its 2 records a step"),
        (2, ("--deepspeed", ROOT / "zero_configs" / "zero2.json"), "DeepSpeed's optimizer state lies in 1 part(s)"),
        (2, ("--group_by_image", True), "--group_by_image has another order there"),
    ],
)
def test_another_number_of_processes_is_refused_with_what_to_do(two_checkpoints, flags, now, extra, says):
    from llava.errors import UserError
    from llava.train.build import check_resumed

    arguments = json.loads((two_checkpoints / "run.json").read_text())["arguments"] | {"world_size": now}
    arguments |= {str(flag).removeprefix("--"): str(value) for flag, value in zip(extra[::2], extra[1::2], strict=True)}
    with pytest.raises(UserError, match="belongs to a run on 1 process") as refused:
        check_resumed(str(two_checkpoints / "checkpoint-3"), arguments, SimpleNamespace(version="v1"))
    assert says in str(refused.value) and "--resume_from_checkpoint False" in str(refused.value)


def test_another_number_of_processes_with_the_same_global_batch_goes_on(two_checkpoints, capsys):
    from llava.train.build import check_resumed

    arguments = json.loads((two_checkpoints / "run.json").read_text())["arguments"]
    arguments |= {"world_size": 2, "gradient_accumulation_steps": 1}
    check_resumed(str(two_checkpoints / "checkpoint-3"), arguments, SimpleNamespace(version="v1"))
    assert "note: " in capsys.readouterr().err


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_not_finite_end_the_run_and_name_their_records(
    run_script, flags, tmp_path, monkeypatch, golden, what
):
    from llava.train.trainer import DPOTrainer

    original = DPOTrainer._ask_reference
    asked = []

    def poisoned(self, model, inputs, scores):
        asked.append(inputs["records"].tolist())
        logps = original(self, model, inputs, scores)
        if len(asked) == 8:  # the second half of step 4
            # The loss is finite at 1e30; its gradient overflows on the way down.
            logps = logps * float("nan") if what == "loss" else logps
        return logps

    monkeypatch.setattr(DPOTrainer, "_ask_reference", poisoned)
    if what == "gradient":
        monkeypatch.setattr(
            "llava.train.trainer.Trainer._get_grad_norm",
            lambda self, model, grad_norm=None: torch.tensor(float("inf" if len(asked) == 8 else 1)),
        )
    code, _, err = run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and err.count("error: ") == 1
    assert f"step 4: the {what} is {'nan' if what == 'loss' else 'inf'}" in err
    report = json.loads((tmp_path / "out" / "nonfinite-step-4.json").read_text())
    assert [row["record"] for row in report["records"]] == asked[6] + asked[7]
    assert all(row["place"].startswith(str(golden / "hadpo_data")) for row in report["records"])
    assert checkpoints.fault(tmp_path / "out" / "checkpoint-3") is None
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_full_disk_is_said_before_anything_is_touched(run_script, flags, whole, tmp_path, monkeypatch):
    make_whole(run_script, flags, whole)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and err.count("error: ") == 1
    assert "bytes are needed, 1,000 are free); checkpoint-3 is untouched; make room" in err
    monkeypatch.undo()
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("writer", ["torch", pytest.param("safetensors", marks=SLOW), pytest.param("json", marks=SLOW)])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(run_script, flags, whole, tmp_path, monkeypatch, writer):
    """Every kind of writer says it in its own way; the limit on a file's size makes them say it."""
    import resource

    make_whole(run_script, flags, whole)
    target = {"safetensors": "adapter_model.safetensors", "torch": "optimizer.pt", "json": "trainer_state.json"}[writer]
    limit = (whole / "checkpoint-6" / target).stat().st_size // 2
    from llava.train.trainer import LlavaTrainer

    names = {"safetensors": "save_model", "torch": "_save_optimizer_and_scheduler", "json": "_save_rng_state"}
    original = getattr(LlavaTrainer, names[writer])
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def full(self, *args, **kwargs):
        if self.state.global_step == 6 and self._staging:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, names[writer], full)
    try:
        code, _, err = run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 2, err
    assert "no more can be written (" in err and "checkpoint-3 is untouched" in err
    assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-3"]
    assert not (tmp_path / "out" / ".unfinished").exists()
    monkeypatch.undo()
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    same_run(tmp_path / "out", whole)


def test_losses_between_log_lines_are_not_forgotten(run_script, flags, whole, after_step, tmp_path):
    """Stopped between two log lines, the line that follows is about both steps."""
    make_whole(run_script, flags, whole)
    after_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    assert run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")[0] == 75
    after_step(0, None)
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    assert losses_of(tmp_path / "out") == losses_of(whole)


@pytest.fixture
def evaluated(dpo_flags, golden, tmp_path):
    """Two steps an epoch, with dropout and two held-out pairs."""
    row = {
        "image": str(golden / "images" / "a_wide_97x41.png"),
        "prompt": "A dog?",
        "chosen": "No.",
        "rejected": "Yes.",
    }
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text((json.dumps(row) + "\n") * 2)
    return [
        *(*dpo_flags, "--lora_enable", True, "--lora_dropout", 0.1, "--eval_data_path", held_out),
        *("--per_device_train_batch_size", 8, "--num_train_epochs", 3, "--save_strategy", "steps", "--save_steps", 4),
    ]


def stop_after(run_script, after_step, number, *flags):
    after_step(number, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    code, _, err = run_script("train_dpo", *flags)
    after_step(0, None)
    assert code == 75, err
    return err


@pytest.mark.parametrize("strategy", ["--eval_strategy", pytest.param("--logging_strategy", marks=SLOW)])
def test_stopped_at_the_end_of_an_epoch(run_script, evaluated, after_step, tmp_path, strategy):
    """What is due at an epoch's end comes before the stop: it would not be made up for."""
    flags = [*evaluated, strategy, "epoch", "--num_train_epochs", 2]
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "straight"))
    steps = json.loads((tmp_path / "straight" / "trainer_state.json").read_text())["global_step"]
    stop_after(run_script, after_step, steps // 2, *flags, "--output_dir", tmp_path / "out")
    succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / "out"))
    same_run(tmp_path / "out", tmp_path / "straight", timed=("eval_runtime", "eval_samples", "eval_steps_per"))


def test_the_best_step_may_have_no_checkpoint(run_script, evaluated, tmp_path):
    flags = [*evaluated, "--eval_strategy", "steps", "--eval_steps", 1, "--load_best_model_at_end", True]
    flags += ["--metric_for_best_model", "eval_loss", "--greater_is_better", True, "--save_total_limit", 1]
    code, _, err = run_script("train_dpo", *flags, "--output_dir", tmp_path / "out")
    assert code == 0, err
    best = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["best_global_step"]
    assert best % 4
    assert f"step {best} was best, but has no checkpoint; the model is that of " in err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_saving_only_what_is_best_does_not_keep_a_run_from_stopping(run_script, evaluated, after_step, tmp_path):
    flags = [*evaluated, "--save_strategy", "best", "--metric_for_best_model", "eval_loss", "--greater_is_better", True]
    flags += ["--eval_strategy", "steps", "--eval_steps", 1, "--output_dir", tmp_path / "out"]
    assert "after step 3; checkpoint-3 is whole" in stop_after(run_script, after_step, 3, *flags)


def test_a_job_that_is_queued_again_goes_on_whatever_its_flag_says(
    run_script, flags, whole, after_step, tmp_path, monkeypatch
):
    make_whole(run_script, flags, whole)
    flags = [*flags, "--resume_from_checkpoint", False, "--output_dir", tmp_path / "out"]
    stop_after(run_script, after_step, 5, *flags)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    out = succeed(run_script("train_dpo", *flags))
    assert "step 6/6" in out and "step 2/6" not in out
    same_run(tmp_path / "out", whole)


def test_a_run_does_not_go_on_with_other_records(run_script, flags, after_step, golden, tmp_path):
    data = tmp_path / "pope_data.json"
    records = json.loads((golden / "hadpo_data" / "pope_data.json").read_text())
    data.write_text(json.dumps(records))
    flags = [*flags, "--pope_data_path", data, "--output_dir", tmp_path / "out"]
    stop_after(run_script, after_step, 2, *flags)
    data.write_text(json.dumps(records[::-1]))
    code, _, err = run_script("train_dpo", *flags)
    assert code == 2 and f"error: {data} has changed since the run began" in err


def test_a_model_without_optimizer_is_not_gone_on_from(two_checkpoints):
    """--save_only_model: the older checkpoint, which a signal has written, is."""
    run = json.loads((two_checkpoints / "run.json").read_text())["run"]
    newest = two_checkpoints / "checkpoint-6"
    (newest / "optimizer.pt").unlink()
    (newest / "complete.json").unlink()
    checkpoints.seal(newest, run)
    assert checkpoints.newest_whole(two_checkpoints) == two_checkpoints / "checkpoint-3"
    checkpoints.rotate(two_checkpoints, newest, 1, None, run)
    assert (two_checkpoints / "checkpoint-3").is_dir(), "the only one to go on from"


def test_a_damaged_checkpoint_is_not_counted(two_checkpoints):
    run = json.loads((two_checkpoints / "run.json").read_text())["run"]
    (two_checkpoints / "checkpoint-3").rename(two_checkpoints / "checkpoint-2")
    shutil.copytree(two_checkpoints / "checkpoint-2", two_checkpoints / "checkpoint-3")
    (two_checkpoints / "checkpoint-3" / "complete.json").write_text("{")
    checkpoints.rotate(two_checkpoints, two_checkpoints / "checkpoint-6", 2, None, run)
    assert sorted(checkpoints.checkpoints_of(two_checkpoints)) == [2, 3, 6]


def test_only_a_runs_own_leftovers_are_swept(tmp_path):
    kept = [".notes.markdown", ".env.personal", "run.json", ".gitignore"]
    swept = [".run.json.a1b2c3d4", ".adapter_model.safetensors.tmp", ".non_lora_trainables.bin.abcdefgh"]
    for name in (*kept, *swept):
        (tmp_path / name).write_text("x")
    checkpoints.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.slow
def test_a_signal_to_all_processes_leaves_the_data_workers_alone(flags, tmp_path):
    """Slurm signals every process of a step; a data worker that dies of SIGTERM would take its rank along."""
    flags = [*flags, "--dataloader_num_workers", 2, "--num_train_epochs", 50, "--output_dir", tmp_path / "out"]
    command = [sys.executable, ROOT / "train_dpo.py", *flags]
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        for line in run.stdout:
            if line.startswith("step 4/"):
                os.killpg(run.pid, signal.SIGTERM)
                break
        run.stdout.read()
        err = run.stderr.read()
    assert run.returncode == 75, err
    assert "note: stopped by SIGTERM after step" in err


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    script = (
        "from llava.files import claim_folder; import sys; claim_folder(sys.argv[1]); print('mine', flush=True); {}"
    )
    wait, end = script.format("sys.stdin.read()"), script.format("")
    with subprocess.Popen(
        [sys.executable, "-c", wait, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as first:
        assert first.stdout.readline() == "mine\n"
        second = subprocess.run([sys.executable, "-c", end, tmp_path], capture_output=True, text=True, cwd=ROOT)
        assert f"{tmp_path} is being written by process {first.pid} on " in second.stderr
        first.kill()
    third = subprocess.run([sys.executable, "-c", end, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert third.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_on_another_number_of_processes(dpo_flags, tmp_path, first, then):
    """With the same global batch and no dropout, the numbers are those of the run that nothing happened to."""
    import forked

    flags = [*dpo_flags, "--lora_enable", True, "--logging_steps", 2, "--num_train_epochs", 2]

    def start(folder, processes, **how):
        batch = ["--per_device_train_batch_size", 4 // processes, "--output_dir", tmp_path / folder]
        return forked.run("train_dpo", [*flags, *batch], processes, **how)

    assert start("whole", first).codes == [0] * first
    stop = forked.AtCall("llava.train.guards.StopWhenAsked.on_step_end", 3, signal=signal.SIGUSR1)
    stopped = start("out", first, die=stop)
    assert stopped.codes == [75] * first, stopped.text
    done = start("out", then)
    assert done.codes == [0] * then, done.text
    assert f"belongs to a run on {first} process(es), this one has {then}; the global batch is the same" in done.text
    logs = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("whole", "out")
    ]
    for mine, theirs in zip(logs[1], logs[0], strict=True):
        if "loss" in mine:
            keys = ("step", "loss", "rewards/margins", "logps/chosen", "learning_rate")
            assert [mine[key] for key in keys] == pytest.approx([theirs[key] for key in keys], rel=1e-4, abs=1e-5)
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "whole"))
    assert max((mine[key] - theirs[key]).abs().max().item() for key in theirs) < 1e-5
