"""Every module and script of the repository can be imported."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def modules() -> list[str]:
    files = [*ROOT.glob("*.py")]
    for folder in ("llava", "slurm", "demo", "benchmarks"):
        files += (ROOT / folder).rglob("*.py")
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))


@pytest.mark.parametrize("name", modules())
def test_it_can_be_imported(name: str) -> None:
    """A script that only a long run starts (the demo's, the benchmarks') must not fail there on a name that moved."""
    importlib.import_module(name)
