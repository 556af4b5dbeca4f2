"""Command lines whose mistakes are one line."""

from __future__ import annotations

import argparse
import difflib
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
        """The command line; unknown flags are refused with the nearest known one."""
        args, rest = self.parse_known_args()
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
