"""The job layer: what is started on which node, what a signal does, and what becomes of a job that was stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llava.errors import UserError
from llava.interruption import SIGNALS
from slurm import job, launch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def env(monkeypatch):
    """The environment without anything of Slurm, of cards or of a launcher."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_", "CUDA_VISIBLE", "TORCHELASTIC", "OMP_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def tools(env, tmp_path):
    """``tools(name, script)``: a program of this name on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    env.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)

    return put


@pytest.fixture
def as_before(env):
    """Undo what a launcher does to the process that it runs in."""
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    environment, argv = dict(os.environ), sys.argv
    yield
    logging.disable(logging.NOTSET)
    sys.argv = argv
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- where and how many


def test_place_in_a_job(env, tools):
    tools("scontrol", 'echo "$@" >&2; [[ "$*" == "show hostnames n[07-08]" ]] && printf "n07\\nn08\\n"')
    slurm = {"SLURM_JOB_ID": "654321", "SLURM_STEP_NODELIST": "n[07-08]", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
    place = launch.this_place(slurm)
    assert place == (1, ["n07", "n08"], 20000 + 654321 % 20000)
    assert (place.host, place.head) == ("n08", "n07"), "the other node must be able to reach it"
    with pytest.raises(UserError, match="--ntasks-per-node=1"):
        launch.this_place({**slurm, "SLURM_LOCALID": "1"})


def test_place_on_one_machine(env):
    in_batch_step = launch.this_place({"SLURM_JOB_ID": "5", "SLURM_NNODES": "2", "SLURM_NODEID": "0"})
    assert (in_batch_step.node, in_batch_step.head, in_batch_step.port) == (0, "127.0.0.1", 20005)
    assert len(in_batch_step.hosts) == 1
    assert launch.this_place({}).head == "127.0.0.1"
    assert 1024 < launch.this_place({}).port < 65536


@pytest.mark.parametrize(
    ("include", "env", "cards"),
    [
        (None, {"CUDA_VISIBLE_DEVICES": "2,3"}, ["2", "3"]),
        (None, {"CUDA_VISIBLE_DEVICES": ""}, []),
        (None, {"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_JOB_ID": "1"}, []),
        (None, {}, ["0", "1", "2"]),
        ("0,2", {}, ["0", "2"]),
        ("localhost:1", {}, ["1"]),
        ("1", {"CUDA_VISIBLE_DEVICES": "4,6", "SLURM_JOB_ID": "1"}, ["6"]),
        ("1,0", {"CUDA_VISIBLE_DEVICES": "GPU-aa,MIG-bb", "SLURM_JOB_ID": "1"}, ["MIG-bb", "GPU-aa"]),
    ],
)
def test_cards(monkeypatch, include, env, cards):
    monkeypatch.setattr(launch, "_count_cards", lambda: 3)
    assert launch.choose_cards(include, env) == cards


@pytest.mark.parametrize(
    ("include", "env", "message"),
    [
        ("0", {"CUDA_VISIBLE_DEVICES": "0,1"}, "both choose cards"),
        ("3", {}, "no card 3; here are cards 0 to 2"),
        ("2", {"CUDA_VISIBLE_DEVICES": "4,6", "SLURM_JOB_ID": "1"}, "no card 2; here are cards 0 to 1"),
        ("1,1", {}, "a card twice"),
        ("0-2", {}, "with commas between"),
        ("n1:0@n2:1", {}, "with commas between"),
    ],
)
def test_cards_refused(monkeypatch, include, env, message):
    monkeypatch.setattr(launch, "_count_cards", lambda: 3)
    with pytest.raises(UserError, match=message):
        launch.choose_cards(include, env)


def test_processes(monkeypatch):
    assert launch.choose_cards("2,5", {}) == ["2", "5"], "without cards the numbers say how many processes"
    assert launch.count_processes(None, ["2", "5"]) == 2
    assert launch.count_processes(None, []) == 1
    assert launch.count_processes(3, ["0"]) == 3
    with pytest.raises(UserError, match="expected 1 or more"):
        launch.count_processes(0, [])
    monkeypatch.setattr(launch, "_count_cards", lambda: 8)
    assert launch.count_processes(1, ["0", "1"]) == 1
    with pytest.raises(UserError, match="there are 2 cards"):
        launch.count_processes(3, ["0", "1"])


def test_threads_share_the_cpus_of_the_job(env):
    env.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert launch._cpus() == 12
    env.setenv("SLURM_CPUS_PER_TASK", "8")
    assert launch._cpus() == 8


def test_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args, command = launch.parse_args(["--include", "0", "--", "train_dpo.py", "--include", "x", "--", "y"])
    assert (args.include, command) == ("0", ["train_dpo.py", "--include", "x", "--", "y"])
    assert launch.find_script(command)[0] == str(ROOT / "train_dpo.py")
    (tmp_path / "train_dpo.py").touch()
    assert launch.find_script(command) == [str(tmp_path / "train_dpo.py"), *command[1:]]
    for argv, message in (
        (["train_dpo.py"], "-- SCRIPT ARGS"),
        (["--"], "-- SCRIPT ARGS"),
        (["--proceses", "2", "--", "train_dpo.py"], "did you mean --processes"),
    ):
        with pytest.raises(UserError, match=message):
            launch.parse_args(argv)
    with pytest.raises(UserError, match="no such script"):
        launch.find_script(["train_dop.py"])


# ------------------------------------------------------------------------------------------------ processes of a node

RANK = """
import json, os, signal, sys, time
how, folder = sys.argv[1:3]
rank = os.environ["RANK"]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
record = {name: os.environ.get(name) for name in names}
record["ignored"] = [n for n in (10, 12, 15) if signal.getsignal(n) is signal.SIG_IGN]
with open(f"{folder}/rank{rank}", "w") as file:
    json.dump(record, file)
