"""slurm/submit.py and what it is made of, with Slurm's commands and nvidia-smi played by small scripts on PATH."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llava.errors import UserError
from slurm import foreground, gpus, runs, submit, table, watch

ROOT = Path(__file__).resolve().parent.parent
SUBMIT = ROOT / "slurm" / "submit.py"
POPE = ["pope_eval.py", "--coco_path", "c", "--pope_path", "p", "--model-path", "m"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """``programs(name, text)``: a bash script of that name, the first on PATH. Nothing else of Slurm is to be found."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for tool in ("bash", "env", "cat", "dirname", "head", "sed", "printenv"):
        (folder / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, text: str) -> Path:
        (folder / name).write_text(f"#!{folder}/bash\n{text}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return put


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``call(*words) -> (exit code, stdout, stderr)`` of submit.py, in this process and in an empty folder."""
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)
    settings = tmp_path / "env.sh"
    settings.write_text("")
    monkeypatch.setattr(submit, "SETTINGS", settings)
    monkeypatch.setattr(submit.flags, "LOGS", tmp_path / "logs")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = {number: signal.getsignal(number) for number in (*foreground.STOPPING, signal.SIGINT)}
    environment = dict(os.environ)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["submit.py", *map(str, words)])
        capsys.readouterr()
        try:
            code = submit.main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


# --- what is submitted


def test_dry_run_needs_no_slurm(call, programs, tmp_path):
    options = ["--nodes", 2, "--gpus", "a100:4", "--hours", 1.5, "--partition", "p", "--mem-gb", 9, "--name", "n"]
    code, out, _ = call(*options, "--sbatch", "exclusive", "--sbatch", "mail-type=END", "--dry-run", "--", *POPE)
    assert code == 0
    assert re.findall(r"^#SBATCH (.*)", out, re.MULTILINE) == [
        "--cpus-per-task=8",
        "--exclusive",
        "--gpus-per-node=a100:4",
        "--job-name=n",
        "--mail-type=END",
        "--mem=9G",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--open-mode=append",
        f"--output={tmp_path}/logs/n-%j.log",
        "--partition=p",
        "--requeue",
        "--signal=B:USR2@180",
        "--time=90",
    ]
    lines = out.splitlines()
    assert lines.index("trap '' USR1 USR2") < next(i for i, line in enumerate(lines) if line.startswith("exec "))
    assert lines[-1] == "# runs: pope_eval.py --coco_path c --pope_path p --model-path m"
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("options", "asked"),
    [([], "--gpus-per-node=1"), (["--sbatch", "gres=gpu:2"], "--gres=gpu:2"), (["--gpus", 0], "--gpus-per-node=0")],
)
def test_a_run_that_names_no_cards_gets_one(call, options, asked):
    _, out, _ = call(*options, "--dry-run", "--", *POPE)
    assert [line for line in out.split() if "gpu" in line] == [asked]


def test_no_time_left_but_for_saving(call):
    code, _, err = call("--hours", 0.05, "--dry-run", "--", *POPE)
    assert code == 2 and "--hours 0.05: the run is told to save 180 s before the end" in err


def test_settings_fill_in_and_flags_win(call, tmp_path, monkeypatch):
    submit.SETTINGS.write_text(
        "NODES=3 CPUS_PER_TASK=5 SIGNAL_LEAD=60 MAX_REQUEUES=0\n"
        "export SBATCH_PARTITION=big SBATCH_TIMELIMIT=9:00:00 SBATCH_SIGNAL=B:USR2@60 SBATCH_GPUS_PER_NODE=8\n"
    )
    _, out, _ = call("--dry-run", "--", *POPE)
    assert {"--nodes=3", "--cpus-per-task=5", "--signal=B:USR2@60", "--no-requeue"} <= set(out.split())
    # What stays in the environment is sbatch's to read, and the script must not say otherwise.
    assert re.findall(r"# set: SBATCH_(\w+)=(\S+)", out) == [
        ("GPUS_PER_NODE", "8"),
        ("PARTITION", "big"),
        ("TIMELIMIT", "9:00:00"),
    ]
    assert not re.search(r"#SBATCH --(time|partition|gpus)", out)
    _, out, _ = call(
        "--hours", 1, "--sbatch", "gres=gpu:2", "--nodes", 1, "--max-requeues", 2, "--dry-run", "--", *POPE
    )
    assert {"--nodes=1", "--time=60", "--gres=gpu:2", "--requeue"} <= set(out.split())
    assert re.findall(r"# set: SBATCH_(\w+)", out) == ["PARTITION"]  # gres would be refused beside gpus-per-node
    submit.SETTINGS.write_text("NODES=two\n")
    assert call("--dry-run", "--", *POPE)[2] == "error: slurm/env.sh: NODES=two: expected a whole number, 1 or more\n"


def test_the_settings_file_that_comes_with_it_is_read(call, monkeypatch):
    monkeypatch.setattr(submit, "SETTINGS", ROOT / "slurm" / "env.sh")
    assert "MODEL_PATH" in submit.settings()


def test_array(call, tmp_path):
    file = tmp_path / "runs.txt"
    file.write_text("# learning rates\n--lr 1 --output_dir a\n\n--lr 2 --output_dir='b c'  # blank in it\n")
    (tmp_path / "here" / "mine.py").touch()
    _, out, _ = call("--array", file, "--parallel", 1, "--dry-run", "--", "mine.py", "--output_dir", "unused")
    assert "#SBATCH --array=0-1%1\n" in out
    assert f"--output={tmp_path}/logs/mine-%A_%a.log" in out
    assert out.splitlines()[-2:] == [
        "# runs: mine.py --output_dir unused --lr 1 --output_dir a",
        "# runs: mine.py --output_dir unused --lr 2 '--output_dir=b c'",
    ]
    file.write_text("--lr 1\n--lr 2\n")
    code, _, err = call("--array", file, "--dry-run", "--", "mine.py", "--output-dir", "a")
    assert code == 2
    assert err == f"error: {file}: runs 1 and 2 have the same --output_dir {tmp_path}/here/a\n"
    file.write_text("--a 'b\n")
    assert f"{file}: line 1: No closing quotation" in call("--array", file, "--dry-run", "--", "mine.py")[2]
    file.write_text("# nothing\n")
    assert "no runs" in call("--array", file, "--dry-run", "--", "mine.py")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no script; expected: [options] -- SCRIPT ARGS"),
        (("--", "trian_dpo.py"), "trian_dpo.py: no such script"),
        (("--node", "2", "--", "x.py"), "unknown flag --node; did you mean --nodes?"),
        (("--nodes", "0", "--", "x.py"), "argument --nodes: 0: expected a whole number"),
        (("--hours", "soon", "--", "x.py"), "argument --hours: soon: expected hours"),
        (("--gpus", "many", "--", "x.py"), "argument --gpus: many: expected a number"),
        (("--include", "0,4", "--gpus", "4", "--", "x.py"), "--include 0,4: no card 4"),
        (("--include", "first", "--", "x.py"), "--include first: expected numbers of cards"),
        (("--include", "0", "--wait-gpus", "1", "--local", "--", "x.py"), "both choose cards"),
        (("--wait-gpus", "2", "--", "x.py"), "--wait-gpus is for --local"),
        (("--local", "--min-free", "22G", "--", "x.py"), "--min-free needs --wait-gpus"),
        (("--local", "--wait-gpus", "1", "--min-free", "22", "--", "x.py"), "--min-free: 22: expected gibibytes"),
        (("--local", "--watch", "--", "x.py"), "--watch has no meaning with --local"),
        (("--local", "--nodes", "2", "--", "x.py"), "--nodes has no meaning with --local"),
        (("--parallel", "2", "--", "x.py"), "--parallel needs --array"),
        (("--name", "a/b", "--", "x.py"), "--name a/b: it is a file's name too"),
        (("--sbatch", "signal=USR1@9", "--", "x.py"), "that is what --signal-before of submit.py sets"),
        (("--sbatch", "partition=p", "--", "x.py"), "submit.py has --partition for that"),
        (("--status", "--watch"), "--watch has no meaning with --status"),
        (("--status", "--", "x.py"), "--status starts nothing"),
        (("--status", "nowhere"), "--status nowhere: no such folder"),
        (("--", *POPE, "--st", "all"), "pope_eval.py: unknown flag --st; did you mean --set?"),
    ],
)
def test_refused(call, tmp_path, words, message):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "logs").exists()


def test_include_beside_the_variable_is_refused(call, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for where in (["--local"], []):
        code, _, err = call(*where, "--include", "0", "--", "x.py")
        assert code == 2
        assert "--include 0 and CUDA_VISIBLE_DEVICES=0,1 both choose cards" in err
    assert "both choose cards" in call("--local", "--wait-gpus", 1, "--", "x.py")[2]


def test_trainings_are_checked_before_they_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train_this.py"
    script.write_text("print('--output_dir OUTPUT_DIR, --output-dir OUTPUT_DIR  where; --learning_rate LEARNING_RATE')")
    known = ["train_this.py", "--output-dir", "x", "--learning-rate=2e-6"]
    assert runs.commands(known, None) == [known]
    with pytest.raises(UserError, match=r"train_this.py: unknown flag --learning_rat; did you mean --learning_rate\?"):
        runs.commands([*known, "--learning-rat", "1"], None)
    with pytest.raises(UserError, match="--output_dir is missing"):
        runs.commands(["train_this.py", "--learning_rate", "1"], None)
    script.write_text("raise SystemExit('error: no torch here')")
    with pytest.raises(UserError, match="fails here, and so would the job: error: no torch here"):
        runs.commands(known, None)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_dpo.py", "train_pretrain.py"])
def test_the_real_help_names_the_flags(script):
    """Seconds of imports each."""
    known = [script, "--output-dir", "x", "--lora_enable", "True", "--learning-rate=2e-6", "--deepspeed", "z.json"]
    assert runs.commands(known, None) == [known]
    with pytest.raises(UserError, match="unknown flag --learning_rat; did you mean --learning"):
        runs.commands([*known, "--learning-rat", "1"], None)


def test_no_slurm(call, programs):
    code, _, err = call("--", *POPE)
    assert code == 2
    assert "there is no Slurm on this machine" in err
    assert "--local" in err


def test_what_sbatch_refuses_leaves_nothing(call, programs, tmp_path):
    programs("srun", "")
    programs("sbatch", "echo 'sbatch: error: bad partition' >&2; echo 'sbatch: error: failed' >&2; exit 1")
    code, out, err = call("--", *POPE)
    assert (code, out) == (2, "")
    assert err == "error: sbatch refuses the job: bad partition; failed\n"
    assert [path.name for path in (tmp_path / "logs").rglob("*")] == ["jobs"]


def test_submitted_and_run(call, programs, tmp_path, monkeypatch):
    """What is submitted runs in another process and folder, and ends as the run does: not with submitit's 1."""
    programs("srun", "exit 1")
    programs("sbatch", f"cat $1 > {tmp_path}/script; printenv SBATCH_TIMELIMIT; echo Submitted batch job 77")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    (tmp_path / "here" / "mine.py").touch()
    command = [sys.executable, SUBMIT, "--hours", "2", "--logs", tmp_path / "logs", "--include", "0", "--name", "n"]
    done = subprocess.run([*command, "--", "mine.py", "--output_dir", "out"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"submitted job 77; log: {tmp_path}/logs/n-77.log\n"
    (row,) = [json.loads(line) for line in (tmp_path / "logs" / "jobs.jsonl").read_text().splitlines()]
    assert (row["job"], row["root"]) == ("77", f"{tmp_path}/here/out")
    programs("srun", f'echo "$@" > {tmp_path}/srun; exit 7')
    node = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(["bash", tmp_path / "script"], env=node, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    words = (tmp_path / "srun").read_text().split()
    assert "--nodes=2" in words
    assert words[words.index("--") - 2 :][:2] == ["--include", "0"]
    assert words[-3:] == [f"{tmp_path}/here/mine.py", "--output_dir", "out"]
    assert not list((tmp_path / "logs").rglob("*result.pkl"))


def test_array_is_submitted_once(call, programs, tmp_path):
    programs("srun", "")
    programs("sbatch", "echo Submitted batch job 5")
    (tmp_path / "runs.txt").write_text("--set random\n--set popular\n")
    code, out, err = call("--array", tmp_path / "runs.txt", "--", *POPE)
    assert (code, err) == (0, "")
    assert out == f"submitted job 5; log: {tmp_path}/logs/pope_eval-5_*.log\n"
    jobs = [json.loads(line) for line in (tmp_path / "logs" / "jobs.jsonl").read_text().splitlines()]
    assert [(job["job"], job["command"][-1]) for job in jobs] == [("5_0", "random"), ("5_1", "popular")]
    assert {path.name for path in (tmp_path / "logs").rglob("*_submitted.pkl")} == {
        "5_0_submitted.pkl",
        "5_1_submitted.pkl",
    }


# --- following a job


@pytest.fixture
def slurm_says(programs, tmp_path):
    """``slurm_says(*answers)``: scontrol gives one after the other, then the last for ever; None: no such job."""

    def play(*answers: str | None) -> None:
        texts = ["slurm_load_jobs error: Invalid job id specified" if a is None else a for a in answers]
        (tmp_path / "answers").write_text("\n".join(texts) + "\n")
        file = tmp_path / "answers"
        programs(
            "scontrol",
            f"line=$(head -n 1 {file}); [ $(sed -n '$=' {file}) = 1 ] || sed -i 1d {file}\n"
            'case $line in *error*) echo "$line" >&2; exit 1 ;; *) printf "%s\\n" "${line//;/$\'\\n\'}" ;; esac',
        )

    return play


def job(state: str, code: str = "0:0", more: str = "", number: int = 7) -> str:
    return f"JobId={number} {more} JobState={state} Reason=None Restarts=0 ExitCode={code} NodeList=n[1-2] Comment=x y"


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (job("COMPLETED"), 0),
        (job("FAILED", "3:0"), 3),
        (job("FAILED", "0:9"), 137),
        (job("CANCELLED", "0:15"), 143),
        (job("CANCELLED"), 1),
        (job("TIMEOUT"), 1),
        (job("NODE_FAIL"), 1),
    ],
)
def test_watch_ends_with_the_jobs_code(slurm_says, tmp_path, capsys, last, code):
    slurm_says(job("PENDING"), job("PENDING"), job("RUNNING"), job("RUNNING"), last)
    (tmp_path / "log").write_text("step 1\nstep 2 is not")
    assert watch.follow("7", {"7": tmp_path / "log"}, interval=0.001) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["step 1", "job 7: PENDING", "job 7: RUNNING on n[1-2]", f"job 7: {last.split()[1][9:]}"]
    assert lines[4:] == ["step 2 is not", f"job 7: ended with exit code {code}; log: {tmp_path}/log"]


def test_watch_goes_on_over_a_requeue_and_a_silent_controller(slurm_says, tmp_path, capsys):
    down = "error: Unable to contact slurm controller"
    slurm_says(job("RUNNING"), job("PREEMPTED"), job("PENDING"), *[down] * 8, job("RUNNING"), job("COMPLETED"))
    assert watch.follow("7", {"7": tmp_path / "log"}, interval=0.001) == 0
    captured = capsys.readouterr()
    states = re.findall(r"job 7: ([A-Z]+)", captured.out)
    assert states == ["RUNNING", "PREEMPTED", "PENDING", "RUNNING", "COMPLETED"]
    assert captured.err.count("Slurm does not answer") == 1


def test_watch_of_a_job_that_the_controller_forgot(slurm_says, programs, tmp_path, capsys):
    slurm_says(job("RUNNING"), None)
    assert watch.follow("7", {"7": tmp_path / "log"}, interval=0.001) == 1  # no sacct here
    assert "Slurm no longer knows it" in capsys.readouterr().out
    slurm_says(job("RUNNING"), None)
    programs("sacct", "echo '7|CANCELLED by 1000|0:0'")
    assert watch.follow("7", {"7": tmp_path / "log"}, interval=0.001) == 1
    assert "job 7: CANCELLED" in capsys.readouterr().out
    slurm_says(job("RUNNING"), None)
    programs("sacct", "echo '7|COMPLETED|0:0'")
    assert watch.follow("7", {"7": tmp_path / "log"}, interval=0.001) == 0


def test_watch_an_array(slurm_says, tmp_path, capsys):
    waiting = job("PENDING", more="ArrayJobId=7 ArrayTaskId=0,1-2%2")
    ended = [
        job("COMPLETED", more="ArrayJobId=7 ArrayTaskId=0", number=8),
        job("FAILED", "2:0", "ArrayJobId=7 ArrayTaskId=1", number=9),
    ]
    last = job("FAILED", "5:0", "ArrayJobId=7 ArrayTaskId=2")
    slurm_says(waiting, ";".join(ended), ";".join([*ended, job("PENDING", more="ArrayJobId=7 ArrayTaskId=2%2")]), last)
    logs = {f"7_{task}": tmp_path / f"log{task}" for task in range(3)}
    (tmp_path / "log1").write_text("bad input\n")
    assert watch.follow("7", logs, interval=0.001) == 5
    out = capsys.readouterr().out
    assert "[1] bad input\n" in out
    assert [re.search(rf"job 7_{t}: ended with exit code (\d)", out)[1] for t in range(3)] == ["0", "2", "5"]


# --- here, without a queue


def test_local_ends_with_the_runs_code_and_keeps_its_output(call, tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "launch.py").write_text(
        "import sys; print(sys.argv[1:], flush=True); sys.exit(int(sys.argv[-1]))"
    )
    monkeypatch.setattr(foreground, "ROOT", tmp_path)
    for code in (0, 3):
        assert call("--local", "--processes", 2, "--", "x.py", code)[0] == code
    kept = "".join(log.read_text() for log in (tmp_path / "logs").glob("x-*.log"))
    assert "['--launcher', 'torchrun', '--processes', '2', '--', 'x.py', '3']\n" in kept
    assert len((tmp_path / "logs" / "jobs.jsonl").read_text().splitlines()) == 2


def test_local_under_nohup_outlives_the_terminal(call, tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "launch.py").touch()
    monkeypatch.setattr(foreground, "ROOT", tmp_path)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert call("--local", "--", "x.py")[0] == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_logs_that_cannot_be_written(call, programs, tmp_path):
    programs("srun", "")
    programs("sbatch", "echo Submitted batch job 5")
    (tmp_path / "file").touch()
    for where in (["--local"], []):
        code, _, err = call(*where, "--logs", tmp_path / "file", "--", *POPE)
        assert code == 2
        assert err.startswith(f"error: --logs {tmp_path}/file: cannot be written: ")


def test_local_run_is_told_to_save(tmp_path):
    """A signal to submit.py reaches the ranks, which are in sessions of their own."""
    (tmp_path / "mine.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: os._exit(75))\n"
        "print('rank', os.environ['RANK'], flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, SUBMIT, "--local", "--processes", "2", "--logs", tmp_path / "logs", "--", "mine.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = set()
    for line in process.stdout:
        seen |= {line} if line.startswith("rank") else set()
        if len(seen) == 2:
            break
    process.terminate()
    assert process.wait(30) == 75


# --- cards of a shared box


@pytest.fixture
def box(programs, tmp_path, monkeypatch):
    """``box(free, ...)``: what each card of 24 GiB has free, in MiB."""
    monkeypatch.setattr(gpus, "LOCK_FOLDER", tmp_path)

    def put(*free: int) -> None:
        rows = (f"{index}, GPU-{index}, {mib}, 24576" for index, mib in enumerate(free))
        # Renamed into its place: a waiter may be asking.
        script = programs("next", "echo '" + "\n".join(rows) + "'")
        script.rename(script.with_name("nvidia-smi"))

    return put


def test_cards_are_free_enough(box):
    box(100, 23000, 5000, 24000)
    with gpus.taken(2, 22 * 1024) as (cards, _):
        assert cards == [1, 3]
    with gpus.taken(1, None) as (cards, _):
        assert cards == [1]
    with gpus.taken(3, 5000) as (cards, _):
        assert cards == [1, 2, 3]
    with pytest.raises(UserError, match="this machine has 4 card"), gpus.taken(5, None):
        pass
    with pytest.raises(UserError, match=r"has 0 card.s. of 40960 MiB or more"), gpus.taken(1, 40 * 1024):
        pass


def test_two_waiters_never_take_the_same_cards(box, capsys):
    box(24000, 24000, 100)

    def waiter(count: int, took: list[list[int]]) -> threading.Thread:
        def wait() -> None:
            with gpus.taken(count, 22 * 1024, interval=0.02) as (cards, _):
                took.append(cards)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    with gpus.taken(1, 22 * 1024) as (first, held):
        # The run keeps the card where its starter is gone.
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held)
    second, third = [], []
    waiting = waiter(2, second)
    time.sleep(0.2)
    assert (first, second) == ([0], [])
    waiter(1, third).join(10)
    assert third == [[1]]  # the waiter, one short, keeps nobody from the other card
    box(100, 24000, 24000)  # now the run uses its memory, and another card is free
    waiting.join(10)
    assert second == [[1, 2]]
    child.communicate(b"\n")
    said = capsys.readouterr().err
    assert said.count("waiting for 2 of 3 cards that have 22528 MiB free") == 1


def test_no_nvidia_smi(programs):
    with pytest.raises(UserError, match="there is no nvidia-smi here"):
        gpus.cards()
    programs("nvidia-smi", "echo 'Failed to initialize NVML: driver mismatch'; exit 18")
    with pytest.raises(UserError, match="NVML: driver mismatch"):
        gpus.cards()


def test_local_takes_the_cards_it_waited_for(call, box, tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "launch.py").write_text(
        "import os, pathlib\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'])\n"
        "files = (file.resolve().name for file in pathlib.Path('/proc/self/fd').iterdir())\n"
        "print(sorted(name for name in files if name.endswith('.lock')))\n"
    )
    monkeypatch.setattr(foreground, "ROOT", tmp_path)
    (tmp_path / "here" / "x.py").touch()
    box(100, 24000, 24000)
    code, out, _ = call("--local", "--wait-gpus", 2, "--min-free", "22G", "--", "x.py")
    assert code == 0
    assert out.splitlines()[1:] == ["1,2 PCI_BUS_ID", "['llava-GPU-1.lock', 'llava-GPU-2.lock']"]


@pytest.mark.parametrize(("text", "mib"), [("22G", 22528), ("1.5GiB", 1536), ("500M", 500), ("2gb", 2048)])
def test_memory_sizes(text, mib):
    assert gpus.mebibytes(text) == mib


# --- the table

NOW = 1_800_000_000


def heartbeat(folder: Path, state: str, ago: int = 10, **more: object) -> None:
    folder.mkdir(parents=True)
    updated = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(NOW - ago))
    content = {"state": state, "updated": updated, "step": 20, "max_steps": 100, "unit": "pairs", "rate": 3.21, **more}
    (folder / "status.json").write_text(json.dumps(content))


def rows_of(out: str) -> dict[str, list[str]]:
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    return {cells[0]: cells[1:] for cells in lines}


def test_table(tmp_path, programs, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    live = {"seconds_left": 3725, "metrics": {"loss": 0.69314}, "last_checkpoint": "checkpoint-20"}
    heartbeat(tmp_path / "checkpoints/live", "running", job="1", **live)
    heartbeat(tmp_path / "checkpoints/live/checkpoint-20", "running")  # not a run
    heartbeat(tmp_path / "checkpoints/killed", "running", ago=4000, job="2")
    heartbeat(tmp_path / "checkpoints/lost", "saving", ago=10, job="3")
    heartbeat(tmp_path / "checkpoints/again", "stopped", job="4_1", last_checkpoint="checkpoint-20")
    heartbeat(tmp_path / "checkpoints/done/pope", "finished", ago=200_000, job="5")
    heartbeat(tmp_path / "checkpoints/silent", "running", ago=4000, job="6")
    heartbeat(tmp_path / "elsewhere", "failed", job=None)
    pope = tmp_path / "checkpoints/done/pope"
    (pope / "status_random.json").write_text((pope / "status.json").read_text())
    (pope / "status.json").rename(pope / "status_all.json")
    (tmp_path / "checkpoints/broken").mkdir()
    (tmp_path / "checkpoints/broken/status.json").write_text("{")
    table.remember(tmp_path / "logs", [("9", tmp_path / "l", ["train_dpo.py", "--output_dir", "elsewhere"])])
    table.remember(tmp_path / "logs", [(None, tmp_path / "l", ["x.py"]), ("8", tmp_path / "l", ["x.py", "a b"])])
    asked = tmp_path / "asked"
    programs(
        "squeue",
        f'echo "$@" > {asked}\n'
        "echo '1 RUNNING'; echo '3 FAILED'; echo '4_1 PENDING'; echo '6 RUNNING'; echo '8 PENDING'; echo '9 PENDING'",
    )
    table.show([], tmp_path / "logs", now=NOW)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == list(table.COLUMNS)
    assert len({line.rfind("ago") for line in lines if "live" in line or "killed" in line}) <= 2
    rows = rows_of(captured.out)
    assert rows["checkpoints/live"] == [
        *("running", "20/100", "3.21 pairs/s", "1h02m", "0.6931", "checkpoint-20", "10s ago", "1"),
    ]
    assert "--jobs=1,2,3,4_1,5,6,8,9" in asked.read_text()
    states = {name: cells[0] for name, cells in rows.items()}
    assert states == {
        "run": "state",
        "checkpoints/live": "running",
        "checkpoints/killed": "dead",
        "checkpoints/lost": "dead",
        "checkpoints/again": "pending",
        "checkpoints/done/pope all": "finished",
        "checkpoints/done/pope random": "finished",
        "checkpoints/silent": "running, silent",
        "elsewhere": "pending",  # the later of its two lines: the job that waits
        "x.py 'a b'": "pending",
    }
    assert [line.split()[1] for line in lines if line.startswith("elsewhere")] == ["failed", "pending"]
    assert rows["checkpoints/done/pope all"][-2:] == ["2d7h ago", "5"]
    assert "broken" in captured.err

    table.show(["elsewhere"], tmp_path / "logs", now=NOW)
    assert set(rows_of(capsys.readouterr().out)) == {"run", "elsewhere"}


def test_a_run_here_whose_process_is_gone_is_dead(tmp_path, programs, capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = {"host": os.uname().nodename, "job": None}
    heartbeat(tmp_path / "gone", "running", pid=gone.pid, **here)
    heartbeat(tmp_path / "lives", "running", pid=os.getpid(), **here)
    table.show([str(tmp_path)], tmp_path, now=NOW)
    rows = rows_of(capsys.readouterr().out)
    assert [rows[str(tmp_path / name)][0] for name in ("gone", "lives")] == ["dead", "running"]


def test_status_of_nothing(call, tmp_path):
    assert call("--status") == (0, "no runs found under checkpoints\n", "")
