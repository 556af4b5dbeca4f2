"""What is to run: one command or an array of them, checked before they wait in a queue for a day."""

from __future__ import annotations

import difflib
import re
import shlex
import subprocess
import sys
from pathlib import Path

from llava.errors import UserError
from llava.files import existing
from slurm.launch import ROOT, find_script


def commands(command: list[str], array: Path | None) -> list[list[str]]:
    """The command, or one for every line of ``array``, whose arguments are added.

    Raises:
        UserError: a script or a flag that does not exist, a training without ``--output_dir``, two runs with the same.
    """
    script = Path(find_script(command)[0]).resolve()
    extras = [[]] if array is None else _lines(existing(array, "--array"))
    runs = [[*command, *extra] for extra in extras]
    if script.parent == ROOT:
        _check_flags(script, {flag for run in runs for word in run if (flag := flag_name(word))})
    folders: dict[Path, int] = {}
    for number, run in enumerate(runs, 1):
        folder = output_dir(run)
        if folder is None:
            if script.parent == ROOT and script.name.startswith("train_"):
                raise UserError(f"{command[0]}: --output_dir is missing: where the run saves and goes on from")
        elif folders.setdefault(folder, number) != number:
            raise UserError(f"{array}: runs {folders[folder]} and {number} have the same --output_dir {folder}")
    return runs


def output_dir(run: list[str]) -> Path | None:
    """The folder of a command's ``--output_dir``, if it has one."""
    value = _value(run, "--output_dir")
    return Path(value).expanduser().resolve() if value else None


def heartbeat_root(run: list[str]) -> Path | None:
    """A folder in which, or just below which, the run's ``status.json`` will be; None: not known."""
    # Without --output_dir pope_eval.py writes into the checkpoint that it asks: of several (A,B) into the last.
    model = (_value(run, "--model_path") or "").split(",")[-1].strip()
    return output_dir(run) or (Path(model).expanduser().absolute() if model else None)


def _value(run: list[str], flag: str) -> str | None:
    """What a command gives for a flag; the last, where it is given twice."""
    found = None
    for index, word in enumerate(run):
        if flag_name(word) == flag:
            found = next(iter(word.split("=", 1)[1:] or run[index + 1 : index + 2]), None)
    return found


def flag_name(word: str) -> str | None:
    """``--flag`` of ``--flag`` or ``--flag=value``, dashes and underscores being the same in it; else None."""
    return "--" + word[2:].split("=", 1)[0].replace("-", "_") if word.startswith("--") else None


def _lines(file: Path) -> list[list[str]]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{file}: line {number}: {error}; quote as in a shell") from None
        found += [words] if words else []
    if not found:
        raise UserError(f"{file}: no runs; expected a line of arguments for each")
    return found


def _check_flags(script: Path, given: set[str]) -> None:
    # By the script's own help: some seconds of imports, while no card waits.
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{script.name} --help fails here, and so would the job: {said}")
    known = {flag_name(flag): flag for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", done.stdout)}
    for flag in sorted(given - known.keys()):
        near = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {known[near[0]]}?" if near else f"python {script.name} --help lists the flags"
        raise UserError(f"{script.name}: unknown flag {flag}; {hint}")
