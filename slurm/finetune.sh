#!/bin/bash
# LLaVA's second stage, everything but the tower, on the models and data that slurm/env.sh names:
#
#   sbatch slurm/finetune.sh [flags of train_pretrain.py, which override the ones below]
#
# The recipe is for 8 GPUs; with fewer, a process adds up more batches, and the numbers stay. It starts from the connector of
# slurm/pretrain.sh and writes to llava-v1.5-7b/ in OUTPUT_ROOT. From another folder than the repository's, start it
# with bash in the place of sbatch: the log is here.
#SBATCH --job-name=finetune
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:USR2@180

set -euo pipefail

# sbatch runs a copy of this file in another folder; Slurm knows where the original lies.
here=$(dirname "$0")
[[ -e $here/common.sh ]] ||
  here=$(scontrol show job "$SLURM_JOB_ID" | sed -n '0,\|^ *Command=\(.*\)/finetune\.sh.*|s||\1|p')
[[ -e $here/common.sh ]] ||
  { echo "error: no common.sh; give sbatch the path of slurm/finetune.sh itself" >&2; exit 2; }
source "$here/common.sh"

steps=$(accumulation 8 "$@")
run train_pretrain.py --deepspeed "$LLAVA_ROOT/zero_configs/zero3.json" --model_name_or_path "$LANGUAGE_MODEL" \
  --version v1 --data_path "$FINETUNE_DATA" --image_folder "$FINETUNE_IMAGES" --vision_tower "$VISION_TOWER" \
  --mm_projector_type mlp2x_gelu --pretrain_mm_mlp_adapter "$OUTPUT_ROOT/llava-v1.5-7b-pretrain/mm_projector.bin" \
  --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad \
  --group_by_modality_length True --bf16 True --output_dir "$OUTPUT_ROOT/llava-v1.5-7b" --num_train_epochs 1 \
  --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps "$steps" \
  --evaluation_strategy no --save_strategy steps --save_steps 500 --save_total_limit 1 --learning_rate 2e-5 \
  --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True \
  --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True \
  --report_to tensorboard "$@"
