"""Command lines whose mistakes are one line, and whose libraries are quiet."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import warnings
from typing import NoReturn

from llava.errors import UserError


class OneLineErrors:
    """Mixin of an ``ArgumentParser``: one line and exit code 2 instead of pages of usage."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f"{message}; --help lists the flags")


class OneLineParser(OneLineErrors, argparse.ArgumentParser):
    """The parser of the evaluation scripts."""

    def parse(self) -> argparse.Namespace:
        """The command line; unknown flags are refused with the nearest known one.

        Dashes and underscores are the same in a flag's name, as in the training scripts.
        """
        known = {option.replace("_", "-"): option for action in self._actions for option in action.option_strings}
        given = [arg.split("=", 1) for arg in sys.argv[1:]]
        args, rest = self.parse_known_args(
            ["=".join([known.get(name.replace("_", "-"), name), *value]) for name, *value in given]
        )
        refuse_unknown(self, rest)
        return args


def refuse_unknown(parser: argparse.ArgumentParser, rest: list[str]) -> None:
    """Raise ``UserError`` for arguments that the parser did not take."""
    if not rest:
        return
    known = [option for action in parser._actions for option in action.option_strings]
    name = rest[0].split("=")[0]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
    raise UserError(f"unknown flag {name}{hint}" if name.startswith("-") else f"unexpected argument '{name}'{hint}")


def refuse_copies() -> None:
    """Raise ``UserError`` where ``srun`` has started several copies of a script that know nothing of each other."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks != "1":
        raise UserError(
            f"srun has started {tasks} copies of this script, and each would do the whole work; start it with "
            "slurm/submit.py, or as one task a node with torchrun"
        )


def quiet() -> None:
    """Messages of libraries that say nothing a user could act on. It imports torch and transformers."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # "Loading weights": a line per file and rank in a queued job's log
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A hub kernel that nobody asked for and is not installed; a cast for every product of 8 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers fork after the tokenizer was used
    warnings.filterwarnings("ignore", category=FutureWarning)