if how == "signals":
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        os.kill(os.getppid(), number)
    time.sleep(0.3)
elif rank == "1":
    while not os.path.exists(f"{folder}/rank0"):
        time.sleep(0.01)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(how))
elif how != "0":
    time.sleep(0.5)  # a fellow that still has something to do, and hears no SIGTERM, is left the time
    open(f"{folder}/done", "w").close()
"""


@pytest.fixture
def rank(tmp_path) -> Path:
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path / "rank.py"


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("0", 0, ""),
        ("2", 2, ""),
        ("75", 75, ""),
        ("1", 1, "error: rank 1 (local rank 1 on HOST) failed with exit code 1\n"),
        ("kill", 137, "error: rank 1 (local rank 1 on HOST) was ended by SIGKILL\n"),
    ],
)
def test_exit_code_is_the_first_failure(as_before, env, rank, tmp_path, capfd, how, code, said):
    (tmp_path / "outcome.0").touch()
    before = time.time() - 1  # torchrun counts whole seconds
    outcome = f"{tmp_path}/outcome."
    assert launch.launch([str(rank), how, str(tmp_path)], processes=2, include="4,6", outcome=outcome) == code
    records = [json.loads((tmp_path / f"rank{n}").read_text()) for n in range(2)]
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"]) for r in records] == [("0", "0", "2"), ("1", "1", "2")]
    assert {r["CUDA_VISIBLE_DEVICES"] for r in records} == {"4,6"}
    assert (tmp_path / "done").exists() == (how != "0")
    written = job.Outcome(**json.loads((tmp_path / "outcome.0").read_text()))
    assert written.code == code
    assert before < written.when < time.time()
    captured = capfd.readouterr()
    assert captured.err == said.replace("HOST", os.uname().nodename)
    assert "ranks 0 to 1 of 2, cards 4,6, meeting at 127.0.0.1:" in captured.out


def test_deepspeed(as_before, env, rank, tmp_path, capfd):
    pytest.importorskip("deepspeed")
    options = {"launcher": "deepspeed", "include": "4,6"}
    assert launch.launch([str(rank), "0", str(tmp_path)], **options) == 0
    records = [json.loads((tmp_path / f"rank{n}").read_text()) for n in range(2)]
    assert [(r["RANK"], r["LOCAL_RANK"], r["CUDA_VISIBLE_DEVICES"]) for r in records] == [
        ("0", "0", "4,6"),
        ("1", "1", "4,6"),
    ]
    env.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.launch([str(rank), "kill", str(tmp_path)], **options) == 137
    assert f"error: a process on {os.uname().nodename} was ended by SIGKILL\n" in capfd.readouterr().err


def test_two_nodes(env, tools, rank, tmp_path):
    """Ranks count over nodes, local ranks within one; the launcher is deaf and its ranks are until they listen."""
    tools("scontrol", 'printf "localhost\\n127.0.0.1\\n"')
    env.setenv("SLURM_JOB_ID", str(os.getpid()))
    env.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    command = [sys.executable, ROOT / "slurm/launch.py", "--processes", "2", "--", rank, "signals", tmp_path]
    nodes = []
    for node in ("0", "1"):
        env.setenv("SLURM_NODEID", node)
        nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [node.communicate(timeout=60)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    port = 20000 + os.getpid() % 20000
    assert f"ranks 2 to 3 of 4, cards none, meeting at localhost:{port}" in said[1]
    records = [json.loads((tmp_path / f"rank{n}").read_text()) for n in range(4)]
    assert [r["LOCAL_RANK"] for r in records] == ["0", "1", "0", "1"]
    assert {(r["WORLD_SIZE"], r["MASTER_ADDR"], tuple(r["ignored"])) for r in records} == {
        ("4", "localhost", (10, 12, 15))
    }


def test_a_node_with_bad_input_says_so(as_before, env, tmp_path):
    (tmp_path / "0").touch()
    with pytest.raises(UserError, match="no such script"):
        launch.launch(["no.py"], outcome=f"{tmp_path}/")
    assert json.loads((tmp_path / "0").read_text())["code"] == 2


def test_a_failed_node_waits_for_the_others(monkeypatch, tmp_path):
    for name in "01":
        (tmp_path / name).touch()
    (tmp_path / "0").write_text("x")
    threading.Timer(0.3, (tmp_path / "1").write_text, ["x"]).start()
    start = time.monotonic()
    launch._wait_for_outcomes(f"{tmp_path}/", 2)
    assert 0.2 < time.monotonic() - start < 10
    (tmp_path / "1").write_text("")
    monkeypatch.setattr(launch, "OTHERS_SECONDS", 0.3)
    launch._wait_for_outcomes(f"{tmp_path}/", 2)  # and not for ever


# --------------------------------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("outcomes", "srun", "code"),
    [
        ([(0, 5), (0, 6)], 0, 0),
        ([(75, 5), (75, 6)], 75, 75),
        ([(2, 6), (75, 5)], 75, 75),
        ([(137, 6), (2, 5)], 137, 2),
        ([(1, 5), (137, 6)], 137, 137),  # its peer was killed: the 1 is only the lost connection
        ([(1, 5), (2, 6)], 2, 2),
        ([(0, 5), (1, 6)], 1, 1),
        ([(1, 6), (3, 5)], 3, 3),
        ([(1, 5)], 137, 1),  # srun killed the other node because of it
        ([], 137, 137),  # launch.py itself was killed
        ([], -9, 137),
        ([], 128 + signal.SIGUSR2, 75),  # it had not begun
        ([(0, 5)], 3, 3),
    ],
)
def test_verdict(outcomes, srun, code):
    assert job.verdict([job.Outcome(*outcome) for outcome in outcomes], srun) == code


def test_an_array_task_is_named_as_such():
    """The number of an array's last task also stands for the whole array: all of it would be queued again."""
    task = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert job.job_name(task) == "9_3"
    assert job.job_name({"SLURM_JOB_ID": "9"}) == "9"
    with pytest.raises(UserError, match="inside a job"):
        job.job_name({})


