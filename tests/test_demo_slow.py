"""The demo from beginning to end, twice: once in one go, once killed in the middle of two trainings."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.files import read_json

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["Model", "Set", "HA-DPO", "Accuracy", "Precision", "Recall", "F1 Score", "Yes Ratio (%)"]

pytestmark = pytest.mark.slow


def demo(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "demo.run", "--output_dir", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    return said


def table_of(said: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("|") and "---" not in line]


def test_it_hallucinates_less_and_says_the_same_after_a_kill(tmp_path):
    whole = finished(demo(tmp_path / "whole"))
    header, *rows = table_of(whole)
    assert header == COLUMNS
    assert [row[1:3] for row in rows] == [
        [name, mark] for mark in "✗✓" for name in ("random", "popular", "adversarial")
    ]
    accuracy = {(row[1], row[2]): float(row[3]) for row in rows}
    assert accuracy["random", "✗"] >= 80
    assert accuracy["adversarial", "✓"] >= accuracy["adversarial", "✗"] + 3
    page = (tmp_path / "whole/report.html").read_text(encoding="utf-8")
    assert all(cell in page for row in rows for cell in row) and page.count("data:image/jpeg") == 12

    out = tmp_path / "killed twice"
    for training, end, code in (("llava", signal.SIGKILL, -9), ("llava-ha-dpo", signal.SIGTERM, 130)):
        process = demo(out)
        deadline = time.monotonic() + 1200
        while not any((out / training).glob("checkpoint-*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        process.send_signal(end)
        assert process.wait() == code
    said = finished(demo(out))
    assert "going on after: the world: pictures, captions, questions, connector training, instruction tuning" in said
    for training in ("llava", "llava-ha-dpo"):
        assert len(read_json(out / training / "run.json")["earlier"]) == 1  # from its checkpoint
    assert table_of(said) == [header, *rows]
    running = subprocess.run(["pgrep", "-af", "train_(dpo|pretrain).py"], capture_output=True, text=True, check=False)
    assert out.name not in running.stdout
