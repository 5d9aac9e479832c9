#!/usr/bin/env bash
# Lint, import contract and tests. Arguments go to pytest: bash scripts/test.sh -k tokenizer
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment dev,prepare,tasks
ruff check .
ruff format --check .
lint-imports --no-cache
exec python -m pytest -n "${PYTEST_WORKERS:-2}" "$@"
