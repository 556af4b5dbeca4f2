# The settings of the scripts beside this file. Edit them here, or give one for one run:
#
#   MODEL_PATH=runs/a sbatch slurm/pope.sh all
#
# An empty value leaves the choice to the script or to the cluster.
#
#   bash slurm/pope.sh random     submits with all that stands here
#   sbatch slurm/pope.sh random   uses the part below "the run"; the part above it sbatch never sees. It takes partition
#                                 and so on from its flags, else from variables (`source slurm/env.sh` in a fresh shell
#                                 sets them), else from the script's #SBATCH lines

LLAVA_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd -P)

# --- the cluster: ask its manual, or `sinfo` and `sacctmgr show assoc user=$USER`
: "${PARTITION:=}"     # a partition with GPUs; empty: the default one
: "${ACCOUNT:=}"       # who pays
: "${QOS:=}"
: "${CONSTRAINT:=}"    # which nodes, as in a100
: "${HOURS:=}"         # whole hours, how long until the job is stopped, saved and queued again; empty: what the partition gives
: "${MEMORY:=}"        # of a node, as in 200G
: "${GPUS_PER_NODE:=}" # as in 4 or a100:4; 0 on a cluster without GPUs. Empty: 1
: "${SIGNAL_LEAD:=}"   # seconds before the end in which a run saves (Slurm may be 60 s early); empty: 180
# Only for `bash slurm/...`: sbatch has no variables for these, so give `sbatch --nodes=2 ...` otherwise.
: "${NODES:=}"         # empty: 1
: "${CPUS_PER_TASK:=}" # CPUs of a node; empty: 8

# --- the run
: "${LAUNCHER:=torchrun}" # torchrun or deepspeed; either takes --deepspeed zero_configs/...
: "${PROCESSES:=}"        # processes a node; empty: one a GPU, without GPUs one
: "${MAX_REQUEUES:=10}"   # how often a job that was stopped or killed is queued again

# --- Python with the packages of requirements.txt, on every node. Add what the cluster needs, for example
#     module load cuda/12.4; conda activate llava; export HF_HOME=/scratch/$USER/hf HF_HUB_OFFLINE=1
prepare_python() {
  [ ! -e "$LLAVA_ROOT/.venv/bin/activate" ] || . "$LLAVA_ROOT/.venv/bin/activate"
}

# --- data and models: folders, files, or names on the Hugging Face hub
: "${OUTPUT_ROOT:=$LLAVA_ROOT/checkpoints}" # trainings write into folders of their own in it
: "${DATA_ROOT:=$LLAVA_ROOT/data}"
: "${VISION_TOWER:=openai/clip-vit-large-patch14-336}"
# pope.sh
: "${MODEL_PATH:=$OUTPUT_ROOT/ha_dpo}" # who is asked, where the command line names no run
: "${MODEL_BASE:=}"                    # what it was trained on, if it does not say so itself or that has moved
: "${COCO_PATH:=$DATA_ROOT/coco2014}"
: "${POPE_PATH:=$DATA_ROOT/POPE}"
# dpo.sh
: "${DPO_MODEL:=liuhaotian/llava-v1.5-7b}"
: "${VG_PATH:=$DATA_ROOT/VG}"
: "${DESC_DATA:=$DATA_ROOT/hadpo/llava-v1.5/desc_data.json}"
: "${POPE_DATA:=$DATA_ROOT/hadpo/llava-v1.5/pope_data.json}"
# pretrain.sh, finetune.sh
: "${LANGUAGE_MODEL:=lmsys/vicuna-7b-v1.5}"
: "${PRETRAIN_DATA:=$DATA_ROOT/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
: "${PRETRAIN_IMAGES:=$DATA_ROOT/LLaVA-Pretrain/images}"
: "${FINETUNE_DATA:=$DATA_ROOT/LLaVA-Instruct/llava_v1_5_mix665k.json}"
: "${FINETUNE_IMAGES:=$DATA_ROOT/LLaVA-Instruct}"

# --- for sbatch; what you have exported yourself is kept
[ -z "$PARTITION" ] || export SBATCH_PARTITION="${SBATCH_PARTITION:-$PARTITION}"
[ -z "$ACCOUNT" ] || export SBATCH_ACCOUNT="${SBATCH_ACCOUNT:-$ACCOUNT}"
[ -z "$QOS" ] || export SBATCH_QOS="${SBATCH_QOS:-$QOS}"
[ -z "$CONSTRAINT" ] || export SBATCH_CONSTRAINT="${SBATCH_CONSTRAINT:-$CONSTRAINT}"
[ -z "$HOURS" ] || export SBATCH_TIMELIMIT="${SBATCH_TIMELIMIT:-$HOURS:00:00}"
[ -z "$MEMORY" ] || export SBATCH_MEM_PER_NODE="${SBATCH_MEM_PER_NODE:-$MEMORY}"
[ -z "$GPUS_PER_NODE" ] || export SBATCH_GPUS_PER_NODE="${SBATCH_GPUS_PER_NODE:-$GPUS_PER_NODE}"
[ -z "$SIGNAL_LEAD" ] || export SBATCH_SIGNAL="${SBATCH_SIGNAL:-B:USR2@$SIGNAL_LEAD}"
export LLAVA_SETTINGS=taken # tells the job that its submission has seen them
