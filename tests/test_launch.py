"""Upstream's own commands, through the launchers that users type, on two processes and on one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

# HA-DPO's README command, every flag of it; only paths are filled in.
HA_DPO = """
--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 0 --deepspeed {root}/zero_configs/zero3.json
--model_name_or_path {golden}/tiny-llava-original --version v1 --vg_path {golden}/mini_vg
--desc_data_path {golden}/hadpo_data/desc_data.json --pope_data_path {golden}/hadpo_data/pope_data.json
--vision_tower {golden}/tiny-clip --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
--mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True
--bf16 True --output_dir {out} --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4
--gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1
--learning_rate 2e-6 --weight_decay 0. --warmup_steps 0 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
--model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
--report_to wandb --run_name llava-v1.5 --beta 0.1
"""

SMALL = """
--lora_enable True --lora_r 8 --lora_alpha 16 --model_name_or_path {golden}/tiny-llava-original
--vg_path {golden}/mini_vg --desc_data_path {golden}/hadpo_data/desc_data.json
--pope_data_path {golden}/hadpo_data/pope_data.json --model_max_length 2048 --output_dir {out}
--per_device_train_batch_size {batch} --gradient_accumulation_steps 1 --num_train_epochs 1 --learning_rate 1e-3
--warmup_steps 0 --beta 0.1 --save_strategy no --report_to none
"""


def launch(*command: object) -> subprocess.CompletedProcess[str]:
    # No environment variable is needed: none that a launcher reads may be left over from this process.
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    clean["PATH"] = f"{BIN}{os.pathsep}{clean['PATH']}"
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=400, check=False, env=clean, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def logs_of(folder: Path) -> list[dict]:
    return [x for x in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in x]


def test_ha_dpos_command_runs_unchanged_under_deepspeed(golden, tmp_path):
    command = HA_DPO.format(root=ROOT, golden=golden, out=tmp_path / "out").split()
    done = launch(BIN / "deepspeed", "--master_port", 29872, "train_dpo.py", *command)
    for line in (
        "warning: --tf32 True: there is no CUDA device",
        "warning: --report_to wandb: wandb is not installed",
        "note: --lazy_preprocess has nothing to do here",
        "| projector | 6,272 | 0 | frozen |",  # --mm_projector_lr 0
    ):
        assert (done.stdout + done.stderr).count(line) == 1, line
    engine = json.loads((tmp_path / "out" / "run.json").read_text())["engine"]
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    assert engine["model"] == f"{DeepSpeedEngine.__module__}.{DeepSpeedEngine.__qualname__}"
    assert engine["optimizer"].endswith(DeepSpeedZeroOptimizer_Stage3.__qualname__)
    assert logs_of(tmp_path / "out")[0]["loss"] == pytest.approx(0.6931, abs=2e-3)
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"adapter_model.safetensors", "non_lora_trainables.bin"}
    from llava.model.builder import load_pretrained_model

    load_pretrained_model(str(tmp_path / "out"), str(golden / "tiny-llava-original"))


@pytest.mark.parametrize("joins", [True, False])
def test_a_script_in_a_process_group_ends_before_the_interpreter_does(tmp_path, joins):
    """Exit functions run and output arrives, but no object of the interpreter's last moments is touched."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit\n"
        "from llava.errors import command_line\n"
        "class Last:\n"
        "    def __del__(self): print('the interpreter ends')\n"
        "last = Last()\n"
        "atexit.register(print, 'exit function')\n"
        "@command_line\n"
        "def main():\n"
        "    import torch.distributed as dist\n"
        f"    if {joins}: dist.init_process_group('gloo', rank=0, world_size=1, init_method='file://{tmp_path}/store')\n"
        "    print('done', end=' ')\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.stdout == "done exit function\n" + ("" if joins else "the interpreter ends\n")


