#!/usr/bin/env bash
# Checks training on one NVIDIA GPU: installs the extra `gpu`, trains a GPT, a T5 and a mixture of experts for 200 steps each
# with the GPU's kernels, checks that their losses fall, and prints tokens per second and MFU.
#   bash scripts/gpu_smoke.sh [arguments for all runs]
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L 2> /dev/null | grep -q GPU; then
    echo "There is no NVIDIA GPU on this machine (nvidia-smi lists none): nothing was checked." >&2
    exit 2
fi
. scripts/environment.sh
environment gpu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -c 'import pydoc_data.topics as t; print("\n\n".join(t.topics.values()))' > "$work/text.txt"

smoke() {  # smoke NAME ARGUMENT...
    local name=$1
    shift
    echo "== $name"
    t5x_like train "$@" --gin.MODEL_DIR="$work/$name" --gin.STEPS=200 --gin.RunConfig.evaluate_every_steps=200
    python scripts/check_losses.py "$work/$name"
}

smoke nanogpt_char_gpu --gin_file=runs/nanogpt_char_gpu.gin --gin.TEXT_FILES="$work/text.txt" "$@"
smoke t5_tiny --gin_file=runs/t5_tiny.gin --gin.EncoderDecoderConfig.dtype=bfloat16 "$@"
smoke moe_tiny --gin_file=runs/moe_tiny.gin --gin.DecoderConfig.dtype=bfloat16 "$@"
echo "All runs learnt."
