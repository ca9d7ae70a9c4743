#!/usr/bin/env bash
# aiperf (pip install aiperf) against a running service, without a model hub.
#
#   deploy/loadtest/aiperf.sh [URL] [TOKENIZER_FOLDER] [MODEL] [OPTIONS, --request-count 60 ...]
#
# RATE (requests a second, 1) is a variable. No HF_HUB_OFFLINE: with it aiperf does not read folders.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
tokenizer=${2:-$(dirname "$0")/../../models/checkpoints/saccade-12m}
model=${3:-$(basename "$(realpath "$tokenizer")")}
shift $(( $# < 3 ? $# : 3 ))
[ $# -gt 0 ] || set -- --request-count 60

exec aiperf profile \
  --model "$model" \
  --url "$url" \
  --endpoint-type chat --streaming \
  --tokenizer "$(realpath "$tokenizer")" \
  --synthetic-input-tokens-mean 512 --synthetic-input-tokens-stddev 0 \
  --output-tokens-mean 64 --output-tokens-stddev 0 \
  --extra-inputs ignore_eos:true --extra-inputs min_tokens:64 \
  --request-rate "${RATE:-1}" --random-seed 0 \
  --ui simple \
  "$@"
