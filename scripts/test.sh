#!/usr/bin/env bash
# Sets up .venv with the test extras, then runs the checks and the tests: bash scripts/test.sh [--quick | pytest arguments]
#
# Without arguments it runs everything: the static checks, the documentation, the whole suite, the job scripts on a Slurm of its own, the
# loss once more in plain torch, and the compilation of the GPU kernels. --quick runs the static checks and a core of the tests. Other arguments are pytest's, after the checks.
# Tests marked vllm run in .venv-vllm, which is made when any of them is chosen.
#
#   MEGATRON_GKD_TEST_WORKERS   processes of pytest-xdist, without arguments or with --quick (one for each core, at most 4)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env dev docs
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cores="$(getconf _NPROCESSORS_ONLN)"
# worksteal: each worker has its share of the tests in their order, for the sake of what fixtures have built, and helps out at the end.
parallel=(-n "${MEGATRON_GKD_TEST_WORKERS:-$((cores < 4 ? cores : 4))}" --dist worksteal)
pytest=(python -m pytest -q -rs) # with the reasons of what is skipped
no_tests=5 # pytest's exit status where none is chosen

quick_tests=(
    tests/test_golden.py tests/ops tests/config tests/data
    "tests/training/test_layouts.py::test_dense[TP2+SPxPP2xCP2-0.5]"
    "tests/training/test_layouts.py::test_mixture_of_experts[TP2+SPxEP2-0.5]"
    "tests/training/test_on_policy.py::test_every_layout_equals_one_process[dense-TP2+SP-0.5-row]"
    "tests/training/checkpointing/test_resume.py::test_the_same_layout_resumes_bit_for_bit[TP2-fp32]"
)

begin() { printf '== %s (after %d s)\n' "$1" "$SECONDS"; }

run_everything() {
    local vllm_log status=0
    # Mostly downloads, while the first tests run.
    vllm_log="$(mktemp)"
    bash scripts/setup_vllm.sh >"$vllm_log" 2>&1 &
    vllm_setup=$!
    trap 'kill $vllm_setup 2>/dev/null || true' EXIT

    begin "Static checks"
    bash scripts/lint.sh
    begin "Documentation"
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
    begin "Tests"
    "${pytest[@]}" -m "not vllm" "${parallel[@]}" --durations=20 --durations-min=5
    begin "Tests with the real vLLM"
    wait "$vllm_setup" || status=$?
    trap - EXIT
    cat "$vllm_log"
    [ $status -eq 0 ] || return $status
    .venv-vllm/bin/python -m pytest -q -rs -m vllm
    begin "Slurm, where it can be installed"
    bash scripts/test_slurm.sh
    begin "The loss in plain torch"
    MEGATRON_GKD_IMPL=torch "${pytest[@]}" "${parallel[@]}" tests/ops tests/training/test_one_process.py
    begin "The GPU kernels, for three architectures"
    bash scripts/compile_kernels.sh
    begin "Done"
}

# Tests marked vllm are run apart, unless the arguments choose tests by marks themselves.
run_chosen() {
    local status=0
    if [[ " $* " == *" -m "* ]]; then
        "${pytest[@]}" "$@"
        return
    fi
    "${pytest[@]}" -m "not vllm" "$@" || status=$?
    [ $status -eq 0 ] || [ $status -eq $no_tests ] || return $status
    if "${pytest[@]}" -m vllm --collect-only "$@" >/dev/null; then
        begin "Tests with the real vLLM"
        bash scripts/setup_vllm.sh
        .venv-vllm/bin/python -m pytest -q -rs -m vllm "$@"
    else
        return $status
    fi
}

if [ $# -eq 0 ]; then
    run_everything
elif [ "$*" = --quick ]; then
    bash scripts/lint.sh
    "${pytest[@]}" -m "not vllm" "${parallel[@]}" "${quick_tests[@]}"
else
    bash scripts/lint.sh
    run_chosen "$@"
fi
