#!/usr/bin/env bash
# To Megatron-LM and back: PP 16 and EP 8, the layout of the report, on 128 or more GPUs: 4 layers a stage, and the head's with 1.
# Neither conversion needs Megatron or a GPU.
set -euo pipefail
MODEL=${1:?usage: megatron.sh MODEL WORK}
WORK=${2:?usage: megatron.sh MODEL WORK}
axk1 convert to-megatron "$MODEL" "$WORK/start" --pp 16 --last-stage-layers 1 --ep 8 --format torch_dist
axk1 convert inspect "$WORK/start"
# Train with your Megatron-LM: --load "$WORK/start" --save "$WORK/trained" --finetune --use-checkpoint-args
# --pipeline-model-parallel-size 16 --decoder-last-pipeline-num-layers 1 --expert-model-parallel-size 8. Run this script again when it is done.
if [ -e "$WORK/trained/latest_checkpointed_iteration.txt" ]; then
  axk1 convert to-hf "$WORK/trained" "$WORK/model" --tokenizer "$MODEL"
  axk1 convert verify "$WORK/trained" "$WORK/model"
fi
