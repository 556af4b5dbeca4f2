"""What one sees of a run: the line per log, the heartbeat, TensorBoard's curves over kills and restarts."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerControl, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback

from llava import status as status_module
from llava.errors import UserError
from llava.status import INTERVAL, STALE_AFTER, Status, failed, is_stale, read_status, seconds_since
from llava.train import watching
from llava.train.watching import Meter, Progress, TensorBoardOfAllParts

# ---- a run as Trainer's callbacks see it ----


def arguments(output_dir: Path) -> SimpleNamespace:
    return SimpleNamespace(
        output_dir=str(output_dir),
        train_batch_size=4,
        gradient_accumulation_steps=2,
        world_size=3,
        to_json_string=lambda: '{"learning_rate": 0.1}',
    )


MODEL = SimpleNamespace(config=SimpleNamespace(to_json_string=lambda: '{"hidden_size": 8}'))


class Killed(BaseException):
    """Nothing catches it, and nothing is tidied up afterwards: SIGKILL, as far as the files are concerned."""


class Part:
    """One start of a run of 10 steps that logs every step, evaluates every 4 and saves every 5."""

    def __init__(self, output_dir: Path, checkpoint: TrainerState | None = None, continues: bool = False):
        self.args = arguments(output_dir)
        self.state = checkpoint or TrainerState(max_steps=10)
        self.state = TrainerState(**json.loads(json.dumps(vars(self.state))))  # through trainer_state.json
        self.board = TensorBoardOfAllParts(continues)

    def begin(self) -> Part:
        self.board.on_train_begin(self.args, self.state, TrainerControl(), model=MODEL)
        return self

    def log(self, **logs: float) -> None:
        logs["epoch"] = self.state.global_step / 5
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.board.on_log(self.args, self.state, TrainerControl(), logs=logs)

    def run(self, until: int = 10) -> TrainerState | None:
        """Train to a step, die there; gives the newest checkpoint of this part. At step 10 it ends in order."""
        saved = None
        while self.state.global_step < until:
            self.state.global_step += 1
            step = self.state.global_step
            self.log(loss=1 / step, **{"rewards/margins": step / 7})
            if step % 4 == 0:
                self.log(eval_loss=2 / step)
            if step % 5 == 0:
                saved = TrainerState(**json.loads(json.dumps(vars(self.state))))
        if until == 10:
            self.end()
        return saved

    def end(self) -> None:
        self.log(train_runtime=3.0, train_loss=0.5)
        self.board.on_train_end(self.args, self.state, TrainerControl())
        self.log(eval_loss=0.1)  # after the training, as ``finish`` does


def event_files(output_dir: Path) -> list[Path]:
    return sorted(output_dir.rglob("*tfevents*"))


def raw(file: Path) -> list[Event]:
    """Every whole record, without the help of TensorBoard's loaders."""
    content, events, at = file.read_bytes(), [], 0
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        if at + 16 + length > len(content):
            break
        events.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 16 + length
    return events


