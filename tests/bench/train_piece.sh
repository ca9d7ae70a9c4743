#!/usr/bin/env bash
# One piece of the bundled checkpoint's training on a GPU machine; running it again goes on.
#
#   bash tests/bench/train_piece.sh TEXTS RESULTS [PLAN [START]]
#
# TEXTS holds train.tar.xz and val.tar.xz (folders `train` and `val` of .txt files). A new run begins
# from the checkpoint folder START where one is named. The unfinished run's state, or the finished
# checkpoint, is copied to RESULTS in files of at most 16 MiB. The piece takes MINUTES (9.4) of wall
# clock, on all GPUs of the machine.
set -euo pipefail
texts=$1 results=$2 plan=${3:-long} start=${4:-} minutes=${MINUTES:-9.4}
work=build/training
state=$work/state-$plan checkpoint=$work/checkpoint-$plan/saccade-12m
limit=$(awk -v minutes="$minutes" 'BEGIN { printf "%d", 60 * minutes + 20 }')

mkdir -p "$work/text" "$results"
for name in train val; do
  [ -d "$work/text/$name" ] || tar xJf "$texts/$name.tar.xz" -C "$work/text"
done
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader || true
# A piece ends by itself before the limit; the outer one is for a hang.
timeout --signal=INT --kill-after=8 "$limit" python3 -m models.training.train \
  --text "$work/text/train" --val "$work/text/val" --plan "$plan" --minutes "$minutes" \
  ${start:+--start "$start"} \
  --state "$state" --out "$checkpoint" --max-shard-mib 15 2> >(tail -c 4000 >&2) || echo "exit $?"
if [ -e "$checkpoint/config.json" ]; then
  cp "$checkpoint"/*.safetensors "$results"
  tar czf "$results/checkpoint-files.tar.gz" --exclude='*.safetensors' -C "$checkpoint" .
else
  cp "$state"/* "$results"
fi
