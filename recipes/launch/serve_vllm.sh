#!/usr/bin/env bash
# vLLM on two machines of 8 GPUs: heads split in a machine, layers over machines, experts whole on their GPUs.
# One machine that holds it: TP=8 PP=1 serve_vllm.sh MODEL. Two: start Ray on both first, then this on one of them.
set -euo pipefail
MODEL=${1:?usage: serve_vllm.sh MODEL}
PP=${PP:-2}
exec vllm serve "$MODEL" --tensor-parallel-size "${TP:-8}" --pipeline-parallel-size "$PP" --enable-expert-parallel \
  --reasoning-parser deepseek_v3 --enable-auto-tool-choice --tool-call-parser hermes \
  --reasoning-config '{"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}' \
  --distributed-executor-backend "$([ "$PP" = 1 ] && echo mp || echo ray)" \
  --max-model-len "${CONTEXT:-32768}" --port "${PORT:-8000}"