# ------------------------------------------------------------------------------------------------------------- the job

SRUN = """
printf '%s\\n' "$@" > "$FAKE/args"
env > "$FAKE/env"
while [[ $1 != --outcome ]]; do shift; done
trap 'echo USR2 >> "$FAKE/heard"' USR2
touch "$FAKE/started"
until [[ $(cat "$FAKE/heard" 2>/dev/null | wc -l) -ge ${SIGNALS:-0} ]]; do sleep 0.02; done
node=0
for code in $CODES; do
  echo "{\\"code\\": $code, \\"when\\": $node}" > "$2$node"
  node=$((node + 1))
done
exit ${SRUN:-0}
"""


@pytest.fixture
def in_job(env, tools, tmp_path):
    """``in_job(codes, **more) -> (exit code, what scontrol was told)``: a job of two nodes that end with these codes.

    ``send``: a signal that the batch process gets; ``heard``: how often the nodes must hear of it until they end;
    the rest is environment.
    """
    tools("srun", SRUN)
    tools("scontrol", 'echo "$@" >> "$FAKE/scontrol"; [[ -z $REFUSED ]] || { echo "$REFUSED" >&2; exit 1; }')
    tools("squeue", '[[ " $* " == *" --jobs=4"* ]] && echo "${STATE:-RUNNING}"')
    env.setenv("FAKE", str(tmp_path))
    env.setenv("SLURM_JOB_ID", "41")
    env.setenv("SLURM_JOB_NUM_NODES", "2")

    def run(codes: str, send: int | None = None, heard: int = 0, options=None, **more: object) -> tuple[int, str]:
        for name, value in {"CODES": codes, "SIGNALS": heard, **more}.items():
            env.setenv(name, str(value))

        def sender() -> None:
            while not (tmp_path / "started").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), send)

        if send:
            threading.Thread(target=sender).start()
        code = job.run_job(["pope_eval.py", "--set", "all"], logs=tmp_path / "logs", **(options or {}))
        assert list((tmp_path / "logs").iterdir()) == []
        told = tmp_path / "scontrol"
        return code, told.read_text() if told.exists() else ""

    return run


