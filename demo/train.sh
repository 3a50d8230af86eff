#!/usr/bin/env bash
# Remakes one of the demo's adapters from the base and the picture packages (npm), measures it and copies it into
# demo/adapters: ./demo/train.sh lora/ink. Without a name: all, a few hours on 2 cores. Runs go on where they stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
scumble=.venv/bin/scumble
all=(lora/openmoji lora/ink textual-inversion/tomato dreambooth/tomato hypernetwork/emoji ip-adapter/emoji controlnet/canny)

# What a fine-tuned base must still know.
class=()
for thing in "a penguin" "an owl" "a cat face" "a red apple" "a pair of glasses" "a sailboat" "a house" "a grinning face"; do
  for style in noto twemoji fluent; do class+=(--class-prompt "$thing, $style style"); done
done

# data NAME OPTIONS…: pictures that are there already stay as they are.
data() {
  local name=$1 && shift
  [[ -f runs/data/$name/metadata.jsonl ]] || $scumble train emoji "$@" --out "runs/data/$name"
}

# train METHOD NAME DATA FILE OPTIONS…: trains, measures, and keeps the adapter with its card and its grids.
train() {
  local method=$1 name=$2 data=$3 file=$4 && shift 4
  local out=runs/$method/$name to=demo/adapters/${method//-/_}/$name
  $scumble train "$method" --base demo/base --data "runs/data/$data" --out "$out" --evaluate \
    --min-snr-gamma 5 --sample-guidance 4 --seed 1 "$@"
  rm -rf "$to" && mkdir -p "$to"
  cp -r "$out"/{"$file",training.json,sample_grid.png,effect_grid.png} "$to/"
}

style() {
  data "$1" --style "$1" --split train
  train lora "$1" "$1" pytorch_lora_weights.safetensors \
    --steps 1000 --batch-size 32 --learning-rate 2e-3 --warmup 20 --rank 8 --feed-forward \
    --convolution --convolution-rank 8 --checkpoint-every 250 \
    --trigger "$1 style" --license "$2" --description "The $1 drawing style"
}

one() {
  case $1 in
    lora/openmoji) style openmoji CC-BY-SA-4.0 ;;
    lora/ink) style ink MIT ;;
    textual-inversion/tomato)
      data tomato --concept tomato --token "<tom>"
      train textual-inversion tomato tomato learned_embeds.safetensors \
        --token "<tom>" --initial-words "red apple" --vectors 2 --steps 400 --batch-size 12 --learning-rate 2e-3 \
        --validation 0 --checkpoint-every 200 --license Apache-2.0 --description "A tomato as a word"
      ;;
    dreambooth/tomato)
      data tomato --concept tomato --token "<tom>"
      train dreambooth tomato tomato model \
        --steps 400 --batch-size 12 --learning-rate 2e-4 --warmup 20 --validation 0 --checkpoint-every 200 \
        --class-pictures 96 "${class[@]}" \
        --save-delta --trigger "<tom>" --license Apache-2.0 --description "A tomato, the whole UNet fine-tuned"
      ;;
    hypernetwork/emoji)
      data gallery --gallery
      train hypernetwork emoji gallery hypernetwork.safetensors \
        --rank 4 --caption "an emoji, {style} style" --steps 2400 --batch-size 32 --learning-rate 1e-3 \
        --warmup 100 --checkpoint-every 400 --validation 0.01 \
        --license Apache-2.0 --description "Predicts a LoRA from one picture, for the demo base"
      ;;
    ip-adapter/emoji)
      data gallery --gallery
      train ip-adapter emoji gallery ip-adapter.safetensors \
        --variant plus --tokens 16 --caption "an emoji, {style} style" --caption-dropout 0.3 \
        --steps 2200 --batch-size 32 --learning-rate 1e-3 --warmup 100 --checkpoint-every 550 --validation 0.01 \
        --license Apache-2.0 --description "Pictures as prompts, for the demo base"
      ;;
    controlnet/canny)
      data gallery --gallery
      train controlnet canny gallery controlnet \
        --hint-channel 16 --hint-channel 32 --hint-channel 64 --hint-channel 96 \
        --steps 2000 --batch-size 32 --learning-rate 5e-4 --warmup 50 --caption-dropout 0.5 \
        --checkpoint-every 500 --validation 0.01 \
        --license Apache-2.0 --description "Outlines as control pictures (Canny edges), for the demo base"
      ;;
    *) echo "no such adapter: $1; there are ${all[*]}" >&2 && exit 2 ;;
  esac
}

for name in "${@:-${all[@]}}"; do one "$name"; done
