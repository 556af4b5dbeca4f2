"""A run of a sweep: its stages one after the other, and ``sweep.json`` in its folder, by which none is done twice."""

from __future__ import annotations

import datetime
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llava.eval.pope import SETS
from llava.files import field, read_object, write_json
from llava.interruption import EXIT_STOPPED
from slurm import runs
from slurm.launch import ROOT

RECORD = "sweep.json"
ASK = "pope_eval.py"
DIAGNOSE = ["-m", "llava.eval.diagnose"]
DOING = {"train": "training", "dev": "the development questions", "pope": "POPE", "diagnose": "the diagnosis"}
CACHES = {"reference": "reference", "hidden": "hidden states", "features": "features"}
LONGEST_REASON = 300  # characters
_SAYS_WHY = re.compile(r"(?:\[rank ?\d+\]:? )?(?:error: .*|[\w.]*(?:Error|Exception|Interrupt)\b.*)")
_LAUNCHER_SAYS = re.compile(r"error: .* (failed with exit code \d+|was ended by \w+)")


@dataclass(frozen=True)
class Stage:
    """One command: a script (or ``-m`` and a module) with its arguments; ``folder`` is where its outputs lie."""

    name: str  # "train" | "dev" | "pope" | "diagnose"
    command: list[str]
    folder: str

    @property
    def is_module(self) -> bool:
        return self.command[0] == "-m"

    def cards(self) -> list[Path]:
        """The files that it writes last."""
        if self.name == "train":
            return [Path(self.folder) / "run.json"]
        asked = runs._value(self.command, "--set") or "adversarial"
        asked = {"adv": "adversarial"}.get(asked, asked)
        if self.name == "diagnose":
            names = SETS if asked == "all" else (asked,)
            return [Path(self.folder) / f"diagnostics_{name}.json" for name in names]
        return [Path(self.folder) / f"run_{asked}.json"]


@dataclass(frozen=True)
class Run:
    """A training with what it is asked, or a model that is only asked (a baseline).

    ``later`` stages wait for all runs: what only the chosen are asked, and what shares a cache that one run writes.
    """

    name: str
    folder: str
    first: list[Stage]
    later: list[Stage]

    @property
    def trains(self) -> bool:
        return self.first[0].name == "train"


class Record:
    """``sweep.json``: of every stage the command, how it ended, and where its output is."""

    def __init__(self, run: Run) -> None:
        self.path = Path(run.folder) / RECORD
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.stages = field(str(self.path), read_object(self.path), "stages", dict, "delete the file to begin anew")

    def of(self, stage: Stage) -> dict[str, Any]:
        """What is known of a stage; empty before it has begun."""
        return self.stages.get(stage.name, {})

    def is_done(self, stage: Stage) -> bool:
        """Whether it has ended well with the same command, also where nobody was left to write that down."""
        known = self.of(stage)
        if known.get("command") != shlex.join(stage.command) or known.get("state") == "failed":
            return False
        if stage.name == "diagnose":  # its files do not say when it began
            return known["state"] == "done" and all(card.is_file() for card in stage.cards())
        return is_finished(stage, known["started"])

    def begin(self, stage: Stage, log: Path | None) -> None:
        """It starts, or goes on."""
        before, command = self.of(stage), shlex.join(stage.command)
        goes_on = before.get("command") == command and before.get("state") in ("running", "stopped")
        if stage.name == "train":
            self.stages = {}  # what another training was asked is not this one's
        self.stages[stage.name] = {
            "command": command,
            "state": "running",
            "started": before["started"] if goes_on else now(),
            "seconds": before.get("seconds", 0.0) if goes_on else 0.0,
            "exit_code": None,
            "reason": None,
            "log": None if log is None else str(log),
        }
        self._write()

    def runs_as(self, stage: Stage, process: int) -> None:
        """Which process it is: it may outlive the one that started it."""
        with_created = {"process": process, "created": psutil.Process(process).create_time()}
        self.of(stage).update(with_created, host=socket.gethostname())
        self._write()

    def process(self, stage: Stage) -> psutil.Process | None:
        """The stage's process of an earlier start, if it still runs on this machine."""
        known = self.of(stage)
        if known.get("state") != "running" or known.get("host") != socket.gethostname():
            return None
        try:
            process = psutil.Process(known["process"])
            return process if abs(process.create_time() - known["created"]) < 1 else None
        except psutil.NoSuchProcess:
            return None

    def end(self, stage: Stage, state: str, seconds: float, code: int, reason: str | None = None) -> None:
        """It has ended: done, failed or stopped."""
        known = self.of(stage)
        known.update(state=state, seconds=round(known["seconds"] + seconds, 1), exit_code=code, reason=reason)
        for key in ("process", "created", "host"):
            known.pop(key, None)
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"stages": self.stages})


