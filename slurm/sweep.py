"""Carrying out a sweep, here or in the queue, and the report at its end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from llava.errors import UserError, note
from llava.files import atomic_write, claim_folder, field, read_object, write_json
from llava.interruption import EXIT_STOPPED, SIGNALS, Stopped
from slurm import foreground, gpus, table, watch
from slurm.job import CANCELLED, KILLED, run_here, run_job
from slurm.sweep_file import BASELINE, Sweep, read_sweep
from slurm.sweep_stages import (
    CACHES,
    DOING,
    Record,
    Run,
    Stage,
    cache_words,
    caches_of,
    carry_out,
    unfinished,
    with_root,
)

REPORT = ["-m", "llava.eval.report"]
JOBS = "sweep_jobs.json"
FAILED = "failed.md"
SHOW_AGAIN = 1.0  # seconds into a stage, at which a signal that came before it is sent on

# Submits calls, (module, function, arguments) each, with what --status shows of them: their (job, log).
Put = Callable[..., list[tuple[str, Path]]]


def start(args: argparse.Namespace, put: Put) -> int:
    """``submit.py --sweep``; gives the exit code: 1 where a run failed, 75 where it was stopped."""
    sweep = read_sweep(args.sweep, args.select_on == "dev")
    if args.dry_run and args.local:
        for command in sweep.programs:
            words = [sys.executable, *command] if command[0] == "-m" else foreground.launch_command(args, command)
            print(shlex.join(words))
        print(shlex.join([sys.executable, *_report_words(sweep, sweep.runs)]))
        return 0
    if not args.dry_run:
        claim_folder(sweep.folder, "sweep")
        _refuse_queued(sweep.folder)
        _refuse_other_trainings(sweep)
        _name_others(sweep)
    return _here(args, sweep) if args.local else _in_queue(args, sweep, put)


def _refuse_queued(folder: Path) -> None:
    """Two that do the same stages would spoil each other's files."""
    if not (folder / JOBS).is_file():
        return
    for job in field(str(folder / JOBS), read_object(folder / JOBS), "jobs", list):
        try:
            states = watch.states(job)
        except (watch.Unreachable, FileNotFoundError) as error:
            raise UserError(
                f"{folder}: job {job} of this sweep may still be at work, and Slurm does not answer ({error}); ask "
                f"again later, or delete {folder / JOBS} where you know that it has ended"
            ) from None
        if any(state.name not in watch.ENDED for state in states.values()):
            raise UserError(f"{folder}: job {job} of this sweep still waits or runs; wait for it, or scancel {job}")


def _refuse_other_trainings(sweep: Sweep) -> None:
    for run in sweep.runs:
        known = Record(run).of(run.first[0])
        command = shlex.join(run.first[0].command)
        if run.trains and known.get("state") == "done" and known["command"] != command:
            raise UserError(
                f"{run.folder} holds a finished training with other flags than {sweep.file} has now; choose another "
                "output_dir, or delete that folder"
            )


def _name_others(sweep: Sweep) -> None:
    """Runs that are no longer in the file stay as they are."""
    names = {run.name for run in sweep.runs}
    others = sorted(f.parent.name for f in sweep.folder.glob("*/sweep.json") if f.parent.name not in names)
    if others:
        note(f"no longer in {sweep.file}, left alone and not reported: {', '.join(others)}")


# --- here


