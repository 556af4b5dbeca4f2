#!/usr/bin/env python
"""Start a script's processes on this node: under srun once on every node of a job, or alone on one machine.

    srun --ntasks-per-node=1 python slurm/launch.py --launcher torchrun -- train_dpo.py ARGS
    python slurm/launch.py --processes 2 -- pope_eval.py ARGS

Its exit code is that of the first process that failed (128 + N for one that signal N killed). It does not hear SIGUSR1,
SIGUSR2 and SIGTERM: Slurm sends them to every process of a job, and the ranks answer them.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from llava.command_line import OneLineParser, refuse_unknown  # noqa: E402
from llava.errors import EXIT_BAD_INPUT, UserError, command_line  # noqa: E402
from llava.interruption import EXIT_STOPPED, SIGNALS  # noqa: E402

LAUNCHERS = ("torchrun", "deepspeed")
# Both launchers give the other processes of a node 30 s to end after the first failure.
OTHERS_SECONDS = 45.0


class Place(NamedTuple):
    """This node in the job: its number, all host names in order, and the port on the first of them."""

    node: int
    hosts: list[str]
    port: int

    @property
    def host(self) -> str:
        """This node's name."""
        return self.hosts[self.node]

    @property
    def head(self) -> str:
        """Where the processes meet. Other nodes must be able to reach it."""
        return self.hosts[0] if len(self.hosts) > 1 else "127.0.0.1"


class Failure(NamedTuple):
    """The first process of a node that failed: its exit code, when (seconds since 1970), and which it was."""

    code: int
    when: float
    who: str


def this_place(env: Mapping[str, str]) -> Place:
    """What Slurm says about this task; outside a step of Slurm's one node, and outside a job any free port."""
    if "SLURM_JOB_ID" in env:
        port = 20000 + int(env["SLURM_JOB_ID"]) % 20000
    else:
        from llava.train.launch import free_port

        port = free_port()
    if "SLURM_STEP_NODELIST" not in env:
        return Place(0, [os.uname().nodename], port)
    if env.get("SLURM_LOCALID", "0") != "0":
        raise UserError("slurm/launch.py was started twice on one node; give srun --ntasks-per-node=1")
    names = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], check=True, capture_output=True, text=True
    )
    return Place(int(env["SLURM_NODEID"]), names.stdout.split(), port)


def choose_cards(include: str | None, env: Mapping[str, str]) -> list[str]:
    """The cards to use, as CUDA_VISIBLE_DEVICES names them; without ``include`` all that are visible."""
    variable = env.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        visible = [str(index) for index in range(_count_cards())]
    else:
        visible = [card for card in variable.split(",") if card not in ("", "NoDevFiles")]
    if include is None:
        return visible
    refuse_both(include, env)
    if not re.fullmatch(r"(localhost:)?\d+(,\d+)*", include):
        raise UserError(f"--include {include}: expected numbers of cards with commas between, as in --include 0,1")
    picked = include.removeprefix("localhost:").split(",")
    if len(set(picked)) < len(picked):
        raise UserError(f"--include {include}: names a card twice")
    if not visible:  # no card anywhere: the numbers only say how many processes
        return picked
    if missing := [card for card in picked if int(card) >= len(visible)]:
        raise UserError(f"--include {include}: no card {missing[0]}; here are cards 0 to {len(visible) - 1}")
    return [visible[int(card)] for card in picked]


def refuse_both(include: str | None, env: Mapping[str, str]) -> None:
    """Refuse ``include`` beside a CUDA_VISIBLE_DEVICES that is not Slurm's."""
    if include is not None and "CUDA_VISIBLE_DEVICES" in env and "SLURM_JOB_ID" not in env:
        raise UserError(
            f"--include {include} and CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']} both choose cards, and the "
            "deepspeed launcher would drop the variable; keep one of them"
        )


def count_processes(processes: int | None, cards: list[str]) -> int:
    """How many processes a node runs: ``processes``, else one a card, else one."""
    if processes is None:
        return max(1, len(cards))
    if processes < 1:
        raise UserError(f"--processes {processes}: expected 1 or more")
    if processes > len(cards) and _count_cards():
        raise UserError(f"--processes {processes}: there are {len(cards)} cards; every process needs one of its own")
    return processes


def find_script(command: list[str]) -> list[str]:
    """The command with its script's path: relative to the current folder, else to the repository."""
    for folder in (Path.cwd(), ROOT):
        if (folder / command[0]).is_file():
            return [str(folder / command[0]), *command[1:]]
    raise UserError(f"{command[0]}: no such script, neither here nor in {ROOT}")


