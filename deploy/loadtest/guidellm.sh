#!/usr/bin/env bash
# guidellm (pip install guidellm; 0.8) against a running service, without a model hub.
#
#   deploy/loadtest/guidellm.sh [URL] [TOKENIZER_FOLDER] [MODEL] [MORE OPTIONS ...]
#
# RATE (requests a second, 1) and DURATION (seconds, 30) are variables.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
tokenizer=${2:-$(dirname "$0")/../../models/checkpoints/saccade-12m}
model=${3:-$(basename "$(realpath "$tokenizer")")}
shift $(( $# < 3 ? $# : 3 ))

# Synthetic prompts are counted with the tokenizer of the folder; nothing is looked up elsewhere.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec guidellm run \
  --backend "kind=openai_http,target=$url,model=$model,request_format=/v1/completions" \
  --tokenizer "kind=huggingface_auto,model=$tokenizer" \
  --data "kind=synthetic_text,prompt_tokens=512,output_tokens=64" \
  --profile "kind=constant,rate=${RATE:-1}" \
  --constraint "kind=max_duration,seconds=${DURATION:-30}" \
  --output "kind=console" \
  "$@"