class _Here:
    """A sweep on this machine: who runs, what was said, whether to stop."""

    def __init__(self, args: argparse.Namespace, sweep: Sweep, signals: foreground.Signals) -> None:
        self.args, self.sweep, self.signals = args, sweep, signals
        self.stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.parallel = args.parallel or 1
        if args.wait_gpus:
            room = gpus.runs_at_a_time(args.wait_gpus, args.min_free)
            self.parallel = min(room, args.parallel or room)
        self.halt = threading.Event()
        self._printing = threading.Lock()

    def stopping(self) -> bool:
        return self.halt.is_set() or bool(self.signals.received)

    def log(self, run: Run) -> Path:
        number = self.sweep.runs.index(run)
        return self.args.logs / f"{self.args.name}-{self.stamp}_{number}.log"

    def tell(self, run: Run, text: str) -> None:
        number = self.sweep.runs.index(run) + 1
        with self._printing:
            print(f"[{number}/{len(self.sweep.runs)}] {run.name}: {text}", flush=True)

    def do(self, run: Run, stages: list[Stage]) -> str:
        """The stages of a run that are not done, on cards of its own where it waits for cards."""
        todo = unfinished(run, stages)
        if not todo:
            # Also what was finished while nobody was left to write that down.
            self.tell(run, f"{', '.join(DOING[stage.name] for stage in stages)}: done before")
            return carry_out(run, stages, _never, _nothing)
        if self.stopping():
            return "stopped"
        log = self.log(run)
        first = todo[0].command
        table.remember(self.args.logs, [(None, log, first[1:] if first[0] == "-m" else first)])
        variables: dict[str, str] = {}
        if self.parallel > 1 and not self.args.wait_gpus:
            threads = len(os.sched_getaffinity(0)) // self.parallel // (self.args.processes or 1)
            variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, threads)))
        with contextlib.ExitStack() as stack:
            held: list[int] = []
            if self.args.wait_gpus:
                try:
                    indices, held = stack.enter_context(
                        gpus.taken(self.args.wait_gpus, self.args.min_free, stop=self.stopping)
                    )
                except Stopped:
                    return "stopped"
                variables |= foreground.card_variables(indices)

            def run_stage(stage: Stage, record: Record) -> int:
                return self._stage(stage, record, log, variables, held)

            outcome = carry_out(run, stages, run_stage, lambda text: self.tell(run, text), log, self.stopping)
        if outcome == "stopped":
            self.halt.set()
        return outcome

    def _stage(self, stage: Stage, record: Record, log: Path, variables: dict[str, str], held: list[int]) -> int:
        earlier = record.process(stage)
        if earlier is not None:
            # Its starter was killed, it was not: it would refuse a second one beside it.
            began = time.time()
            note(f"{stage.folder}: process {earlier.pid} of an earlier start is still at work; waiting for it")
            foreground.follow(earlier, self.signals, launcher=not stage.is_module)
            if record.is_done(stage):
                record.of(stage)["seconds"] += began - earlier.create_time()
                return 0
            if self.stopping():
                return EXIT_STOPPED
        record.begin(stage, log)
        module = stage.is_module
        return foreground.execute(
            [sys.executable, *stage.command] if module else foreground.launch_command(self.args, stage.command),
            log,
            self.signals,
            variables={**variables, **(with_root(os.environ) if module else {})},
            held=held,
            launcher=not module,
            started=lambda process: record.runs_as(stage, process),
        )

    def all(self, runs: list[Run], stages: Callable[[Run], list[Stage]], parallel: int) -> None:
        with ThreadPoolExecutor(parallel) as pool:
            futures = [pool.submit(self.do, run, stages(run)) for run in runs]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.halt.set()  # the others stop at their next stage
                raise


def _here(args: argparse.Namespace, sweep: Sweep) -> int:
    with foreground.Signals() as signals:
        here = _Here(args, sweep, signals)
        here.all(sweep.runs, lambda run: run.first, here.parallel)
        if not here.stopping():
            here.all(_with_later(sweep), lambda run: run.later, 1)
        if here.stopping():
            print("stopped; the same command goes on from there", flush=True)
            return 128 + signal.SIGINT if signal.SIGINT in signals.received else EXIT_STOPPED
        for line in shared_work(sweep):
            print(line, flush=True)
        log = args.logs / f"{args.name}-{here.stamp}_report.log"

        def report(words: list[str]) -> int:
            command, root = [sys.executable, *words], with_root(os.environ)
            return foreground.execute(command, log, signals, variables=root, show=True, launcher=False)

        return conclude(sweep, report)


def _never(stage: Stage, record: Record) -> int:
    raise AssertionError(f"{stage.name} is done")


def _nothing(text: str) -> None:
    pass


# --- what comes after the runs