def points(output_dir: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every number in every event file, however it is read."""
    found = []
    by_tensorboard = []
    for folder in {file.parent for file in event_files(output_dir)}:
        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            by_tensorboard += [(tag, point.step, point.value) for point in reader.Scalars(tag)]
    for file in event_files(output_dir):
        for event in raw(file):
            for value in event.summary.value:
                if not value.tag.endswith("text_summary"):
                    found.append((value.tag, event.step, value.simple_value))
    assert sorted(found) == sorted(by_tensorboard)
    return sorted(found)


def texts(output_dir: Path) -> list[str]:
    events = [event for file in event_files(output_dir) for event in raw(file)]
    return sorted(value.tag for event in events for value in event.summary.value if value.tag.endswith("text_summary"))


def f32(value: float) -> float:
    return (
        Event.FromString(Event(summary={"value": [{"simple_value": value}]}).SerializeToString())
        .summary.value[0]
        .simple_value
    )


def expected(until: int, summary: bool = False) -> list[tuple[str, int, float]]:
    rows = [("train/loss", step, f32(1 / step)) for step in range(1, until + 1)]
    rows += [("train/rewards/margins", step, f32(step / 7)) for step in range(1, until + 1)]
    rows += [("train/epoch", step, f32(step / 5)) for step in range(1, until + 1)]
    rows += [("eval/loss", step, f32(2 / step)) for step in range(4, until + 1, 4)]
    if summary:
        rows += [("train/train_runtime", 10, 3.0), ("train/train_loss", 10, 0.5), ("eval/loss", 10, f32(0.1))]
    return sorted(rows)


@pytest.fixture(autouse=True)
def no_logging_dir(monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


# ---- TensorBoard ----


def test_a_whole_run_has_hugging_faces_tags_each_step_once(tmp_path, monkeypatch):
    Part(tmp_path / "ours").begin().run()
    assert points(tmp_path / "ours") == expected(10, summary=True)
    [file] = event_files(tmp_path / "ours")
    assert file.parent.parent == tmp_path / "ours" / "runs"

    theirs = Part(tmp_path / "theirs")
    theirs.board = TensorBoardCallback()
    theirs.begin().run()
    assert set(points(tmp_path / "theirs")) == set(points(tmp_path / "ours"))
    assert texts(tmp_path / "ours") == texts(tmp_path / "theirs") == ["args/text_summary", "model_config/text_summary"]


def test_every_log_is_on_disk_when_on_log_returns(tmp_path):
    part = Part(tmp_path).begin()
    assert texts(tmp_path) == ["args/text_summary", "model_config/text_summary"]
    for step in range(1, 8):
        part.run(until=step)
        assert points(tmp_path) == expected(step)


@pytest.mark.parametrize("killed_at", [5, 6, 7, 8, 9])
def test_after_a_kill_no_step_is_missing_or_twice(tmp_path, killed_at):
    checkpoint = Part(tmp_path).begin().run(until=killed_at)
    before = {(e.step, v.tag): e.wall_time for e in raw(event_files(tmp_path)[0]) for v in e.summary.value}
    part = Part(tmp_path, checkpoint).begin()
    assert points(tmp_path) == expected(5)
    [file] = event_files(tmp_path)
    kept = {(e.step, v.tag): e.wall_time for e in raw(file) for v in e.summary.value}
    assert kept == {key: time for key, time in before.items() if key[0] <= 5}
    part.run(until=9)
    Part(tmp_path, checkpoint).begin().run()  # killed again at step 9
    assert points(tmp_path) == expected(10, summary=True)
    assert len(event_files(tmp_path)) == 1
    assert texts(tmp_path) == ["args/text_summary", "model_config/text_summary"]


@pytest.mark.parametrize("lost", [1, 3, 9, 20, 400])
def test_a_torn_end_and_lost_logs_are_filled_in_from_the_checkpoint(tmp_path, lost):
    """A kill tears the last record; a node that fails takes more of the file's end with it."""
    checkpoint = Part(tmp_path).begin().run(until=5)
    [file] = event_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-lost])
    assert len(points(tmp_path)) < len(expected(5))
    Part(tmp_path, checkpoint).begin().run()
    assert points(tmp_path) == expected(10, summary=True)
    times = [event.wall_time for event in raw(event_files(tmp_path)[0])]
    assert times == sorted(times) and times[0] > 1e9


@pytest.mark.parametrize("content", [None, b"", b"\0" * 64])
def test_a_file_that_is_gone_or_empty_is_written_anew(tmp_path, content):
    checkpoint = Part(tmp_path).begin().run(until=7)
    [file] = event_files(tmp_path)
    file.unlink() if content is None else file.write_bytes(content)
    Part(tmp_path, checkpoint).begin().run()
    assert points(tmp_path) == expected(10, summary=True)
    assert texts(tmp_path) == ["args/text_summary", "model_config/text_summary"]


@pytest.mark.parametrize("call", range(6))
def test_a_kill_while_the_file_is_taken_over_loses_and_doubles_nothing(tmp_path, monkeypatch, call):
    """Killed before and after every change of the folder; whoever reads it then sees one whole file."""
    checkpoint = Part(tmp_path).begin().run(until=8)
    calls = iter(range(100))

    def deadly(original):
        def change(*args, **kwargs):
            if next(calls) == call:
                raise Killed
            result = original(*args, **kwargs)
            if next(calls) == call:
                raise Killed
            return result

        return change

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", deadly(os.replace))
        patch.setattr(Path, "replace", deadly(Path.replace))
        # A later clock: the file's new name differs from the old one.
        patch.setattr("llava.train.watching.time.time", lambda: 2e9)
        Part(tmp_path, checkpoint).begin()
    assert len(event_files(tmp_path)) == 1
    assert points(tmp_path) in (expected(8), expected(5))
    Part(tmp_path, checkpoint).begin().run()
    assert points(tmp_path) == expected(10, summary=True)


