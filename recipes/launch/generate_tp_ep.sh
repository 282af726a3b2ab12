#!/usr/bin/env bash
# K1 in bf16 on 8 GPUs of 180 GB: heads and dense matrices split by 8, 24 of 192 experts a GPU (131.5 GB of weights each).
# On 16 GPUs of 80 or 141 GB over two machines: NODES=2 TP=16 EP=16 (66.8 GB each), the same command on both machines.
# In 4 bits on 8 GPUs of 48 GB: FOUR_BIT=1 (38.2 GB of weights each, 5.5 of them beside the experts).
set -euo pipefail
MODEL=${1:?usage: generate_tp_ep.sh MODEL PROMPT}
PROMPT=${2:?usage: generate_tp_ep.sh MODEL PROMPT}
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
  -m recipes.generate_sharded "$MODEL" --tp "${TP:-8}" --ep "${EP:-8}" ${FOUR_BIT:+--four-bit} --prompt "$PROMPT" --think