def split_command(argv: list[str]) -> tuple[list[str], list[str]]:
    """Own options and the command behind ``--``."""
    at = argv.index("--") if "--" in argv else len(argv)
    if not argv[at + 1 :] and not {"-h", "--help"} & set(argv[:at]):
        raise UserError("no script; expected: [options] -- SCRIPT ARGS")
    return argv[:at], argv[at + 1 :]


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how a node's processes are started."""
    add = parser.add_argument
    add("--launcher", choices=LAUNCHERS, default="torchrun", help="what starts the processes of a node")
    add("--processes", type=int, metavar="N", help="processes a node (default: one a card, without cards one)")
    add("--include", metavar="0,1", help="which of the visible cards (of those that Slurm gave: the first is 0)")


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the command to start."""
    parser = OneLineParser(description="Start a script's processes on this node.", allow_abbrev=False)
    add_launch_options(parser)
    parser.add_argument("--outcome", metavar="PREFIX", help="file PREFIX + node number, to write how it ended into")
    own, command = split_command(argv)
    args, rest = parser.parse_known_args(own)
    refuse_unknown(parser, rest)
    return args, command


def launch(
    command: list[str],
    *,
    launcher: str = "torchrun",
    processes: int | None = None,
    include: str | None = None,
    outcome: str | None = None,
) -> int:
    """Run ``command`` (a script and its arguments) on this node and give the exit code; blocks until all has ended.

    ``outcome``: a file of this name with the node's number behind it, which must exist, gets the exit code of the node
    and when it came about, as JSON. A node that failed then waits a while for the others' outcomes, since srun kills
    them as soon as it has ended.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    place = this_place(os.environ)
    code, when = 1, None
    try:
        failure = _run(place, command, launcher, processes, include)
        code, when = (failure.code, failure.when) if failure else (0, None)
    except UserError:
        code = EXIT_BAD_INPUT
        raise
    finally:
        if outcome is not None:
            Path(f"{outcome}{place.node}").write_text(json.dumps({"code": code, "when": when or time.time()}))
    # A rank that ends with 2 or 75 has said why in a line; of one that ends with 1 there is a traceback.
    if code > 128:
        print(f"error: {failure.who} was ended by {_signal_name(code - 128)}", file=sys.stderr, flush=True)
    elif code not in (0, EXIT_BAD_INPUT, EXIT_STOPPED):
        print(f"error: {failure.who} failed with exit code {code}", file=sys.stderr, flush=True)
    if code and outcome is not None:
        _wait_for_outcomes(outcome, len(place.hosts))
    return code


def _run(place: Place, command: list[str], launcher: str, processes: int | None, include: str | None) -> Failure | None:
    command = find_script(command)
    cards = choose_cards(include, os.environ)
    processes = count_processes(processes, cards)
    if include is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cpus() // processes)))
    first = place.node * processes
    print(
        f"node {place.node} of {len(place.hosts)} ({place.host}): {launcher}, ranks {first} to {first + processes - 1} "
        f"of {len(place.hosts) * processes}, cards {','.join(cards) or 'none'}, meeting at {place.head}:{place.port}",
        flush=True,
    )
    if launcher == "deepspeed":
        return _run_deepspeed(place, processes, cards, command)
    return _run_torchrun(place, processes, command)


def _run_torchrun(place: Place, processes: int, command: list[str]) -> Failure | None:
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # many lines about what is told in one
    options = {
        "--nnodes": len(place.hosts),
        "--node-rank": place.node,
        "--nproc-per-node": processes,
        "--master-addr": place.head,
        "--master-port": place.port,
        "--signals-to-handle": "SIGINT,SIGHUP,SIGQUIT",
        # A rank that loses a fellow soon fails too: looked at seldom, it would pass for the first.
        "--monitor-interval": 0.05,
    }
    try:
        run.run(run.parse_args([*(str(word) for option in options.items() for word in option), *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        who = f"rank {rank} (local rank {failure.local_rank} on {place.host})"
        return Failure(_exit_code(failure.exitcode), failure.timestamp, who)
    except SignalException as stop:
        return Failure(128 + stop.sigval, time.time(), "the launcher")
    return None


def _run_deepspeed(place: Place, processes: int, cards: list[str], command: list[str]) -> Failure | None:
    if not _count_cards():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher import launch as per_node

    # Its own answer to SIGTERM gives each rank 30 s, one after the other, and kills it then, whatever it is saving.
    per_node.signal = types.SimpleNamespace(
        signal=lambda number, handler: signal.signal(number, handler) if number == signal.SIGINT else None,
        SIGINT=signal.SIGINT,
        SIGTERM=signal.SIGTERM,
    )
    numbers = [str(number) for number in range(processes)]
    slots = dict.fromkeys(place.hosts, numbers)
    # It sets CUDA_VISIBLE_DEVICES from this node's own; of the other nodes only the count matters.
    slots[place.host] = cards[:processes] if len(cards) >= processes else numbers
    sys.argv = [
        "deepspeed",
        f"--world_info={base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()}",
        f"--node_rank={place.node}",
        f"--master_addr={place.head}",
        f"--master_port={place.port}",
        "--no_local_rank",  # LOCAL_RANK is in the environment, and pope_eval.py knows no such flag
        "--log_level=critical",
        *command,
    ]
    try:
        per_node.main()
    except SystemExit as end:
        if end.code:
            return Failure(_exit_code(end.code), time.time(), f"a process on {place.host}")
    return None


def _count_cards() -> int:
    import torch

    return torch.cuda.device_count()


def _cpus() -> int:
    """CPUs for this node's processes."""
    return min(len(os.sched_getaffinity(0)), int(os.environ.get("SLURM_CPUS_PER_TASK", "1000000")))


def _exit_code(returncode: int) -> int:
    """A shell's number for how a process ended."""
    return 128 - returncode if returncode < 0 else returncode


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _wait_for_outcomes(prefix: str, nodes: int) -> None:
    until = time.monotonic() + OTHERS_SECONDS
    while time.monotonic() < until and not all(Path(f"{prefix}{node}").read_text() for node in range(nodes)):
        time.sleep(0.2)


@command_line
def main() -> int:
    """The command line; gives the exit code."""
    args, command = parse_args(sys.argv[1:])
    return launch(command, launcher=args.launcher, processes=args.processes, include=args.include, outcome=args.outcome)


if __name__ == "__main__":
    sys.exit(main())
