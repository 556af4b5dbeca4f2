"""pope_eval killed again and again, on any number of ranks: in the end its files are those of a run left in peace."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import forked
import pytest

from llava.interruption import EXIT_STOPPED
from llava.status import read_status

pytestmark = pytest.mark.slow

SETS = ("random", "popular", "adversarial")
KILLS = 20
# Changes of files, as forked.py notes them: of answers at any time, and of those that are written at the end.
ANY = r"^\w+ \.?(pope|run|status)_"
END = r"^(\w+ \.?(pope_[a-z]+\.(made\.json|jsonl)|run_all\.json)|remove )"


def flags(pope_world: Path, golden: Path, folder: Path) -> list:
    return [
        *("--coco_path", pope_world / "coco", "--pope_path", pope_world / "pope", "--set", "all"),
        *("--model-path", golden / "tiny-llava-original", "--output_dir", folder),
        *("--max_new_tokens", 1, "--batch_size", 25),
    ]


def answers_in(folder: Path) -> dict[str, bytes]:
    return {name: (folder / f"pope_{name}.jsonl").read_bytes() for name in SETS}


def wait_for_answers(run: forked.Run, folder: Path, rank: int) -> None:
    """Until a rank has written some that were not there."""

    def size() -> int:
        return sum(file.stat().st_size for file in folder.glob(f"pope_random.*.part{rank}.jsonl"))

    before = size()
    while size() <= before:
        assert None in run.poll(), run.text
        time.sleep(0.01)


@pytest.fixture(scope="module")
def peaceful(pope_world, golden, tmp_path_factory):
    """A run that nobody disturbs: its folder, and its seconds."""
    folder = tmp_path_factory.mktemp("peaceful")
    forked.server().ask({"poll": []})  # its imports are over
    began = time.monotonic()
    run = forked.run("pope_eval", flags(pope_world, golden, folder))
    assert run.codes == [0], run.text
    return folder, time.monotonic() - began


def test_twenty_kills_change_nothing(peaceful, pope_world, golden, tmp_path):
    """On the clock, at a change of a file, at one of the end; four to a run at most, then it may come to its end."""
    whole, seconds = peaceful
    draw, killed, number = random.Random(7), {"clock": 0, "any": 0, "end": 0}, 0
    while sum(killed.values()) < KILLS:
        number += 1
        folder = tmp_path / str(number)
        command = flags(pope_world, golden, folder)
        for start in range(5):
            ranks = draw.choice([1, 1, 2, 2, 3])
            kind = min(killed, key=killed.get) if start < 4 else None
            die = None
            if kind in ("any", "end"):
                among, most = (ANY, 40) if kind == "any" else (END, 18)
                die = forked.AtFile(draw.randrange(1, most), among)
            run = forked.start("pope_eval", command, world_size=ranks, die=die)
            if kind == "clock":
                end = time.monotonic() + draw.uniform(0.1, 0.9) * seconds
                while None in run.poll() and time.monotonic() < end:
                    time.sleep(0.01)
                run.kill()
            codes = run.wait()
            if codes == [0] * ranks:
                break
            # A rank may have left before the group was killed: it has nothing to do while rank 0 writes the end.
            assert kind and codes[0] == -signal.SIGKILL and {*codes[1:]} <= {0, -signal.SIGKILL}, run.text
            killed[kind] += 1
        assert codes == [0] * ranks
        assert answers_in(folder) == answers_in(whole)
        assert {f.name for f in folder.iterdir()} == {f.name for f in whole.iterdir()}  # no part, no temporary file
        assert read_status(folder / "status_all.json")["state"] == "finished"
        assert number < KILLS, f"too few kills: {killed}"
    assert min(killed.values()) >= 5, killed


def test_a_signal_stops_every_rank_and_others_go_on(peaceful, pope_world, golden, tmp_path):
    command = flags(pope_world, golden, tmp_path)
    for ranks, number in ((2, signal.SIGUSR2), (3, signal.SIGTERM)):
        run = forked.start("pope_eval", command, world_size=ranks)
        wait_for_answers(run, tmp_path, ranks - 1)
        run.send(number)
        assert run.wait(grace=60) == [EXIT_STOPPED] * ranks, run.text
        assert run.stderr().strip().splitlines()[-1].startswith(f"note: stopped by {number.name}; ")
        assert read_status(tmp_path / "status_all.json")["state"] == "stopped"
    run = forked.run("pope_eval", command)
    assert run.codes == [0], run.text
    assert answers_in(tmp_path) == answers_in(peaceful[0])


def test_a_rank_that_dies_fails_the_run_and_loses_nothing(peaceful, pope_world, golden, tmp_path):
    """No launcher ends the others here, as none does on another node: they hear of it when they wait for the rank."""
    command = flags(pope_world, golden, tmp_path)
    run = forked.start("pope_eval", command, world_size=2)
    wait_for_answers(run, tmp_path, rank=1)
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.wait(grace=60) == [1, -signal.SIGKILL], run.text
    line = "another rank has ended; its own message, or its node's log, says why; the same command goes on"
    assert f"error: {line}" in run.stderr() and "Traceback" not in run.stderr()
    status = read_status(tmp_path / "status_all.json")
    assert status["state"] == "failed" and status["message"].startswith(line)
    assert not list(tmp_path.glob("pope_*.made.json"))
    run = forked.run("pope_eval", command)
    assert run.codes == [0] and "questions are answered already" in run.stderr(), run.text
    assert answers_in(tmp_path) == answers_in(peaceful[0])
