# Sourced by the scripts beside this file, in a job or by hand: reads env.sh; by hand, submits the script and ends.

trap '' USR1 USR2 # they mean "save and leave"; until job.py listens, there is nothing to save

die() {
  echo "error: $*" >&2
  exit 2
}

settings=${LLAVA_SETTINGS:-}
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  command -v sbatch >/dev/null || die "there is no Slurm on this machine; python slurm/submit.py --local runs here"
  options=("--output=$LLAVA_ROOT/slurm/logs/%x-%j.log")
  [[ -z $NODES ]] || options+=("--nodes=$NODES")
  [[ -z $CPUS_PER_TASK ]] || options+=("--cpus-per-task=$CPUS_PER_TASK")
  exec sbatch "${options[@]}" "$0" "$@"
fi

# differs NAME SETTING GOT: notes where the job has another than env.sh says (one or several, with commas)
differs() { [[ -z $2 || ",$2," == *",$3,"* ]] || others+=("$1 ${3:-none} and not $2"); }
others=()
differs partition "$PARTITION" "${SLURM_JOB_PARTITION:-}"
differs account "$ACCOUNT" "${SLURM_JOB_ACCOUNT:-}"
differs QOS "$QOS" "${SLURM_JOB_QOS:-}"
differs nodes: "$NODES" "${SLURM_JOB_NUM_NODES:-1}"
differs "CPUs a node:" "$CPUS_PER_TASK" "${SLURM_CPUS_PER_TASK:-1}"
differs "GPUs a node:" "${GPUS_PER_NODE##*:}" "${SLURM_GPUS_ON_NODE:-0}"
if [[ -z $settings && ${#others[@]} -gt 0 ]]; then
  printf -v text '%s, ' "${others[@]}"
  echo "note: the job has ${text%, }: sbatch does not read slurm/env.sh; bash in its place submits with it" >&2
fi

set +u # what other programs bring to be sourced is rarely made for it
prepare_python
set -u
command -v python >/dev/null || die "no python in this job; name yours in prepare_python in $LLAVA_ROOT/slurm/env.sh"
python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' ||
  die "$(command -v python) has no torch; name the Python that has it in prepare_python in $LLAVA_ROOT/slurm/env.sh"

# accumulation N ARGS...: how many batches a process adds up, so that a step has as many records as the recipe's on N GPUs
accumulation() {
  local recipe=$1 node=${PROCESSES:-${SLURM_GPUS_ON_NODE:-0}}
  [[ $node =~ ^[0-9]+$ ]] || die "PROCESSES=$PROCESSES: expected a number"
  local processes=$((${SLURM_JOB_NUM_NODES:-1} * (node > 0 ? node : 1)))
  shift
  if [[ " $* " == *" --gradient"[-_]"accumulation"[-_]"steps"* ]]; then
    echo 1 # the one in ARGS overrides it
  elif ((recipe % processes)); then
    die "$processes processes cannot share the batch of a recipe for $recipe GPUs; pass --per_device_train_batch_size" \
      "and --gradient_accumulation_steps"
  else
    echo $((recipe / processes))
  fi
}

# run SCRIPT ARGS...: job.py takes the place of this shell, so that Slurm's signal reaches it
run() {
  local options=(--launcher "$LAUNCHER" --max-requeues "$MAX_REQUEUES")
  [[ -z $PROCESSES ]] || options+=(--processes "$PROCESSES")
  exec python "$LLAVA_ROOT/slurm/job.py" "${options[@]}" -- "$@"
}