def _with_later(sweep: Sweep) -> list[Run]:
    """Those that have something left to do once all have had their turn: the chosen ones and what they beat."""
    finished = [run for run in sweep.runs if run.later and not unfinished(run, run.first)]
    if not sweep.select:
        return finished
    trained = [run for run in finished if run.trains]
    if not trained:
        return []
    folders = chosen([Path(run.folder) for run in trained])
    kept = [run for run in trained if Path(run.folder).resolve() in folders]
    note(f"best on the development set: {', '.join(run.name for run in kept)}")
    return [run for run in finished if not run.trains] + kept


def chosen(folders: list[Path]) -> set[Path]:
    """The folders of the configuration that is best on the development set: all its seeds."""
    from llava.eval.comparison import select_on_dev
    from llava.eval.evaluated import grouped, read_runs

    return {run.folder.resolve() for run in select_on_dev(grouped(read_runs(folders))).runs}


def failures(sweep: Sweep) -> list[dict[str, Any]]:
    """Every stage that failed, or that was begun and has not ended, with its run, reason and log."""
    found = []
    for run in sweep.runs:
        record = Record(run)
        for stage in (*run.first, *run.later):
            known = record.of(stage)
            if known and not record.is_done(stage):
                reason = known["reason"] if known["state"] == "failed" else "not finished"
                found.append({"run": run.name, "stage": DOING[stage.name], "log": known["log"], "reason": reason})
                break
        else:
            if todo := unfinished(run, run.first):
                found.append({"run": run.name, "stage": DOING[todo[0].name], "log": None, "reason": "not begun"})
    return found


def conclude(sweep: Sweep, report: Callable[[list[str]], int]) -> int:
    """The report over all runs that are done, and what failed; ``report`` runs Python with these words."""
    failed = failures(sweep)
    file = sweep.folder / FAILED
    if failed:
        lines = [
            f"- {f['run']}: {f['stage']}: {f['reason']}{' (' + f['log'] + ')' if f['log'] else ''}" for f in failed
        ]
        with atomic_write(file) as stream:
            stream.write("\n".join(lines) + "\n")
    else:
        file.unlink(missing_ok=True)
    done = [run for run in sweep.runs if not unfinished(run, run.first)]
    code = 0
    if done:
        print(flush=True)
        code = report(_report_words(sweep, done))
    if failed:
        # stdout holds the table, for who keeps it; the last lines are what to look at.
        print(
            f"{len(failed)} of {len(sweep.runs)} runs failed ({file}); the same command tries them again:", flush=True
        )
        print(*lines, sep="\n", flush=True)
    if code:
        print(f"the report failed with exit code {code}; the same command makes it again", flush=True)
    elif not failed:
        print(f"all {len(sweep.runs)} runs are done; report: {sweep.folder / 'report'}", flush=True)
    return 1 if failed or code else 0


def _report_words(sweep: Sweep, done: list[Run]) -> list[str]:
    words = [*REPORT, *(run.folder for run in done), "--out", str(sweep.folder / "report")]
    if any(run.name == BASELINE for run in done):
        words += ["--baseline", str(sweep.folder / BASELINE)]
    return [*words, *(["--select-on", "dev"] if sweep.select else [])]


def shared_work(sweep: Sweep) -> list[str]:
    """What one run computed and the others found, with the seconds of both, a line a cache."""
    trained = [run for run in sweep.runs if run.trains and not unfinished(run, run.first[:1])]
    seconds = {run.name: Record(run).of(run.first[0])["seconds"] for run in trained}
    lines = []
    for cache, title in CACHES.items():
        took = {run.name: found[cache] for run in trained if cache in (found := caches_of(run.first[0]))}
        first = [name for name, of_run in took.items() if of_run["computed"]]
        later = [name for name, of_run in took.items() if not of_run["computed"]]
        if first and later:
            lines.append(
                f"{title}: {cache_words(took[first[0]])} by {first[0]}, whose training took {seconds[first[0]]:.1f} s; "
                f"found by {len(later)} others, whose trainings took {mean(seconds[n] for n in later):.1f} s on average"
            )
    return lines


# --- in the queue


