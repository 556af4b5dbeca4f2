"""The command that makes a run again, from the card that it left (``run.json``, ``run_*.json``)."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from llava.errors import UserError, note, warn
from llava.eval.evaluated import AGAIN, POPE, answer_cards, card_of
from llava.files import field, sha256
from llava.run_card import FILE as RUN_CARD
from llava.run_card import git_state, versions

ROOT = Path(__file__).resolve().parent.parent.parent


def rerun(folder: Path) -> str:
    """The shell command that repeats the run in ``folder``; of a folder of several POPE runs one line for each.

    A training's own card goes before those of its answers. Where the output folder is still there, the command writes
    to another one beside it: the scripts go on in a folder that they know, and would find the work done. Notes on
    stderr say what is no longer as it was: the code, the data files, the packages.

    Raises:
        UserError: no card in the folder, or one without a command.
    """
    folder = Path(folder).expanduser()
    cards = _cards(folder)
    if not cards:
        raise UserError(f"{folder}: no {RUN_CARD} and no run_*.json of pope_eval.py in it; expected a run's folder")
    for name, card in cards:
        _tell_code(name, card)
        _tell_data(name, card)
        _tell_versions(name, card)
    return "\n".join(_command(file, card) for file, card in cards)


def _cards(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    training = card_of(folder / RUN_CARD)
    if training is not None:
        return [(folder / RUN_CARD, training)]
    return answer_cards(folder) or answer_cards(folder / POPE)


def _command(file: Path, card: dict[str, Any]) -> str:
    """One line: change to the folder of the run, set its variables, start its script as it was started."""
    directory = Path(field(str(file), card, "working_directory", str))
    if not directory.is_dir():
        warn(f"{file}: its working directory {directory} is not there; relative paths mean those below it")
    python, script, arguments = _split_command(file, field(str(file), card, "command", str))
    if not (directory / script).is_file() and (ROOT / Path(script).name).is_file():
        script = str(ROOT / Path(script).name)
    arguments = _other_folder(file, card, directory, arguments)
    launch = _launch(card, arguments)
    variables = _variables(card)
    nodes, here, launcher = launch["nodes"], launch["processes_per_node"], launch["launcher"]
    on_cards = bool((card.get("hardware") or {}).get("gpus"))
    if nodes > 1:
        variables.pop("CUDA_VISIBLE_DEVICES", None)  # Slurm gives the job its own cards
        start = [python, str(ROOT / "slurm" / "submit.py"), "--nodes", str(nodes)]
        start += ["--gpus", str(here)] if on_cards else ["--gpus", "0", "--processes", str(here)]
        start += ["--launcher", launcher] if launcher == "deepspeed" else []
        start += ["--"]
    elif launcher == "deepspeed":
        # This launcher does not look at the variable beside flags that choose cards, and sets it where there are none.
        cards = variables.pop("CUDA_VISIBLE_DEVICES", "").split(",")
        named = on_cards and len(cards) == here and all(number.isdigit() for number in cards)
        chosen = ["--include", f"localhost:{','.join(cards)}"] if named else ["--num_gpus", str(here)]
        start = [_beside(python, "deepspeed"), *chosen]
    elif launcher == "torchrun":
        start = [_beside(python, "torchrun"), "--standalone", "--nproc_per_node", str(here)]
    else:
        start = [python]
    settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join(["cd", shlex.quote(str(directory)), "&&", *settings, shlex.join([*start, script, *arguments])])


def _split_command(file: Path, command: str) -> tuple[str, str, list[str]]:
    """Interpreter, script and the user's arguments; what a launcher has put between them is left out."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"{file}: key 'command' is no shell command ({error}): {command[:80]!r}") from None
    at = next((index for index, word in enumerate(words) if index and word.endswith(".py")), None)
    if at is None:
        raise UserError(f"{file}: key 'command' names no script: {command[:80]!r}; expected python SCRIPT.py ARGS")
    arguments: list[str] = []
    rest = iter(words[at + 1 :])
    for word in rest:
        name, equals, _ = word.partition("=")
        if name.replace("-", "_") != "__local_rank":
            arguments.append(word)
        elif not equals:
            next(rest, None)
    python = words[0] if Path(words[0]).is_absolute() and Path(words[0]).is_file() else "python"
    return python, words[at], arguments


