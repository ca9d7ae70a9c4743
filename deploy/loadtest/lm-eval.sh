#!/usr/bin/env bash
# lm-eval (pip install "lm-eval[api]") against a running service, without a model hub.
#
#   deploy/loadtest/lm-eval.sh [URL] [TOKENIZER_FOLDER] [MODEL] [MORE OPTIONS ...]
#
# Log-likelihoods come from batches of token-id prompts with echo. They are those of a dense forward
# pass up to 2,048 tokens (16,384 on a GPU); for longer prompts the service's policy decides, so start
# it with --sparsity-policy dense to compare with other engines. Tasks of the hub need --tasks and a
# filled cache of data sets.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
tokenizer=${2:-models/checkpoints/saccade-12m}
model=${3:-$(basename "$tokenizer")}
shift $(( $# < 3 ? $# : 3 ))

cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
fields=model=$model,base_url=$url/v1/completions,tokenizer=$tokenizer,tokenizer_backend=huggingface
exec lm_eval run \
  --model local-completions \
  --model_args "$fields,tokenized_requests=True,num_concurrent=2" \
  --batch_size 8 \
  --include_path deploy/loadtest/lm_eval_task \
  --tasks saccade_endings \
  "$@"
