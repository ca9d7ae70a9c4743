#!/usr/bin/env bash
# guidellm (pip install guidellm) against a running service, without a model hub.
#
#   deploy/loadtest/guidellm.sh [URL] [TOKENIZER_FOLDER] [MORE OPTIONS ...]
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
tokenizer=${2:-$(dirname "$0")/../../models/checkpoints/saccade-12m}
shift $(( $# < 2 ? $# : 2 ))

# Synthetic prompts are counted with the tokenizer of the folder; nothing is looked up elsewhere.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec guidellm benchmark run \
  --target "$url" \
  --processor "$tokenizer" \
  --request-type text_completions \
  --profile constant --rate 2 --max-seconds 30 \
  --data "prompt_tokens=512,output_tokens=64" \
  "$@"
