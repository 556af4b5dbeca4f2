"""The command that makes a run again."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, succeed

from llava import run_card
from llava.errors import UserError
from llava.eval import rerun as module
from llava.eval.evaluated import read_runs
from llava.eval.rerun import rerun

GIT = {"commit": "c" * 40, "diff": ""}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(module, "git_state", lambda: GIT)
    monkeypatch.setattr(module, "versions", lambda: VERSIONS)


def card_in(folder: Path, command: str, name: str = "run.json", **content) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    argument = "model_name_or_path" if name == "run.json" else "model_path"
    card = {
        "command": command,
        "working_directory": str(ROOT),
        "arguments": {argument: "m/m", "output_dir": str(folder)},
        "git": GIT,
        "versions": VERSIONS,
        "hardware": {"gpus": ["A100"], "world_size": 1},
        "launch": {"launcher": "python", "processes": 1, "nodes": 1, "processes_per_node": 1},
        "environment": {},
    }
    (folder / name).write_text(json.dumps(card | content))
    return folder


def launched(launcher: str, nodes: int, here: int) -> dict:
    return {"launcher": launcher, "processes": nodes * here, "nodes": nodes, "processes_per_node": here}


def test_one_process(tmp_path, capsys):
    folder = card_in(
        tmp_path / "out", "python -u train_dpo.py --beta 0.1 --output_dir elsewhere --post_block_config a=b"
    )
    again = f"{folder}.rerun"
    assert rerun(folder) == (
        f"cd {ROOT} && python train_dpo.py --beta 0.1 --post_block_config a=b --output_dir {again}"
    )
    assert capsys.readouterr().err == f"note: {folder} is there; the run is made again in {again}\n"
    Path(again).mkdir()
    assert rerun(folder).endswith(f"--output_dir {again}2")


def test_the_interpreter_and_its_launchers_are_those_of_the_run(tmp_path):
    tools = tmp_path / "my env" / "bin"
    tools.mkdir(parents=True)
    for name in ("python", "torchrun"):
        (tools / name).touch()
    command = shlex.join([str(tools / "python"), "train_dpo.py", "--version", "v 1"])
    folder = card_in(tmp_path / "out", command)
    assert f"&& '{tools}/python' train_dpo.py --version 'v 1' --output_dir" in rerun(folder)
    card_in(folder, command, launch=launched("torchrun", 1, 2), environment={"OMP_NUM_THREADS": "4"})
    assert f"&& OMP_NUM_THREADS=4 '{tools}/torchrun' --standalone --nproc_per_node 2 train_dpo.py" in rerun(folder)
    card_in(folder, command, launch=launched("deepspeed", 1, 2))
    assert "&& deepspeed --num_gpus 2 train_dpo.py" in rerun(folder)


def test_deepspeeds_launcher_takes_the_cards_as_a_flag(tmp_path):
    command = "python -u train_dpo.py --local_rank=0 --deepspeed zero_configs/zero2.json"
    variables = {"CUDA_VISIBLE_DEVICES": "2,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    folder = card_in(tmp_path / "out", command, launch=launched("deepspeed", 1, 2), environment=variables)
    assert rerun(folder).startswith(
        f"cd {ROOT} && CUDA_DEVICE_ORDER=PCI_BUS_ID deepspeed --include localhost:2,3 train_dpo.py --deepspeed "
        "zero_configs/zero2.json --output_dir"
    )
    # Without GPUs the launcher sets the variable all the same, and refuses to be given its numbers.
    card_in(folder, command, launch=launched("deepspeed", 1, 2), environment=variables, hardware={"gpus": []})
    assert "deepspeed --num_gpus 2 train_dpo.py" in rerun(folder)


def test_several_nodes_go_through_the_queue(tmp_path):
    variables = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    folder = card_in(tmp_path / "out", "python train_dpo.py", launch=launched("torchrun", 2, 4), environment=variables)
    assert f"&& python {ROOT}/slurm/submit.py --nodes 2 --gpus 4 -- train_dpo.py --output_dir" in rerun(folder)
    card_in(folder, "python train_dpo.py", launch=launched("deepspeed", 2, 4), hardware={"gpus": []})
    assert "--nodes 2 --gpus 0 --processes 4 --launcher deepspeed -- train_dpo.py" in rerun(folder)


def test_a_card_from_before_it_said_how_it_was_launched(tmp_path, capsys):
    def older(command: str, processes: int) -> str:
        hardware = {"gpus": [], "threads": 1, "world_size": processes}
        folder = card_in(tmp_path / "out", command, hardware=hardware)
        content = json.loads((folder / "run.json").read_text())
        del content["launch"], content["environment"]
        (folder / "run.json").write_text(json.dumps(content))
        return rerun(folder)

    assert "&& OMP_NUM_THREADS=1 python train_dpo.py --output_dir" in older("python train_dpo.py", 1)
    assert "torchrun --standalone --nproc_per_node 2 train_dpo.py" in older("python train_dpo.py", 2)
    assert "one is taken" in capsys.readouterr().err
    assert "deepspeed --num_gpus 2 train_dpo.py --x" in older("python -u train_dpo.py --local_rank 1 --x", 2)


def test_every_pope_run_of_a_folder_has_its_line(tmp_path):
    for number, name in enumerate(("random", "popular")):
        command = f"python pope_eval.py --model-path m/m --set {name}"
        arguments = {"model_path": "m/m", "output_dir": None}
        card_in(tmp_path / "pope", command, f"run_{name}.json", started=str(number), arguments=arguments)
    again = f"{tmp_path}/pope.rerun"
    lines = [
        f"cd {ROOT} && python pope_eval.py --model-path m/m --set {n} --output_dir {again}"
        for n in ("random", "popular")
    ]
    assert rerun(tmp_path / "pope").splitlines() == lines
    assert rerun(tmp_path).splitlines() == lines
    card_in(tmp_path, "python train_dpo.py")
    assert "train_dpo.py" in rerun(tmp_path)


def test_a_script_that_is_not_in_its_folder_is_the_repositorys(tmp_path):
    folder = card_in(tmp_path / "out", "python train_dpo.py", working_directory=str(tmp_path))
    assert f"cd {tmp_path} && python {ROOT}/train_dpo.py" in rerun(folder)


def test_what_is_no_longer_as_it_was_is_told(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}\n")
    files = {
        str(data): {"sha256": hashlib.sha256(b"{}\n").hexdigest()},
        "gone.json": {"sha256": "0"},
    }
    folder = card_in(
        tmp_path / "out",
        "python train_dpo.py",
        data=files,
        git={"commit": "a" * 40, "diff": "+x"},
        versions=VERSIONS | {"torch": "2.12.0", "peft": "0.21"},
        working_directory=str(tmp_path / "gone"),
    )
    rerun(folder)
    said = capsys.readouterr().err
    assert "its code was commit aaaaaaaaaaaa, this is cccccccccccc; git checkout aaaaaaaaaaaa" in said
    assert "its code had uncommitted changes; they are under git.diff in it" in said
    assert "its data file gone.json is not there" in said and "pairs.jsonl" not in said
    assert "made with torch 2.12.0 (here 2.13.0), peft 0.21 (here none)" in said
    assert "working directory" in said
    data.write_text("{} \n")
    rerun(folder)
    assert f"its data file {data} has changed since" in capsys.readouterr().err


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(UserError, match=r"no run.json and no run_\*.json"):
        rerun(tmp_path)
    with pytest.raises(UserError, match="key 'command' names no script"):
        rerun(card_in(tmp_path / "out", "python -m something"))


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, ("python", 1, 1)),
        # What prepare_processes sets for one process with --deepspeed.
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "3"}, ("python", 1, 1)),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, ("torchrun", 2, 4)),
        ({"CROSS_SIZE": "2", "LOCAL_SIZE": "4", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "1"}, ("deepspeed", 2, 4)),
    ],
)
def test_the_card_says_how_it_was_launched(monkeypatch, variables, launch):
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_card.launch() == launched(*launch)


@pytest.mark.slow
def test_the_command_gives_the_same_weights_and_answers(run_script, dpo_flags, pope_world, tmp_path, monkeypatch):
    """A small LoRA is trained, asked, trained and asked again by the commands; also what is read from it all."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    flags = ["--lora_enable", True, "--lora_r", 8, "--max_steps", 3, "--seed", 4, "--output_dir", out]
    succeed(run_script("train_dpo", *dpo_flags, *flags))
    asked = ["--model-path", out, "--coco_path", pope_world / "coco", "--pope_path", pope_world / "pope"]
    succeed(run_script("pope_eval", *asked, "--set", "random", "--scores", "--max_new_tokens", 2))

    def run_again(folder: Path) -> None:
        directory, command = rerun(folder).split(" && ")
        words = shlex.split(command)
        python = words.index("python")
        assert directory == f"cd {tmp_path}" and words[0] == "OMP_NUM_THREADS=1"
        assert Path(words[python + 1]).parent == ROOT
        succeed(run_script(Path(words[python + 1]).stem, *words[python + 2 :]))

    run_again(out)
    run_again(out / "pope")
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "out.rerun" / weights).read_bytes()
    answers = "pope_random.jsonl"
    assert (out / "pope" / answers).read_bytes() == (out / "pope.rerun" / answers).read_bytes()

    (run,) = read_runs([tmp_path])
    assert run.hadpo and run.seed == 4 and run.settings["lora_r"] == 8 and run.model == "tiny-llava-original"
    card = json.loads((out / "pope" / "run_random.json").read_text())
    assert run.sets["random"].confusion().as_dict() == card["metrics"]["random"]
    assert run.sets["random"].scores.min() >= 0 and card["environment"]["OMP_NUM_THREADS"] == "1"
