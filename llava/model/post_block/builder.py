"""``--post_block NAME --post_block_config k=v,...``: which block, and its options.

A new variant is a file beside this one and a row in ``POST_BLOCKS``.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml

from llava.errors import UserError
from llava.files import existing
from llava.model.post_block.base import PostBlock
from llava.model.post_block.interaction import InteractionBlock
from llava.model.post_block.mlp import MLPBlock

POST_BLOCKS: dict[str, type[PostBlock]] = {
    "interaction": InteractionBlock,
    "mlp": MLPBlock,
}


def build_post_block(config: Any) -> PostBlock | None:
    """The block that ``config.post_block`` describes ({"name": ..., option: value}), or None.

    Raises:
        UserError: an unknown name or option.
    """
    settings = getattr(config, "post_block", None)
    if not settings:
        return None
    name, given = settings.get("name"), {key: value for key, value in settings.items() if key != "name"}
    kind = _kind(name, "config.json: post_block")
    return kind(_options(kind, given, f"post_block '{name}'"), config)


def block_settings(name: str, options: str | None) -> dict[str, Any]:
    """Flags -> what ``config.post_block`` holds: the name and every option, those that were not given too.

    ``options`` is ``k=v,k=v`` or the path of a YAML or JSON file.

    Raises:
        UserError: an unknown name or option, or a value that does not fit.
    """
    kind = _kind(name, "--post_block")
    given: dict[str, Any] = {}
    if options and "=" in options:
        for piece in options.split(","):
            key, equals, value = piece.partition("=")
            if not equals:
                raise UserError(f"--post_block_config {options}: '{piece}' is no k=v")
            given[key.strip()] = yaml.safe_load(value)
    elif options:
        file = existing(options, "--post_block_config")
        given = _read(file)
    return {"name": name, **dataclasses.asdict(_options(kind, given, f"--post_block_config of '{name}'"))}


def fresh_block(config: Any, seed: int) -> dict[str, torch.Tensor]:
    """A new block's weights: the same on every rank and in every run of a seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = build_post_block(config)
    return {f"post_block.{key}": value for key, value in block.state_dict().items()}


def _kind(name: str | None, flag: str) -> type[PostBlock]:
    if name not in POST_BLOCKS:
        raise UserError(f"{flag} {name}: expected one of {', '.join(POST_BLOCKS)}")
    return POST_BLOCKS[name]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: neither YAML nor JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected options with their values, found {type(content).__name__}")
    return content


def _options(kind: type[PostBlock], given: dict[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind.Options)}
    types_of = get_type_hints(kind.Options)
    values = {}
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{where}: no option '{key}'; expected {', '.join(fields)}{hint}")
        wanted = types_of[key]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not wanted:
            raise UserError(f"{where}: {key}={value}: expected {_wanted(fields[key], wanted)}")
        limits = fields[key].metadata
        outside = value not in limits.get("choices", (value,))
        outside = outside or ("least" in limits and value < limits["least"])
        if outside or ("above" in limits and value <= limits["above"]):
            raise UserError(f"{where}: {key}={value}: expected {_wanted(fields[key], wanted)}")
        values[key] = value
    return kind.Options(**values)


def _wanted(field: dataclasses.Field, kind: type) -> str:
    limits = field.metadata
    if "choices" in limits:
        return " or ".join(limits["choices"])
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    if "least" in limits:
        return f"{words}, {limits['least']} or more"
    return f"{words} above {limits['above']}" if "above" in limits else words
