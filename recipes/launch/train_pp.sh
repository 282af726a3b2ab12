#!/usr/bin/env bash
# Continued training on plain text, layers spread over 4 GPUs, 16 micro-batches in torch's 1F1B schedule.
set -euo pipefail
MODEL=${1:?usage: train_pp.sh MODEL TEXT OUT}
TEXT=${2:?usage: train_pp.sh MODEL TEXT OUT}
OUT=${3:?usage: train_pp.sh MODEL TEXT OUT}
exec torchrun --standalone --nproc-per-node "${STAGES:-4}" \
  -m recipes.train_pipeline "$MODEL" "$TEXT" "$OUT" --batch 16 --micro-batches 16 --length 4096
