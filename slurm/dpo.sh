#!/bin/bash
# HA-DPO with the flags of its README, on the models and data that slurm/env.sh names:
#
#   sbatch slurm/dpo.sh [flags of train_dpo.py, which override the ones below]
#
# The recipe is for 8 GPUs; with fewer, a process adds up more batches, and the numbers stay. It writes to ha_dpo/ in
# OUTPUT_ROOT. From another folder than the repository's, start it with bash in the place of sbatch: the log is here.
#SBATCH --job-name=dpo
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
  here=$(scontrol show job "$SLURM_JOB_ID" | sed -n '0,\|^ *Command=\(.*\)/dpo\.sh.*|s||\1|p')
[[ -e $here/common.sh ]] ||
  { echo "error: no common.sh; give sbatch the path of slurm/dpo.sh itself" >&2; exit 2; }
source "$here/common.sh"

steps=$(accumulation 8 "$@")
run train_dpo.py --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 0 \
  --deepspeed "$LLAVA_ROOT/zero_configs/zero3.json" --model_name_or_path "$DPO_MODEL" --version v1 \
  --vg_path "$VG_PATH" --desc_data_path "$DESC_DATA" --pope_data_path "$POPE_DATA" --vision_tower "$VISION_TOWER" \
  --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False \
  --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bf16 True \
  --output_dir "$OUTPUT_ROOT/ha_dpo" --num_train_epochs 1 --per_device_train_batch_size 16 \
  --per_device_eval_batch_size 4 --gradient_accumulation_steps "$steps" --evaluation_strategy no --save_strategy steps \
  --save_steps 50 --save_total_limit 1 --learning_rate 2e-6 --weight_decay 0. --warmup_steps 0 \
  --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True \
  --dataloader_num_workers 4 --lazy_preprocess True --report_to tensorboard --run_name llava-v1.5 --beta 0.1 "$@"
