#!/usr/bin/env bash
# Sets up .venv with the test extras, then ruff and the whole suite: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
exec python -m pytest -q "$@"
