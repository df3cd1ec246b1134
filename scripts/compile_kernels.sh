#!/usr/bin/env bash
# Compiles every GPU kernel for sm_80, sm_90 and sm_100, and prints the registers and instructions of each:
#   bash scripts/compile_kernels.sh [--update]
# Fails for a compiler's warning, a register spill, a stack frame, and where a kernel takes over 5 % more instructions
# than scripts/benchmarks/results/kernel_instructions.json has for it; --update writes that file. Needs nvcc, but no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v nvcc >/dev/null; then
  echo "compile_kernels: skipped: nvcc not found"
  exit 0
fi
nvcc --version | tail -n 2 | head -n 1

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT

compile() { # source architecture
  local report
  report="$reports/$(basename "$1" .cu).$2"
  nvcc -O3 -std=c++20 --expt-relaxed-constexpr --expt-extended-lambda -Werror all-warnings -Xptxas -v \
    -arch="sm_$2" -c -o "$report.o" "$1" 2>"$report.txt" || { cat "$report.txt" >&2 && return 1; }
}
export -f compile
export reports

# shellcheck disable=SC2016 # bash -c expands $0 and $1
for source in csrc/cuda/*.cu; do
  for architecture in 80 90 100; do echo "$source $architecture"; done
done | xargs -P 2 -L 1 bash -c 'compile "$0" "$1"'

python3 scripts/kernel_resources.py "$reports"/*.txt
python3 scripts/kernel_instructions.py "$@" "$reports"/*.o
