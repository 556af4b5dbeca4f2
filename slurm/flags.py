"""The flags of submit.py, and which of them go together."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from llava.command_line import OneLineParser, refuse_unknown
from llava.errors import UserError
from slurm import gpus
from slurm.job import LOGS, MAX_REQUEUES
from slurm.launch import LAUNCHERS, add_launch_options, choose_cards, refuse_both

# Options of sbatch that ask for cards.
CARDS = {"gpus", "gpus-per-node", "gpus-per-task", "gres"}

# What --sbatch may not set, by the flag that does.
OURS = {
    "array": "--array",
    "error": "--logs",
    "gpus-per-node": "--gpus",
    "job-name": "--name",
    "mem": "--mem-gb",
    "no-requeue": "--max-requeues 0",
    "ntasks-per-node": "--processes",
    "open-mode": "--logs",
    "output": "--logs",
    "requeue": "--max-requeues",
    "signal": "--signal-before",
    "time": "--hours",
}


def parse_args(description: str, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command behind ``--``."""
    parser = OneLineParser(
        prog="submit.py",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run = parser.add_argument_group("the run")
    add_launch_options(run)
    parser.set_defaults(launcher=None)  # so that what was given is told from what was not
    run.add_argument("--name", help="of the job and its log (default: the script's)")
    run.add_argument("--logs", type=Path, metavar="DIR", default=LOGS, help="seen by all nodes (default: slurm/logs)")
    run.add_argument("--sweep", type=Path, metavar="FILE", help="all trainings of FILE, POPE of each, one table")
    run.add_argument("--select-on", choices=["dev"], help="with --sweep: test questions only for the best on dev")
    run.add_argument("--dry-run", action="store_true", help="print what would be submitted or started")

    job = parser.add_argument_group("in the queue")
    add = job.add_argument
    add("--nodes", type=_positive, metavar="N")
    add("--gpus", type=_gpus, metavar="N", help="cards of every node, a process each: 4, or a100:4; 0: none")
    add("--hours", type=_hours, metavar="H", help="time limit; a run that is not done by then goes back into the queue")
    add("--partition")
    add("--account")
    add("--qos")
    add("--constraint", help="features that the nodes must have")
    add("--exclude", metavar="NODES", help="nodes not to use")
    add("--mem-gb", type=_positive, metavar="N", help="memory of every node")
    add("--cpus-per-task", type=_positive, metavar="N", help="cores of every node")
    add("--signal-before", type=_positive, metavar="SECONDS", help="how long before its limit the run is told to save")
    add("--max-requeues", type=_natural, metavar="N", help="how often a job that was stopped or killed goes back in")
    add("--sbatch", action="append", metavar="KEY=VALUE", default=[], help="another option of sbatch; may be repeated")
    add("--array", type=Path, metavar="FILE", help="a run for every line of FILE, which holds further arguments")
    add(
        "--parallel",
        type=_positive,
        metavar="N",
        help="how many of --array or --sweep run at a time (default: all; --local: one, or what the cards hold)",
    )
    add("--watch", action="store_true", help="follow state and log; end with the job's exit code")

    here = parser.add_argument_group("without a queue")
    here.add_argument("--local", action="store_true", help="run here, in the foreground")
    here.add_argument("--wait-gpus", type=_positive, metavar="N", help="with --local: wait for N free cards, take them")
    here.add_argument("--min-free", type=gpus.mebibytes, metavar="22G", help="what a card must have free to be taken")

    look = parser.add_argument_group("looking")
    look.add_argument("--status", nargs="*", metavar="FOLDER", help="a table of the runs (default: all that are known)")

    split = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser.parse_known_args(argv[:split])
    refuse_unknown(parser, rest)
    command = argv[split + 1 :]
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    _check(given, bool(command), {action.dest for action in job._group_actions})
    args.logs = args.logs.expanduser().absolute()
    return args, command


def _check(given: dict[str, Any], command: bool, queue_only: set[str]) -> None:
    """Refuse what contradicts itself or would do nothing."""
    if "status" in given:
        _refuse(given.keys() - {"status", "logs"}, "has no meaning with --status")
        if command:
            raise UserError("--status starts nothing; leave out what stands behind --")
        return
    if "sweep" in given:
        _refuse(given.keys() & {"array"}, "and --sweep both say which runs; keep one of them")
        if command:
            raise UserError("--sweep FILE holds the scripts; leave out what stands behind --")
    elif not command:
        raise UserError("no script; expected: [options] -- SCRIPT ARGS")
    elif "select_on" in given:
        raise UserError("--select-on needs --sweep FILE")
    if "local" in given:
        _refuse(given.keys() & (queue_only - {"parallel"}), "has no meaning with --local")
    else:
        _refuse(given.keys() & {"wait_gpus", "min_free"}, "is for --local; in the queue --gpus asks for cards")
    if "min_free" in given and "wait_gpus" not in given:
        raise UserError("--min-free needs --wait-gpus N, the number of cards")
    if "parallel" in given and not given.keys() & {"array", "sweep"}:
        raise UserError("--parallel needs --array FILE or --sweep FILE")
    if "name" in given and not re.fullmatch(r"[\w.-]+", given["name"]):
        raise UserError(f"--name {given['name']}: it is a file's name too; expected letters, digits, dots and dashes")
    _check_cards(given)
    for option in given.get("sbatch", []):
        key, _ = sbatch_option(option)
        if key in OURS:
            raise UserError(f"--sbatch {option}: that is what {OURS[key]} of submit.py sets")
        if key.replace("-", "_") in queue_only:
            raise UserError(f"--sbatch {option}: submit.py has --{key} for that")


def _check_cards(given: dict[str, Any]) -> None:
    if given.get("processes", 1) < 1:
        raise UserError(f"--processes {given['processes']}: expected 1 or more")
    if "wait_gpus" in given:
        _refuse(given.keys() & {"include"}, "and --wait-gpus both choose cards; keep one of them")
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            raise UserError("--wait-gpus and CUDA_VISIBLE_DEVICES both choose cards; keep one of them")
    elif "include" in given:
        refuse_both(given["include"], {name: os.environ[name] for name in os.environ if name != "SLURM_JOB_ID"})
        if "local" not in given:
            # As it will be in the job: Slurm numbers the cards that it gives from 0.
            visible = ",".join(map(str, range(int(given.get("gpus", "0").split(":")[-1]))))
            choose_cards(given["include"], {"CUDA_VISIBLE_DEVICES": visible, "SLURM_JOB_ID": ""})


def _refuse(names: set[str], why: str) -> None:
    for name in sorted(names):
        raise UserError(f"--{name.replace('_', '-')} {why}")


def fill(args: argparse.Namespace, settings: dict[str, str]) -> None:
    """Give flags that were left out the values of slurm/env.sh, by its variables' names, or where it has none ours."""
    for name, (variable, kind, default) in {
        "nodes": ("NODES", _positive, 1),
        "cpus_per_task": ("CPUS_PER_TASK", _positive, 8),
        "signal_before": ("SIGNAL_LEAD", _positive, 180),
        "launcher": ("LAUNCHER", _launcher, "torchrun"),
        "processes": ("PROCESSES", _positive, None),
        "max_requeues": ("MAX_REQUEUES", _natural, MAX_REQUEUES),
    }.items():
        if getattr(args, name) is None:
            text = settings.get(variable)
            try:
                setattr(args, name, kind(text) if text else default)
            except argparse.ArgumentTypeError as error:
                raise UserError(f"slurm/env.sh: {variable}={error}") from None
    given = {sbatch_option(option)[0] for option in args.sbatch}
    if args.gpus is None and not (
        CARDS & given or {f"SBATCH_{name.upper().replace('-', '_')}" for name in CARDS} & settings.keys()
    ):
        args.gpus = "1"  # as the scripts beside this file: a run that was meant for a card must not find none
    if args.hours and args.hours * 3600 < 2 * args.signal_before:
        raise UserError(
            f"--hours {args.hours:g}: the run is told to save {args.signal_before} s before the end, and would do "
            "little else; give it more time, or a smaller --signal-before"
        )


def sbatch_option(text: str) -> tuple[str, str | bool]:
    """``KEY=VALUE`` or ``KEY`` of ``--sbatch`` -> an option of sbatch and its value (True: it takes none)."""
    key, equals, value = text.removeprefix("--").partition("=")
    return key.replace("_", "-"), value if equals else True


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 1 or more")
    return int(text)


def _gpus(text: str) -> str:
    if not re.fullmatch(r"([\w.-]+:)?\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a number, as 4, or with the kind of card, as a100:4")
    return text


def _launcher(text: str) -> str:
    if text not in LAUNCHERS:
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(LAUNCHERS)}")
    return text


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < 10_000:
        raise argparse.ArgumentTypeError(f"{text}: expected hours, as 8 or 0.5")
    return hours
