"""Imports go one way, and scoring needs no torch."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A room may import from itself and from the rooms listed. The data and the model rooms meet only in the batch.
BASE = {
    "constants",
    "errors",
    "interruption",
    "status",
    "files",
    "conversation",
    "tokenization",
    "mm_utils",
    "run_card",
    "distributed",
    "command_line",
    "utils",
}
MAY_IMPORT = {
    "data": BASE,
    "model": BASE,
    "train": BASE | {"data", "model"},
    "eval": BASE | {"data", "model"},
    "chat": BASE | {"data", "model", "eval"},
    "serve": {"chat"},
}


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        rooms |= {name.split(".")[1] for name in names if name.startswith("llava.")}
    return rooms


def test_imports_go_one_way():
    for file in (ROOT / "llava").rglob("*.py"):
        if file == ROOT / "llava" / "__init__.py":
            continue  # upstream's ``from llava import LlavaLlamaForCausalLM``, made when it is asked for
        if file == ROOT / "llava" / "data" / "check.py":
            continue  # a command, which nothing imports: the data as a training of a model sees them
        room = file.relative_to(ROOT / "llava").parts[0].removesuffix(".py")
        allowed = MAY_IMPORT.get(room, BASE) | {room}
        assert imported_rooms(file) <= allowed, file


def test_nothing_imports_an_entry_script():
    scripts = {file.stem for file in ROOT.glob("*.py")}
    for file in (ROOT / "llava").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not scripts & {name.split(".")[0] for name in names}, file


def test_pickles_are_read_only_as_tensors():
    for file in [*ROOT.glob("*.py"), *(ROOT / "llava").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), file
