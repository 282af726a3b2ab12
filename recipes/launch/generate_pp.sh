#!/usr/bin/env bash
# A model whose layers are spread over GPUs that share no fast link, one stage after another.
set -euo pipefail
MODEL=${1:?usage: generate_pp.sh MODEL PROMPT}
PROMPT=${2:?usage: generate_pp.sh MODEL PROMPT}
STAGES=${STAGES:-4}
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node $((STAGES / ${NODES:-1})) \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
  -m recipes.generate_sharded "$MODEL" --pp "$STAGES" --prompt "$PROMPT" --think