def test_what_srun_is_told(in_job, env, tmp_path, capfd):
    env.setenv("SLURM_GPUS_PER_NODE", "1")
    env.setenv("SLURM_CPUS_PER_TASK", "8")
    options = {"launcher": "deepspeed", "processes": 2, "include": "0,1"}
    assert in_job("0 0", options=options) == (0, "")
    words = (tmp_path / "args").read_text().splitlines()
    at = words.index(sys.executable)
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(words[:at])
    args, command = launch.parse_args(words[at + 2 :])
    assert words[at + 1] == str(ROOT / "slurm/launch.py")
    assert (args.launcher, args.processes, args.include) == ("deepspeed", 2, "0,1")
    assert command == [str(ROOT / "pope_eval.py"), "--set", "all"]
    variables = (tmp_path / "env").read_text().splitlines()
    assert "SRUN_CPUS_PER_TASK=8" in variables
    assert not any(line.startswith("SLURM_GPUS") for line in variables), "the step would get fewer than the job has"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signal_before_the_limit(in_job, env, tmp_path, capfd, number):
    env.setattr(job, "REPEAT_SECONDS", 0.1)
    before = [signal.getsignal(n) for n in SIGNALS]
    # The nodes end after the third: a rank that was just starting up has missed the first.
    assert in_job("75 75", send=number, heard=3, SRUN=75) == (75, "requeue 41\n")
    assert [signal.getsignal(n) for n in SIGNALS] == before
    name = signal.Signals(number).name
    assert capfd.readouterr().err.splitlines() == [
        f"job 41: {name}: telling all processes to save and leave",
        f"job 41: stopped by {name}; queued again (1 of 10)",
    ]