def test_what_a_killed_take_over_leaves_is_no_event_file(tmp_path):
    checkpoint = Part(tmp_path).begin().run(until=8)
    [file] = event_files(tmp_path)
    for name in (f"continued{file.suffix}", f".continued{file.suffix}.a1b2c3d4"):
        (file.parent / name).write_bytes(file.read_bytes())
    assert points(tmp_path) == expected(8)
    Part(tmp_path, checkpoint).begin().run()
    assert points(tmp_path) == expected(10, summary=True)


def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_its_folder(tmp_path):
    Part(tmp_path).begin().run(until=3)
    part = Part(tmp_path, continues=True).begin()
    assert points(tmp_path) == []
    part.run(until=2)
    Part(tmp_path, continues=True).begin().run()
    assert points(tmp_path) == expected(10, summary=True)
    assert len(event_files(tmp_path)) == 1
    assert texts(tmp_path) == ["args/text_summary", "model_config/text_summary"]


def test_a_new_run_leaves_a_finished_one_alone(tmp_path, monkeypatch):
    Part(tmp_path).begin().run()
    [old] = event_files(tmp_path)
    content = old.read_bytes()
    monkeypatch.setattr(watching, "default_logdir", lambda: "runs/later")
    monkeypatch.setattr(watching.time, "time", lambda: 2e9)
    checkpoint = Part(tmp_path).begin().run(until=7)
    Part(tmp_path, checkpoint).begin().run(until=8)
    assert old.read_bytes() == content
    [new] = event_files(tmp_path / "runs" / "later")
    assert [e.step for e in raw(new) for v in e.summary.value if v.tag == "train/loss"] == list(range(1, 9))


def test_a_finished_run_started_again_adds_nothing(tmp_path):
    part = Part(tmp_path).begin()
    part.run()
    again = Part(tmp_path, part.state).begin()
    again.end()
    assert points(tmp_path) == expected(10, summary=True)


def test_values_are_the_checkpoints_where_another_run_wrote_the_newest_file(tmp_path, monkeypatch):
    checkpoint = Part(tmp_path).begin().run(until=7)
    other = Part(tmp_path)
    monkeypatch.setattr(watching, "default_logdir", lambda: "runs/later")
    monkeypatch.setattr(watching.time, "time", lambda: 2e9)
    other.begin()
    other.state.global_step = 1
    other.log(loss=99.0)
    Part(tmp_path, checkpoint).begin()
    newest = event_files(tmp_path / "runs" / "later")[0]
    losses = [v.simple_value for e in raw(newest) for v in e.summary.value if v.tag == "train/loss"]
    assert losses == [f32(1 / step) for step in range(1, 6)]


def test_runs_that_share_a_logging_dir_keep_out_of_each_others_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    checkpoint = Part(tmp_path / "a").begin().run(until=7)
    [first] = event_files(tmp_path / "logs")
    with monkeypatch.context() as later:
        later.setattr(watching.time, "time", lambda: 2e9)
        Part(tmp_path / "b").begin().run(until=9)
    [other] = set(event_files(tmp_path / "logs")) - {first}
    content = other.read_bytes()
    Part(tmp_path / "a", checkpoint).begin().run()
    assert other.read_bytes() == content
    [first] = set(event_files(tmp_path / "logs")) - {other}
    assert first.parent == other.parent == tmp_path / "logs"
    assert [e.step for e in raw(first) for v in e.summary.value if v.tag == "train/loss"] == list(range(1, 11))


def test_a_folder_that_hugging_faces_callback_wrote_is_gone_on_with(tmp_path):
    part = Part(tmp_path)
    part.board = TensorBoardCallback()
    checkpoint = part.begin().run(until=7)
    part.board.tb_writer.close()
    Part(tmp_path, checkpoint).begin().run()
    assert points(tmp_path) == expected(10, summary=True)


