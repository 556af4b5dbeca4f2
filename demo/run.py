"""The whole journey on a small world: train a LLaVA, measure its hallucination, cut it with HA-DPO, measure again.

    python -m demo.run            (or: make demo)

Everything is made and trained on this machine's CPU in float32 and written to ``demo/out``; started again after an
interruption, it goes on where it was. What the commands print goes to ``demo/out/logs``.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from demo import data, results
from demo.journey import Journey
from llava.errors import UserError, command_line
from llava.files import read_jsonl, sha256
from llava.train.launch import free_port

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"
COMMON = "--use_cpu True --bf16 False --model_max_length 512 --save_strategy steps --save_total_limit 1"
# How DPO trains here, and the parts that train alone (demo/parts.py).
RECIPE = (
    "--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --num_train_epochs 1 --learning_rate 2e-4 "
    f"--warmup_ratio 0.03 --lr_scheduler_type cosine --gradient_checkpointing False --logging_steps 1 {COMMON}"
)
ASK = "python pope_eval.py --max_new_tokens 24"


def instruction_data(out: str) -> str:
    """Flags of the instruction data of the demo in ``out``."""
    return (
        f"--version v1 --image_aspect_ratio pad --data_path {out}/world/llava/instruct.json "
        f"--image_folder {out}/world/vg"
    )


def pope_data(out: str) -> str:
    """Flags of the test pictures and of all POPE questions about them."""
    return f"--coco_path {out}/world/coco --pope_path {out}/world/pope --set all"


def preference_data(out: str) -> str:
    """Flags of the preference pairs."""
    return (
        f"--version v1 --vg_path {out}/world/vg --desc_data_path {out}/ha-dpo/desc_data.json "
        f"--pope_data_path {out}/ha-dpo/pope_data.json"
    )


def from_root(folder: Path) -> str:
    """A folder in the commands, which run in the repository's root."""
    return shlex.quote(os.path.relpath(folder, HERE.parent))


def check_weights() -> None:
    """The shipped weights are those that ``SHA256SUMS`` names."""
    for line in (WEIGHTS / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        expected, name = line.split()
        file = WEIGHTS / name
        found = sha256(file) if file.is_file() else "no such file"
        if found != expected:
            raise UserError(
                f"{file}: SHA-256 {expected[:12]}... expected, found {found[:12]}; the file is damaged: bring "
                "it back with 'git checkout -- demo/weights', or make it again (demo/README.md says how)"
            )


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small LLaVA, cut its hallucination, measure both.")
    parser.add_argument("--seed", type=int, default=0, help="another world and another run (default: 0)")
    parser.add_argument("--output_dir", type=Path, default=HERE / "out")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: expected 0 or more, less than 2**32")
    check_weights()
    folder, seed = args.output_dir.expanduser().resolve(), args.seed
    out = from_root(folder)

    with Journey(folder, HERE.parent, settings=str(seed)) as journey:
        # ---- a world, and a LLaVA that has seen it ----
        journey.make("the world: pictures, captions, questions", folder / "world", lambda to: data.make_world(to, seed))
        journey.run(
            "connector training",
            f"python train_pretrain.py --model_name_or_path demo/weights/llm --vision_tower demo/weights/tower "
            f"--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --version plain --tune_mm_mlp_adapter True "
            f"--data_path {out}/world/llava/chat.json --image_folder {out}/world/vg --output_dir {out}/connector "
            f"--per_device_train_batch_size 16 --num_train_epochs 2 --learning_rate 6e-3 --warmup_ratio 0.03 "
            f"--lr_scheduler_type cosine --save_steps 60 --logging_steps 5 --seed {seed} {COMMON}",
        )
        journey.run(
            "instruction tuning",
            f"python train_pretrain.py --model_name_or_path demo/weights/llm --vision_tower demo/weights/tower "
            f"--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --train_type freeze_vision "
            f"--pretrain_mm_mlp_adapter {out}/connector/mm_projector.bin {instruction_data(out)} "
            f"--output_dir {out}/llava --per_device_train_batch_size 16 --num_train_epochs 1 --learning_rate 1e-3 "
            f"--warmup_ratio 0.03 --lr_scheduler_type cosine --save_steps 20 --logging_steps 2 --seed {seed} {COMMON}",
        )
        journey.run("POPE", f"{ASK} --model-path {out}/llava {pope_data(out)} --output_dir {out}/pope")

        # ---- HA-DPO: its own wrong answers, on training pictures, against the right ones ----
        journey.run(
            "asking about training pictures",
            f"{ASK} --conv-mode v1 --model-path {out}/llava --coco_path {out}/world/vg --pope_path {out}/world/probe "
            f"--set adversarial --output_dir {out}/probe",
        )
        journey.run(
            "describing training pictures",
            f"python -m demo.describe --model-path {out}/llava --annotations {out}/world/vg/instances.json "
            f"--first {data.TALKED_ABOUT} --count {data.DESCRIBED} --out {out}/probe/descriptions.jsonl",
        )
        journey.make("preference pairs", folder / "ha-dpo", lambda to: write_preferences(folder, to, seed))
        journey.run(
            "DPO",
            f"deepspeed --num_gpus 2 --master_port {free_port()} train_dpo.py "
            f"--deepspeed zero_configs/zero2.json --lora_enable True --lora_r 32 --lora_alpha 64 --mm_projector_lr 0 "
            f"--model_name_or_path {out}/llava {preference_data(out)} --output_dir {out}/llava-ha-dpo --beta 0.1 "
            f"--save_steps 10 --seed {seed} {RECIPE}",
            threads=1,
        )
        journey.run(
            "POPE after DPO",
            f"{ASK} --model-path {out}/llava-ha-dpo --model-base {out}/llava {pope_data(out)} "
            f"--output_dir {out}/pope-ha-dpo",
        )

        # ---- the table and the page ----
        table = results.write(folder, seed, journey.times)
        journey.finish()
    print(f"\n{table}\n\n{folder / 'report.html'}: the same with curves and pictures", flush=True)


def write_preferences(out: Path, target: Path, seed: int) -> None:
    """HA-DPO's two files from what the base model said about training pictures."""
    questions, answers = out / "world/probe/coco_pope_adversarial.json", out / "probe/pope_adversarial.jsonl"
    data.make_pope_data(questions, answers, target / "pope_data.json", seed)
    said = {row["image"]: row["text"] for _, row in read_jsonl(out / "probe/descriptions.jsonl")}
    data.make_desc_data(data.read_scenes(out / "world/vg/instances.json"), said, target / "desc_data.json")


if __name__ == "__main__":
    main()
