#!/usr/bin/env bash
# Trains a small language model on the documentation of Python's standard library. Run it again to resume, or with flags to
# change it: bash scripts/quickstart.sh --gin.STEPS=2000 --gin.MODEL_DIR=runs/longer
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment
exec python -m t5x_like train --gin_file=runs/quickstart.gin "$@"