def _in_queue(args: argparse.Namespace, sweep: Sweep, put: Put) -> int:
    how = {
        "launcher": args.launcher,
        "processes": args.processes,
        "include": args.include,
        "max_requeues": args.max_requeues,
        "logs": str(args.logs),
    }
    todo = [run for run in sweep.runs if unfinished(run, run.first)]
    tasks = [
        (
            ("slurm.sweep", "run_task", {"run": dataclasses.asdict(run), "name": args.name, "how": how}),
            unfinished(run, run.first)[0].command,
        )
        for run in todo
    ]
    jobs: list[tuple[str, Path]] = put(args, args.name, tasks) if tasks else []
    plan = {"sweep": {**dataclasses.asdict(sweep), "file": str(sweep.file), "folder": str(sweep.folder)}}
    last = ("slurm.sweep", "run_last", {**plan, "name": f"{args.name}-report", "how": how})
    array = jobs[0][0].split("_")[0] if jobs else None
    if array and not args.dry_run:
        write_json(sweep.folder / JOBS, {"jobs": [array]})
    after = {"dependency": f"afterany:{array}"} if array else {}
    ((report, log),) = put(args, f"{args.name}-report", [(last, _report_words(sweep, sweep.runs))], **after)
    if args.dry_run:
        return 0
    write_json(sweep.folder / JOBS, {"jobs": [*([array] if array else []), report]})
    if not args.watch:
        return 0
    try:
        if array:
            watch.follow(array, dict(jobs))
        return watch.follow(report, {report: log})
    except KeyboardInterrupt:
        numbers = " ".join([*([array] if array else []), report])
        print(f"\nnote: the jobs go on; scancel {numbers} ends them", file=sys.stderr)
        return 128 + signal.SIGINT


def run_task(run: dict[str, Any], name: str, how: dict[str, Any]) -> int:
    """A task of the array: the first stages of a run, in the batch step of a job; gives the exit code of the job."""
    planned = _run_of(run)
    return _task(planned, planned.first, name, how)


def run_last(sweep: dict[str, Any], name: str, how: dict[str, Any]) -> int:
    """The last job: what waits for all runs, and the report; gives the exit code of the job."""
    runs = [_run_of(run) for run in sweep["runs"]]
    planned = Sweep(Path(sweep["file"]), Path(sweep["folder"]), runs, sweep["select"])
    for run in _with_later(planned):
        code = _task(run, run.later, name, how)
        if code in (EXIT_STOPPED, KILLED, CANCELLED):
            return code
    for line in shared_work(planned):
        print(line, flush=True)
    return conclude(planned, _python)


def _run_of(plain: dict[str, Any]) -> Run:
    first, later = ([Stage(**stage) for stage in plain[part]] for part in ("first", "later"))
    return Run(plain["name"], plain["folder"], first, later)


def _python(words: list[str]) -> int:
    sys.stdout.flush()
    return subprocess.run([sys.executable, *words], check=False, env=with_root(os.environ)).returncode


def _task(run: Run, stages: list[Stage], name: str, how: dict[str, Any]) -> int:
    """Stages in a job: each on all its nodes, and queued again with it where it is stopped."""
    options = {**how, "logs": Path(how["logs"])}
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    log = log_file(options["logs"], name, job)
    between: list[int] = []
    before = {number: signal.signal(number, lambda number, _: between.append(number)) for number in SIGNALS}
    codes = [0]

    def do(stage: Stage, record: Record) -> int:
        record.begin(stage, log)
        # A signal between two stages has found no run that could save: the next one gets it, and hears it in time.
        for number in between:
            again = threading.Timer(SHOW_AGAIN, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        between.clear()
        if stage.is_module:
            codes.append(run_here([sys.executable, *stage.command], with_root(os.environ), how["max_requeues"]))
        else:
            codes.append(run_job(stage.command, **options))
        return codes[-1]

    try:
        outcome = carry_out(
            run, stages, do, lambda text: print(f"{run.name}: {text}", flush=True), log,
            stopped=(EXIT_STOPPED, KILLED, CANCELLED),
        )  # fmt: skip
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if outcome == "done" else codes[-1] or 1


def log_file(folder: Path, name: str, job: str) -> Path:
    """Where a job's output goes."""
    return folder / f"{name}-{job}.log"