def test_only_rank_zero_writes(tmp_path):
    part = Part(tmp_path)
    part.state.is_world_process_zero = False
    part.begin().run()
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_without_training_is_logged_as_ever(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = Part(tmp_path)
    part.log(eval_loss=1.0)
    assert isinstance(part.board.tb_writer, SummaryWriter)
    part.board.tb_writer.close()
    assert ("eval/loss", 0, 1.0) in points(tmp_path)


# ---- the line ----


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr("time.monotonic", lambda: now.seconds)
    return now


class Watched:
    """``Progress`` fed as Trainer feeds it: 24 pairs a step."""

    def __init__(self, folder: Path, clock: SimpleNamespace, step: int = 0):
        self.clock = clock
        self.status = Status(folder, "train_dpo.py", "pairs", 3, writer=True)
        self.progress = Progress("pairs", self.status)
        self.args = arguments(folder)
        self.state = TrainerState(max_steps=100, global_step=step)
        self.control = TrainerControl()
        self.tell("on_train_begin")

    def tell(self, event: str, **kwargs):
        getattr(self.progress, event)(self.args, self.state, self.control, **kwargs)

    def step(self, seconds: float, save: bool = False) -> None:
        self.tell("on_step_begin")
        self.clock.seconds += seconds
        self.state.global_step += 1
        self.control.should_save = save
        self.tell("on_step_end")


def test_a_line_per_log_says_the_rate_of_all_ranks_and_the_time_left(tmp_path, clock, capsys):
    run = Watched(tmp_path, clock)
    clock.seconds += 500  # passing over the data that a resumed run has seen
    for _ in range(2):
        run.step(10)
    run.tell("on_log", logs={"loss": 0.6931471, "rewards/margins": 0.25, "step_of_data": 3})
    assert capsys.readouterr().out == (
        "step 2/100 loss=0.6931 rewards/margins=0.25 step_of_data=3 2.4 pairs/s 0:16:20 left\n"
    )


def test_the_rate_leaves_out_evaluations_and_checkpoints(tmp_path, clock, capsys):
    run = Watched(tmp_path, clock)
    run.step(10, save=True)
    run.tell("on_log", logs={"loss": 0.5})
    clock.seconds += 300
    run.tell("on_log", logs={"eval_loss": 0.5, "epoch": 1.0})
    run.tell("on_evaluate")
    clock.seconds += 200
    run.tell("on_save")
    run.step(20)
    run.tell("on_log", logs={"loss": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "step 1/100 loss=0.5 2.4 pairs/s 0:16:30 left",
        "step 1/100 eval_loss=0.5 epoch=1",
        "step 2/100 loss=0.5 1.2 pairs/s 0:32:40 left",
    ]


def test_a_resumed_part_counts_its_own_steps(tmp_path, clock, capsys):
    run = Watched(tmp_path, clock, step=98)
    run.step(10)
    run.tell("on_log", logs={"loss": 0.5})
    run.step(10)
    run.tell("on_log", logs={"loss": 0.5})
    run.tell("on_log", logs={"train_loss": 0.4})
    assert capsys.readouterr().out.splitlines() == [
        "step 99/100 loss=0.5 2.4 pairs/s 0:00:10 left",
        "step 100/100 loss=0.5 2.4 pairs/s 0:00:00 left",
        "step 100/100 train_loss=0.4",
    ]


def test_tokens_of_all_ranks_are_on_the_line_and_on_the_board(tmp_path, clock, capsys):
    class TwoRanks:
        def gather(self, mine):
            return torch.cat([mine, torch.tensor([[500, 7]])])

    run = Watched(tmp_path, clock)
    run.progress.meter = meter = Meter(torch.device("cpu"))
    board = TensorBoardOfAllParts(False, run.progress)
    board.on_train_begin(run.args, run.state, run.control)
    for seconds, seen in ((10, (600, torch.tensor(300))), (20, (100,))):
        run.step(seconds)
        run.tell("on_step_end")
        clock.seconds += 1000
        run.progress.pause()
        for tokens in seen:
            meter.saw(tokens)
        meter.meet(TwoRanks())
        for logs in ({"loss": 0.5}, {"eval_loss": 0.5}):
            run.tell("on_log", logs=logs)
            board.on_log(run.args, run.state, run.control, logs=logs)
    # (600 + 300 + 500) / 10 s and (100 + 500) / 20 s; 24 pairs a step.
    assert [line.split("loss=0.5 ")[1] for line in capsys.readouterr().out.splitlines() if " loss" in line] == [
        "140 tokens/s 2.4 pairs/s 0:16:30 left",
        "30 tokens/s 1.2 pairs/s 0:32:40 left",
    ]
    found = points(tmp_path)
    for row in (("tokens_per_second", 1, 140), ("tokens_per_second", 2, 30), ("samples_per_second", 1, f32(2.4))):
        assert (f"train/{row[0]}", *row[1:]) in found
    assert [step for tag, step, _ in found if tag == "train/resident_memory_gb"] == [1, 2]


def test_other_ranks_say_nothing(tmp_path, clock, capsys):
    run = Watched(tmp_path, clock)
    run.state.is_world_process_zero = False
    run.tell("on_log", logs={"loss": 0.5})
    assert capsys.readouterr().out == ""


# ---- the heartbeat ----


def heartbeat(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(autouse=True)
def not_in_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(status_module, "current", None)


def test_the_heartbeat_follows_the_run(tmp_path, clock):
    run = Watched(tmp_path / "out", clock)
    assert heartbeat(tmp_path / "out").items() >= {"state": "running", "step": 0, "max_steps": 100}.items()
    run.step(2)
    assert heartbeat(tmp_path / "out")["step"] == 0  # written less than 5 seconds ago
    run.step(INTERVAL)
    assert heartbeat(tmp_path / "out")["step"] == 2
    run.tell("on_log", logs={"loss": math.nan, "rewards/margins": 0.5, "logps/chosen": -3.0})
    now = heartbeat(tmp_path / "out")
    assert now["metrics"] == {"loss": "nan", "rewards/margins": 0.5}
    assert now["rate"] == pytest.approx(2 * 24 / 7)
    assert now["seconds_left"] == pytest.approx(98 * 3.5)
    run.step(1, save=True)
    assert heartbeat(tmp_path / "out")["state"] == "saving"
    run.tell("on_save")
    assert heartbeat(tmp_path / "out").items() >= {"state": "running", "last_checkpoint": "checkpoint-3"}.items()
    clock.seconds += INTERVAL
    (tmp_path / "out" / "status.json").unlink()
    run.tell("on_prediction_step")
    assert heartbeat(tmp_path / "out")["step"] == 3
    run.tell("on_train_end")
    assert heartbeat(tmp_path / "out").items() >= {"state": "saving", "seconds_left": 0}.items()
    run.status.update(state="finished")
    run.status.update(step=0, force=True)
    assert heartbeat(tmp_path / "out").items() >= {"state": "finished", "step": 3, "message": None}.items()


def test_a_status_tells_who_and_where(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "130")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.chdir(tmp_path)
    Status("out", "train_pretrain.py", "records", 4, writer=True)
    found = read_status("out")
    assert found == read_status(tmp_path / "out" / "status.json")
    started = found.pop("started")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", started) and found.pop("updated") >= started
    assert found == {
        "script": "train_pretrain.py",
        "state": "starting",
        "step": None,
        "max_steps": None,
        "unit": "records",
        "rate": None,
        "seconds_left": None,
        "last_checkpoint": None,
        "metrics": {},
        "message": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": "130",
        "restarts": 2,
        "world_size": 4,
        "output_dir": str(tmp_path / "out"),
    }
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "129")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    Status("out", "train_pretrain.py", "records", 4, writer=True)
    assert read_status("out")["job"] == "129_7"


def test_a_failure_of_another_rank_is_told_and_stays(tmp_path, monkeypatch):
    first = Status(tmp_path, "train_dpo.py", "pairs", 2, writer=True)
    second = Status(tmp_path, "train_dpo.py", "pairs", 2, writer=False)
    first.update(state="running", step=7)
    monkeypatch.setenv("RANK", "1")
    second.fail("CUDA out of\nmemory")
    monkeypatch.setenv("RANK", "0")
    first.update(force=True, step=8)
    first.fail("connection closed by peer")
    found = heartbeat(tmp_path)
    assert found.items() >= {"state": "failed", "message": "[rank 1] CUDA out of memory", "step": 7}.items()


def test_another_ranks_later_failure_does_not_hide_the_first(tmp_path, monkeypatch):
    first = Status(tmp_path, "train_dpo.py", "pairs", 2, writer=True)
    second = Status(tmp_path, "train_dpo.py", "pairs", 2, writer=False)
    first.stop("SIGUSR2: saved checkpoint-3")
    second.fail("connection closed by peer")
    assert heartbeat(tmp_path).items() >= {"state": "stopped", "message": "SIGUSR2: saved checkpoint-3"}.items()


def test_a_restart_begins_a_new_life(tmp_path):
    """An end that an earlier part wrote hides nothing of this one, whichever rank speaks first."""
    Status(tmp_path, "train_dpo.py", "pairs", 2, writer=True).fail("the part before")
    late = Status(tmp_path, "train_dpo.py", "pairs", 2, writer=False)
    late.fail("this part, before rank 0 had a status")
    assert heartbeat(tmp_path)["message"] == "this part, before rank 0 had a status"
    again = Status(tmp_path, "train_dpo.py", "pairs", 2, writer=True)
    assert heartbeat(tmp_path).items() >= {"state": "starting", "message": None}.items()
    again.update(state="running")
    assert heartbeat(tmp_path)["state"] == "running"


def test_other_ranks_write_only_an_end(tmp_path):
    status = Status(tmp_path, "pope_eval.py", "questions", 2, writer=False)
    status.update(state="running", force=True, step=3)
    assert not (tmp_path / "status.json").exists()
    status.fail("no such picture")
    assert heartbeat(tmp_path)["message"] == "no such picture"


def test_failed_marks_the_run_of_this_process(tmp_path):
    failed("before there is a status")
    Status(tmp_path, "train_dpo.py", "pairs", 1, writer=True)
    failed("x" * 10_000)
    assert heartbeat(tmp_path)["state"] == "failed" and len(heartbeat(tmp_path)["message"]) == 500


def test_a_full_disk_costs_the_heartbeat_and_not_the_run(tmp_path, monkeypatch, capsys):
    status = Status(tmp_path, "train_dpo.py", "pairs", 1, writer=True)
    before = (tmp_path / "status.json").read_text()

    def full(path, text, **_):
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        for step in range(3):
            status.update(step=step, force=True)
    assert (tmp_path / "status.json").read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "No space left on device" in warnings[0] and warnings[0].startswith("warning: ")
    status.update(step=9, force=True)
    assert heartbeat(tmp_path)["step"] == 9


def test_unknown_fields_and_states_are_refused(tmp_path):
    status = Status(tmp_path, "train_dpo.py", "pairs", 1, writer=True)
    for wrong in ({"steps": 1}, {"state": "done"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            status.update(**wrong)


@pytest.mark.parametrize("state", ["starting", "running", "saving", "stopped", "finished", "failed"])
def test_a_killed_run_goes_stale_and_an_ended_one_never(tmp_path, state):
    status = Status(tmp_path, "train_dpo.py", "pairs", 1, writer=True)
    status.update(state=state)
    found = read_status(tmp_path)
    then = found["updated"] = "2026-01-02T03:04:05+00:00"
    now = 1767323045.0  # that moment
    assert then and seconds_since(found, now + 2) == 2
    assert not is_stale(found, now + STALE_AFTER.get(state, 0))
    assert is_stale(found, now + 1 + STALE_AFTER.get(state, 1e9)) is (state in STALE_AFTER)
    assert is_stale(found) is (state in STALE_AFTER)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ('{"state": "runn', "broken JSON"),
        ("[]", "expected a JSON object"),
        ('{"updated": "2026-01-02T03:04:05+00:00"}', "no key 'state'"),
        ('{"state": "asleep", "updated": "2026-01-02T03:04:05+00:00"}', "unknown state 'asleep'"),
        ('{"state": "running", "updated": "yesterday"}', "no time in ISO 8601"),
        ('{"state": "running", "updated": "2026-01-02T03:04:05"}', "no time in ISO 8601"),
    ],
)
def test_a_broken_heartbeat_is_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        read_status(tmp_path)
    assert str(tmp_path / "status.json") in str(raised.value)
