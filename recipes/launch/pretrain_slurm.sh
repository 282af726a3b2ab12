#!/bin/sh
# Many machines, under Slurm:  sbatch recipes/launch/pretrain_slurm.sh --scale 1e-2
# Set STAGES, DATA, MODEL, TOKENIZER and OUT (on a shared disk) as for pretrain_torchrun.sh; sbatch passes the environment on.
#SBATCH --job-name=axk1-pretrain
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
# SIGTERM five minutes before the end: every process finishes its step, one checkpoint is saved, and the job asks for its next turn.
# torchrun gives its processes 30 seconds for that, then kills: a checkpoint that takes longer is then the last one of --save_steps.
#SBATCH --signal=B:TERM@300
set -eu
: "${STAGES:?a YAML file of stages}" "${DATA:?JSONL files of documents}" "${MODEL:?nano, light, k1 or a folder}"
: "${TOKENIZER:?folder of the tokenizer}" "${OUT:?folder to write to}"
# Ranks x ACCUMULATION share a batch. k1_stages.yaml has 16,777,216 tokens: 512 rows of 32,768, so 32 GPUs x 16 hold one row each at a
# time, 32,768 tokens; without accumulation they would hold 524,288. With --scale, batches shrink, and contexts too: then lower it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_endpoint "$head:29500" -m axk1 pretrain "$STAGES" --data $DATA --model "$MODEL" --tokenizer "$TOKENIZER" \
  --output_dir "$OUT" --bf16 true --recompute selective --save_steps 500 \
  --gradient_accumulation_steps "${ACCUMULATION:-16}" "$@" &
step=$!
trap 'requeue=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
requeue=0
# The first wait ends with the signal, the second with the processes.
wait $step || [ $requeue = 1 ] || exit 1
wait $step || true
if [ $requeue = 1 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