@pytest.mark.slow
def test_best_checkpoint_held_out_pairs_and_resuming_on_two_processes(golden, tmp_path):
    """Three held-out pairs on two ranks: the fourth place of the last batch must not be counted."""
    rows = [
        {"image": "a_wide_97x41.png", "prompt": "Is there a dog?", "chosen": "No.", "rejected": "Yes, a dog."},
        {"image": "b_tall_33x120.png", "prompt": "Is there a cat?", "chosen": "Yes.", "rejected": "No cat here."},
        {"image": "c_square_64x64.png", "prompt": "What is it?", "chosen": "A car.", "rejected": "A red car."},
    ]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(
        "".join(json.dumps({**row, "image": str(golden / "images" / row["image"])}) + "\n" for row in rows)
    )
    evaluation = ["--eval_data_path", held_out, "--eval_strategy", "steps", "--eval_steps", 2, "--num_train_epochs", 2]
    saving = ["--save_strategy", "steps", "--save_steps", 2, "--load_best_model_at_end", True]
    saving += ["--metric_for_best_model", "eval_rewards/margins", "--group_by_modality_length", True]

    def evals(out, processes):
        flags = SMALL.format(golden=golden, out=out, batch=4 // processes).split()
        flags += [*evaluation, *saving, "--save_total_limit", 9]
        run = forked.run("train_dpo", flags, world_size=processes)
        assert run.codes == [0] * processes, run.text
        return [x for x in json.loads((out / "trainer_state.json").read_text())["log_history"] if "eval_loss" in x]

    keys = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen", "eval_logits/chosen")
    one, two = evals(tmp_path / "one", 1), evals(tmp_path / "two", 2)
    for mine, theirs in zip(two, one, strict=True):
        assert [mine[key] for key in keys] == pytest.approx([theirs[key] for key in keys], rel=1e-3, abs=1e-4)

    # In the second epoch the order is another: a resumed run must have that order too.
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(tmp_path / "two" / "run.json", killed)
    shutil.copytree(tmp_path / "two" / "checkpoint-4", killed / "checkpoint-4")
    evals(killed, 2)
    whole, resumed = logs_of(tmp_path / "two"), logs_of(killed)
    assert [x["loss"] for x in resumed] == pytest.approx([x["loss"] for x in whole], abs=1e-6)
    assert len(json.loads((killed / "run.json").read_text())["earlier"]) == 1


def test_deepspeed_needs_no_launcher(golden, tmp_path):
    flags = SMALL.format(golden=golden, out=tmp_path / "out", batch=4).split()
    launch(sys.executable, "train_dpo.py", *flags, "--deepspeed", "zero_configs/zero2_offload.json")
    assert "DeepSpeedEngine" in json.loads((tmp_path / "out" / "run.json").read_text())["engine"]["model"]


@pytest.fixture
def mixed(golden, tmp_path):
    """Flags of three steps, with text-only rows on one rank and pictures on the other."""
    picture = {"image": "a_wide_97x41.png", "conversations": turns("<image>\nWhat is it?", "A car.")}
    words = {"conversations": turns("Hello!", "Hi, how can I help?")}
    data = tmp_path / "mixed.json"
    data.write_text(json.dumps([picture, words, words, words, words, picture]))
    return [
        *("--data_path", data, "--model_name_or_path", golden / "tiny-llava-original"),
        *("--image_folder", golden / "images", "--output_dir", tmp_path / "out"),
        *("--version", "v1", "--model_max_length", 512, "--max_steps", 3, "--per_device_train_batch_size", 1),
        *("--logging_steps", 1, "--save_strategy", "no", "--report_to", "none", "--learning_rate", 1e-3),
        *("--train_sampling_strategy", "sequential"),
    ]


def test_every_rank_runs_tower_and_connector_in_every_step(mixed, tmp_path):
    """Or the others wait for it for ever."""
    torchrun = (BIN / "torchrun", "--nproc_per_node", 2, "--master_port", 29877)
    launch(*torchrun, "train_pretrain.py", *mixed, "--gradient_checkpointing", True)
    assert all(log["loss"] > 0 for log in logs_of(tmp_path / "out"))


@pytest.mark.slow
def test_every_rank_gathers_tower_and_connector_in_every_step(mixed, tmp_path):
    """Under ZeRO-3 the others wait for their weights too."""
    run = forked.run("train_pretrain", [*mixed, "--deepspeed", ROOT / "zero_configs" / "zero3.json"], world_size=2)
    assert run.codes == [0, 0], run.text
    assert all(log["loss"] > 0 for log in logs_of(tmp_path / "out"))


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
