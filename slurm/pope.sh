#!/bin/bash
# Ask a model the POPE questions:
#
#   sbatch slurm/pope.sh random              of the model that slurm/env.sh names (MODEL_PATH)
#   sbatch slurm/pope.sh all runs/a --scores of a training's output folder; more flags of pope_eval.py at the end
#
# SET is random, popular, adv or all. Answers go to pope/ inside the model's folder; the table stands at the log's end.
# From another folder than the repository's, start it with bash in the place of sbatch: the log is here.
#SBATCH --job-name=pope
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:USR2@180

set -euo pipefail

# Before it is submitted: a job that waits a day should not fail on its name.
usage="slurm/pope.sh SET [RUN] [flags of pope_eval.py], with SET one of random, popular, adv, all"
[[ $# -gt 0 ]] || { echo "error: no SET; expected: $usage" >&2; exit 2; }
[[ $1 =~ ^(random|popular|adv|adversarial|all)$ ]] ||
  { echo "error: SET '$1' is not known; expected: $usage" >&2; exit 2; }

# sbatch runs a copy of this file in another folder; Slurm knows where the original lies.
here=$(dirname "$0")
[[ -e $here/common.sh ]] ||
  here=$(scontrol show job "$SLURM_JOB_ID" | sed -n '0,\|^ *Command=\(.*\)/pope\.sh.*|s||\1|p')
[[ -e $here/common.sh ]] ||
  { echo "error: no common.sh; give sbatch the path of slurm/pope.sh itself" >&2; exit 2; }
source "$here/common.sh"

set=$1
shift
if [[ $# -gt 0 && $1 != -* ]]; then
  MODEL_PATH=$1
  shift
fi

run pope_eval.py --set "$set" --model-path "$MODEL_PATH" ${MODEL_BASE:+--model-base "$MODEL_BASE"} \
  --coco_path "$COCO_PATH" --pope_path "$POPE_PATH" "$@"
