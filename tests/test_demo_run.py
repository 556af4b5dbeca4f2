"""The demo's journey: steps are gone once, killed ones again, and damaged weights stop it at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.journey import Journey
from llava.errors import UserError
from llava.files import sha256

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "demo/weights"


@pytest.fixture
def code(tmp_path):
    """A repository of one script, which counts how often it ran."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "step.py").write_text(
        "import pathlib, sys, time\n"
        "with pathlib.Path(sys.argv[1]).open('a') as f: f.write('ran\\n')\n"
        "time.sleep(float(sys.argv[2]))\n"
        "sys.exit(int(sys.argv[3]))\n"
    )
    return root


def go(code: Path, out: Path, second: str = "0 0", settings: str = "seed 0") -> Journey:
    with Journey(out, code, settings) as journey:
        journey.make("a folder", out / "made", lambda to: (to / "file").write_text("x"))
        journey.run("first", f"python step.py {out}/first 0 0")
        journey.run("second", f"python step.py {out}/second {second}")
        journey.finish()
    return journey


def test_a_failed_step_is_said_with_its_last_lines_and_gone_again(code, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"'second' ended with exit code 3; all it said is in .*03 second\.log"):
        go(code, out, "0 3")
    assert "step.py" in capsys.readouterr().out
    (code / "zero_configs").mkdir()  # nothing that a result depends on
    go(code, out)
    assert "going on after: a folder, first" in capsys.readouterr().out
    assert (out / "first").read_text() == "ran\n"
    assert (out / "second").read_text() == "ran\nran\n"
    assert list(json.loads((out / "progress.json").read_text())["seconds"]) == ["a folder", "first", "second"]


def test_a_finished_run_is_set_aside(code, tmp_path):
    out = tmp_path / "out"
    go(code, out)
    go(code, out)
    assert (out / "second").read_text() == (tmp_path / "out.previous/second").read_text() == "ran\n"


def test_a_folder_of_the_users_is_left_alone(code, tmp_path):
    for name in ("mine", "other.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("x")
    for name in ("mine", "other"):
        with pytest.raises(UserError, match="holds files of something else; choose another folder"):
            go(code, tmp_path / name)
    with pytest.raises(UserError, match="holds the program itself"):
        go(code, code.parent)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        go(code, tmp_path / "file")
    assert [(tmp_path / name / "thesis.txt").read_text() for name in ("mine", "other.previous")] == ["x", "x"]


def test_a_stale_lock_ends_nobody(code, tmp_path):
    """The group that an earlier run noted may be another program's by now."""
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (tmp_path / ".out.lock").write_text(f"999999999 {bystander.pid}")
    go(code, tmp_path / "out")
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_what_a_dead_launcher_left_running_is_ended(code, tmp_path):
    (code / "launcher.py").write_text(
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
        "sys.exit(3)\n"
    )
    with pytest.raises(UserError), Journey(tmp_path / "out", code, "") as journey:
        journey.run("launch", f"python launcher.py {tmp_path}/child")
    child = (tmp_path / "child").read_text()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_is_one_line(code, tmp_path):
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nfrom pathlib import Path\n"
        f"from test_demo_run import go\ngo(Path({str(code)!r}), Path({str(tmp_path / 'out')!r}), '60 0')"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/second").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.strip() == "interrupted; the same command goes on from here"


@pytest.mark.parametrize("change", ["code", "settings"])
def test_what_another_code_or_seed_made_is_not_used(code, tmp_path, change):
    out = tmp_path / "out"
    with pytest.raises(UserError):
        go(code, out, "0 3")
    if change == "code":
        (code / "step.py").write_text((code / "step.py").read_text() + "# changed\n")
    go(code, out, settings="seed 1" if change == "settings" else "seed 0")
    assert (out / "first").read_text() == "ran\n"
    assert (tmp_path / "out.previous/first").is_file()


def test_killed_and_started_again(code, tmp_path):
    """SIGKILL leaves the running command behind: the next run ends it, a run beside a living one is refused."""
    out = tmp_path / "out"
    script = (
        "import sys; sys.path[:0] = [{root!r}, {tests!r}]\nfrom pathlib import Path\n"
        "from test_demo_run import go\ngo(Path({code!r}), Path({out!r}), '60 0')"
    ).format(root=str(ROOT), tests=str(ROOT / "tests"), code=str(code), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "second").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    with pytest.raises(UserError, match="another run of the demo writes there"):
        go(code, out)
    group = int((tmp_path / ".out.lock").read_text().split()[1])
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(group, 0)  # the command lives on
    go(code, out)
    assert (out / "first").read_text() == "ran\n"
    assert (out / "second").read_text() == "ran\nran\n"
    deadline = time.monotonic() + 10
    while Path(f"/proc/{group}").exists() and "Z" not in Path(f"/proc/{group}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("there", ["nothing", "an unfinished one"])
def test_parts_of_no_finished_demo_are_one_line(tmp_path, there):
    if there != "nothing":
        (tmp_path / "progress.json").write_text('{"key": "", "finished": false, "seconds": {}}')
    before = list(tmp_path.iterdir())
    command = [sys.executable, "-m", "demo.parts", "--demo", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == f"error: --demo {tmp_path}: holds no finished demo; run 'make demo' first (or python -m demo.run)"
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("finished", [False, True])
def test_make_runs_the_demo_once_for_its_parts(tmp_path, finished):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for file in ("requirements.txt", *(["demo/out/report.html"] if finished else []), ".venv/.installed"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    would = subprocess.run(["make", "-n", "demo-parts"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.findall(r"-m (demo\.\w+)", would.stdout) == (["demo.parts"] if finished else ["demo.run", "demo.parts"])


def test_weights_are_small_and_what_their_sums_say():
    lines = (WEIGHTS / "SHA256SUMS").read_text().splitlines()
    named = {line.split()[1]: line.split()[0] for line in lines}
    files = {str(file.relative_to(WEIGHTS)): file for file in WEIGHTS.glob("*/*")}
    assert set(named) == set(files)
    assert all(sha256(file) == named[name] for name, file in files.items())
    assert sum(file.stat().st_size for file in files.values()) <= 8_000_000


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_damaged_weights_are_one_line(tmp_path, damage):
    for folder in ("demo", "llava"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("out*", "__pycache__"))
    file = tmp_path / "demo/weights/llm/model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "changed" else b""))
    done = subprocess.run(
        [sys.executable, "-m", "demo.run"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: \S+llm/model\.safetensors: SHA-256 [0-9a-f]{12}\.\.\. expected, found ", line)
    assert "git checkout -- demo/weights" in line
    assert not (tmp_path / "demo/out").exists()
