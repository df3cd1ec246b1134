#!/usr/bin/env bash
# Sets up .venv with the test extras, then runs ruff and the tests: bash scripts/test.sh [pytest arguments]
#
# Without arguments it runs everything: the whole suite, the loss once more in plain torch, and the compilation of the GPU kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
python -m pytest -q "$@"
if [ $# -eq 0 ]; then
    echo "== The loss in plain torch"
    MEGATRON_GKD_IMPL=torch python -m pytest -q tests/ops tests/training/test_one_process.py
    echo "== The GPU kernels, for three architectures"
    bash scripts/compile_kernels.sh
fi