@pytest.mark.parametrize(
    ("codes", "more", "code", "told", "said"),
    [
        ("75 75", {"SLURM_RESTART_COUNT": 3}, 75, "requeue 41\n", "stopped by a signal; queued again (4 of 10)"),
        ("1 137", {}, 137, "requeue 41\n", "killed; queued again (1 of 10)"),
        ("", {"SRUN": 137}, 137, "requeue 41\n", "killed; queued again (1 of 10)"),
        ("75", {"SLURM_ARRAY_JOB_ID": 40, "SLURM_ARRAY_TASK_ID": 2}, 75, "requeue 40_2\n", "queued again (1 of 10)"),
        ("75 75", {"SLURM_RESTART_COUNT": 10}, 75, "", "--max-requeues 10 reached; submitted again, it goes on"),
        ("137 1", {"SLURM_RESTART_COUNT": 10}, 137, "", "killed; not queued again: --max-requeues 10 reached"),
        (
            "75",
            {"REFUSED": "not today"},
            75,
            "requeue 41\n",
            "Slurm does not queue it again (not today); submitted again",
        ),
        ("2 2", {}, 2, "", "failed with exit code 2"),
        ("1 1", {}, 1, "", "failed with exit code 1"),
        ("0 139", {}, 139, "", "failed with exit code 139"),
        ("0 0", {"SLURM_RESTART_COUNT": 10}, 0, "", ""),
    ],
)
def test_what_becomes_of_the_job(in_job, capfd, codes, more, code, told, said):
    assert in_job(codes, **more) == (code, told)
    err = capfd.readouterr().err
    assert said in err
    assert len(err.splitlines()) == bool(said)


@pytest.mark.parametrize("handler", ["lambda *_: sys.exit(75)", "signal.SIG_DFL"])
def test_one_process_in_the_batch_step(in_job, tmp_path, capfd, handler):
    """It hears the signal, and its job is queued again; also where it had no handler yet."""
    script = f"import signal, sys, time; signal.signal(signal.SIGUSR2, {handler}); open('{tmp_path}/up', 'w')"
    waiting = [sys.executable, "-c", f"{script}; time.sleep(60)"]

    def send() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=send).start()
    assert job.run_here(waiting, os.environ) == 75
    assert (tmp_path / "scontrol").read_text() == "requeue 41\n"
    assert "job 41: stopped by SIGUSR2; queued again (1 of 10)" in capfd.readouterr().err
    assert job.run_here([sys.executable, "-c", "raise SystemExit(2)"], os.environ) == 2
    assert job.run_here([sys.executable, "-c", ""], os.environ) == 0


def test_a_cancelled_job_is_not_queued_again(in_job, capfd):
    assert in_job("75 75", send=signal.SIGTERM, heard=1) == (143, "")
    assert "job 41: was ended: cancelled" in capfd.readouterr().err


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_whose_ranks_hear_of_the_end_first(in_job, capfd, state):
    """Slurm would queue a cancelled job again if it were asked to."""
    assert in_job("75 75", STATE=state) == (143, "")
    assert capfd.readouterr().err == "job 41: was ended: cancelled, or its time was up before all was saved\n"


def test_a_job_that_finishes_in_spite_of_a_signal_has_finished(in_job):
    assert in_job("0 0", send=signal.SIGTERM, heard=1) == (0, "")


def test_no_endless_restarts(in_job, tmp_path, capfd):
    """Slurm queues a preempted job again without asking."""
    (tmp_path / "logs").mkdir()
    assert in_job("0 0", SLURM_RESTART_COUNT=3, options={"max_requeues": 2}) == (75, "")
    assert not (tmp_path / "started").exists()
    assert "was started again 3 times, more than --max-requeues 2" in capfd.readouterr().err


def test_bad_input_starts_nothing(in_job, env, tmp_path):
    with pytest.raises(UserError, match="expected 0 or more"):
        in_job("0 0", options={"max_requeues": -1})
    with pytest.raises(UserError, match="no such script"):
        job.run_job(["no.py"], logs=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/.outcome-41: cannot be written.*shared folder"):
        job.run_job(["pope_eval.py"], logs=tmp_path / "file")
    assert not (tmp_path / "started").exists()
