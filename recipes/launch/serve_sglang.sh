#!/usr/bin/env bash
# SGLang on two machines of 8 GPUs; the same command on both, with NODE=0 and NODE=1 and the first one's address in HEAD.
set -euo pipefail
MODEL=${1:?usage: serve_sglang.sh MODEL}
NODES=${NODES:-2}
exec python3 -m sglang.launch_server --model-path "$MODEL" --tp-size "${TP:-16}" --ep-size "${EP:-16}" \
  --nnodes "$NODES" --node-rank "${NODE:-0}" --dist-init-addr "${HEAD:-localhost:29501}" \
  --context-length "${CONTEXT:-32768}" --host 0.0.0.0 --port "${PORT:-30000}"