def _beside(python: str, tool: str) -> str:
    """A launcher of the environment that the interpreter is of."""
    own = Path(python).parent / tool
    return str(own) if Path(python).is_absolute() and own.is_file() else tool


def _other_folder(file: Path, card: dict[str, Any], directory: Path, arguments: list[str]) -> list[str]:
    """The arguments with an output folder that does not exist yet."""
    given = str(card["arguments"].get("output_dir") or file.parent.absolute())
    fresh, number = given, 1
    while (directory / Path(fresh).expanduser()).exists():
        fresh = f"{given.rstrip('/')}{AGAIN}{number if number > 1 else ''}"
        number += 1
    kept: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or name.replace("-", "_") != "__output_dir":
            kept.append(word)
        elif not equals:
            next(rest, None)
    if fresh != given:
        note(f"{given} is there; the run is made again in {fresh}")
    return [*kept, "--output_dir", fresh]


def _launch(card: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """``launch`` of the card; of one without it, what the command and the number of processes tell."""
    launch = card.get("launch")
    if isinstance(launch, dict) and launch.keys() >= {"launcher", "nodes", "processes_per_node"}:
        return launch
    processes = int((card.get("hardware") or {}).get("world_size", 1))
    by_deepspeed = "--local_rank" in card["command"]
    launcher = "python" if processes == 1 else "deepspeed" if by_deepspeed else "torchrun"
    if processes > 1:
        note(f"the card does not say on how many nodes its {processes} processes were; one is taken")
    return {"launcher": launcher, "nodes": 1, "processes_per_node": processes}


def _variables(card: dict[str, Any]) -> dict[str, str]:
    """What to set before the command. On the CPU the number of threads decides how sums are rounded."""
    variables = dict(card.get("environment") or {})
    hardware = card.get("hardware") or {}
    if not hardware.get("gpus") and hardware.get("threads"):
        variables.setdefault("OMP_NUM_THREADS", str(hardware["threads"]))
    return variables


def _tell_code(file: Path, card: dict[str, Any]) -> None:
    then, now = card.get("git"), git_state()
    if not then:
        note(f"{file}: does not say which code ran (it was no git checkout)")
        return
    if now is None or then["commit"] != now["commit"]:
        here = f"this is {now['commit'][:12]}" if now else "this is no git checkout"
        note(f"{file}: its code was commit {then['commit'][:12]}, {here}; git checkout {then['commit'][:12]}")
    if then["diff"] and then["diff"] != (now or {}).get("diff"):
        note(f"{file}: its code had uncommitted changes; they are under git.diff in it (git apply)")
    elif now and now["diff"] and not then["diff"]:
        note(f"{file}: its code had no uncommitted changes, this checkout has")


def _tell_data(file: Path, card: dict[str, Any]) -> None:
    directory = Path(str(card.get("working_directory", ".")))
    for name, recorded in (card.get("data") or {}).items():
        path = directory / Path(name).expanduser()
        if not path.is_file():
            warn(f"{file}: its data file {name} is not there")
        elif sha256(path) != field(f"{file}: {name}", recorded, "sha256", str):
            warn(f"{file}: its data file {name} has changed since: the numbers will be others")


def _tell_versions(file: Path, card: dict[str, Any]) -> None:
    then, now = card.get("versions") or {}, versions()
    unlike = [f"{name} {then[name]} (here {now.get(name, 'none')})" for name in then if then[name] != now.get(name)]
    if unlike:
        note(f"{file}: made with {', '.join(unlike)}")
