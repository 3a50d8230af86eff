#!/usr/bin/env bash
# Trains one of the demo's style LoRAs on the demo base: ./demo/train-style.sh openmoji|ink
set -euo pipefail
cd "$(dirname "$0")/.."
style=$1
case $style in
  openmoji) license=CC-BY-SA-4.0 ;;
  ink) license=MIT ;;
  *) echo "no such held-out style: $style" >&2 && exit 2 ;;
esac
scumble=.venv/bin/scumble

$scumble train emoji --style "$style" --split train --out "runs/data/$style"
$scumble train lora --base demo/base --data "runs/data/$style" --out "runs/lora/$style" \
  --steps "${STEPS:-1000}" --batch-size 32 --learning-rate "${RATE:-2e-3}" --warmup 20 --min-snr-gamma 5 \
  --rank 8 --feed-forward --checkpoint-every 250 --mixed-precision bf16 --sample-guidance 4 --seed 1 \
  --trigger "$style style" --license "$license" --description "The $style drawing style"

mkdir -p "demo/adapters/lora/$style"
cp runs/lora/"$style"/{pytorch_lora_weights.safetensors,training.json,sample_grid.png} "demo/adapters/lora/$style/"
