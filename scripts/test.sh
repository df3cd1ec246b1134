#!/usr/bin/env bash
# Sets up .venv with the test extras, then runs ruff and the tests: bash scripts/test.sh [pytest arguments]
#
# Without arguments it runs everything: the whole suite, the loss once more in plain torch, and the compilation of the GPU kernels.
# Tests marked vllm run in .venv-vllm, which is made when any of them is chosen.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .

# Tests marked vllm are run apart, unless the arguments choose tests by marks themselves.
no_tests=5 # pytest's exit status where none is chosen
status=0
if [[ " $* " == *" -m "* ]]; then
    python -m pytest -q "$@"
else
    python -m pytest -q -m "not vllm" "$@" || status=$?
    [ $status -eq 0 ] || [ $status -eq $no_tests ] || exit $status
    if python -m pytest -q -m vllm --collect-only "$@" >/dev/null; then
        echo "== With the real vLLM"
        bash scripts/setup_vllm.sh
        .venv-vllm/bin/python -m pytest -q -m vllm "$@"
    else
        [ $status -eq 0 ] || exit $status
    fi
fi

if [ $# -eq 0 ]; then
    echo "== The loss in plain torch"
    MEGATRON_GKD_IMPL=torch python -m pytest -q tests/ops tests/training/test_one_process.py
    echo "== The GPU kernels, for three architectures"
    bash scripts/compile_kernels.sh
fi
