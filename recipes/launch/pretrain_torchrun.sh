#!/bin/sh
# One machine, one process a GPU. Killed or interrupted: the same command goes on from the last whole checkpoint.
#   STAGES=recipes/k1_stages.yaml DATA=curated.jsonl MODEL=light TOKENIZER=tokenizer OUT=runs/light recipes/launch/pretrain_torchrun.sh
# More flags are passed on: ... pretrain_torchrun.sh --scale 1e-3 --optimizer muon
set -eu
: "${STAGES:?a YAML file of stages}" "${DATA:?JSONL files of documents}" "${MODEL:?nano, light, k1 or a folder}"
: "${TOKENIZER:?folder of the tokenizer}" "${OUT:?folder to write to}"
# GPUs of this machine, or GPUS=2 for as many processes (on a machine without GPUs too: add --use_cpu true --bf16 false).
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
# Ranks x ACCUMULATION share a batch. k1_stages.yaml has 16,777,216 tokens: 512 rows of 32,768, so 8 GPUs x 64 hold one row each at a
# time, 32,768 tokens; without accumulation they would hold 2,097,152. With --scale, batches shrink, and contexts too: then lower it.
exec torchrun --standalone --nproc_per_node "$gpus" -m axk1 pretrain "$STAGES" --data $DATA --model "$MODEL" \
  --tokenizer "$TOKENIZER" --output_dir "$OUT" --bf16 true --recompute selective --save_steps 500 \
  --gradient_accumulation_steps "${ACCUMULATION:-64}" "$@"