def now() -> str:
    """As run cards have it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def is_finished(stage: Stage, since: str) -> bool:
    """Whether all its cards are of a run that began no sooner than ``since`` and has come to its end."""
    cards = [read_object(card) if card.is_file() else {} for card in stage.cards()]
    return all(card.get("status") == "finished" and card.get("started", "") >= since for card in cards)


def carry_out(
    run: Run,
    stages: list[Stage],
    do: Callable[[Stage, Record], int],
    tell: Callable[[str], None],
    log: Path | None = None,
    stopping: Callable[[], bool] = lambda: False,
    stopped: Sequence[int] = (EXIT_STOPPED,),
) -> str:
    """Do the stages that are not done; "done", "failed" or "stopped".

    ``do`` gives an exit code, which is among ``stopped`` where the stage is to go on; what it writes goes to the end of
    ``log``. A stage that fails ends the run, and is done again the next time. Once ``stopping``, none begins.
    """
    record = Record(run)
    for stage in stages:
        if record.is_done(stage):
            if record.of(stage)["state"] != "done":  # its starter was killed before it could write that down
                record.end(stage, "done", read_object(stage.cards()[0]).get("wall_time_s", 0.0), 0)
            continue
        if stopping():
            return "stopped"
        offset = log.stat().st_size if log and log.exists() else 0
        began = time.monotonic()
        code = do(stage, record)
        seconds = time.monotonic() - began
        if code == 0 and stage.name != "diagnose" and not is_finished(stage, record.of(stage)["started"]):
            code, reason = 1, f"it ended with 0, but no finished {stage.cards()[0]} is there"
        else:
            reason = last_error(log, offset) if log else None
        if code == 0:
            record.end(stage, "done", seconds, 0)
            tell(done_line(stage, record))
        elif code in stopped or stopping():
            record.end(stage, "stopped", seconds, code)
            tell(f"{DOING[stage.name]} stopped; the same command goes on from there")
            return "stopped"
        else:
            record.end(stage, "failed", seconds, code, reason or f"exit code {code}")
            where = f"; log: {log}" if log else ""
            tell(f"{DOING[stage.name]} failed with exit code {code}: {record.of(stage)['reason']}{where}")
            return "failed"
    return "done"


def unfinished(run: Run, stages: list[Stage]) -> list[Stage]:
    """What is still to be done."""
    record = Record(run)
    return [stage for stage in stages if not record.is_done(stage)]


def last_error(log: Path, offset: int) -> str | None:
    """The line behind ``offset`` that says why a command failed; None where it wrote nothing."""
    if not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(offset)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if _SAYS_WHY.fullmatch(line)]
    # launch.py's own last line only repeats that a rank has failed.
    telling = [line for line in said if not _LAUNCHER_SAYS.fullmatch(line)] or said or lines
    return telling[-1].removeprefix("error: ")[:LONGEST_REASON] if telling else None


def done_line(stage: Stage, record: Record) -> str:
    """One line about a finished stage: its seconds, and what a reader wants to know at once."""
    seconds = f"{record.of(stage)['seconds']:.1f} s"
    if stage.name == "train":
        caches = caches_of(stage)
        told = [f"{CACHES.get(name, name)} {cache_words(took)}" for name, took in caches.items()]
        return "; ".join([f"trained in {seconds}", *told])
    if stage.name == "diagnose":
        return f"diagnosed in {seconds}"
    metrics = read_object(stage.cards()[0])["metrics"]
    told = ", ".join(f"{name} {100 * of_set['accuracy']:.2f}" for name, of_set in metrics.items())
    what = "development questions" if stage.name == "dev" else "POPE"
    return f"{what} asked in {seconds}; accuracy {told}"


def caches_of(stage: Stage) -> dict[str, Mapping[str, float]]:
    """What the training computed before its first step, and what it found, by cache."""
    return read_object(stage.cards()[0]).get("caches", {})


def cache_words(took: Mapping[str, float]) -> str:
    """``computed in 4.1 s``, ``found (0.1 s)``, or both."""
    if not took["computed"]:
        return f"found ({took['seconds']:.1f} s)"
    some = f" {took['computed']} of {took['computed'] + took['found']}" if took["found"] else ""
    return f"computed{some} in {took['seconds']:.1f} s"


def with_root(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which ``python -m llava...`` finds the package from any folder."""
    others = [path for path in [environment.get("PYTHONPATH")] if path]
    return {**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *others])}
