#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes, without a network: bash scripts/gpu_check.sh OUTDIR [PART ...]
#
# Builds the extension with CUDA, runs a few tests under compute-sanitizer, then the GPU tests, a short training of every kind and the
# benchmarks; then compares the targets. OUTDIR gets summary.txt, a log of every step, and the benchmarks' results. Later steps run
# whatever became of earlier ones; the exit status is 1 where any failed, and 2 where nothing was run.
#
# PART is any of: build, sanitizers, tests, training, benchmarks (these by default), clusters (the tests and the
# benchmarks of the loss again with MEGATRON_GKD_CLUSTER=1), vllm. Without build, the extension has to be there.
#
#   PYTHON                  the interpreter (python3); packages that a chosen part needs and that are missing are named first
#   TORCH_CUDA_ARCH_LIST    what to compile for (the GPU's own architecture)
#   MEGATRON_GKD_GPU_CHECK_SECONDS  for all steps together (570)
#   MEGATRON_GKD_VLLM_PYTHON  for the part vllm, a python with vLLM: the student's weights are sent to a server, over nccl if there are
#                           two GPUs
#   PYTHONPATH              may name a folder with Liger Kernel, TRL and ms-swift, for the benchmarks
set -uo pipefail

# The seconds that each step may take. Those of the default parts add up to less than the deadline.
declare -A limits=([build]=150 [memcheck]=50 [racecheck]=50 [tests]=80 [transfer]=30 [training]=110 [benchmarks]=95 [clusters]=80
    [cluster_benchmarks]=95 [vllm]=240)
declare -A steps=([build]="build" [sanitizers]="memcheck racecheck" [tests]="tests transfer" [training]="training"
    [benchmarks]="benchmarks" [clusters]="clusters cluster_benchmarks" [vllm]="vllm")
# What each part imports; a test compares the lists with the files.
test_packages="torch numpy pytest hypothesis transformers tokenizers httpx"
declare -A packages=(
    [build]="torch setuptools>=77"
    [sanitizers]="$test_packages"
    [tests]="$test_packages safetensors msgspec rich"
    [training]="$test_packages rich yaml megatron.core mcore_bridge datasets peft pydantic pydantic_core safetensors msgspec psutil PIL pyarrow fsspec packaging"
    [benchmarks]="torch numpy rich"
    [clusters]="$test_packages rich"
    [vllm]="torch"
)

usage() {
    echo "usage: bash scripts/gpu_check.sh OUTDIR [build|sanitizers|tests|training|benchmarks|clusters|vllm ...]" >&2
    exit 2
}

[ $# -ge 1 ] || usage
target="$1"
shift
parts=("$@")
[ $# -gt 0 ] || parts=(build sanitizers tests training benchmarks)
for part in "${parts[@]}"; do
    [ -n "${steps[$part]:-}" ] || usage
done
mkdir -p "$target" || exit 2
out="$(cd "$target" && pwd)"
cd "$(dirname "$0")/.." || exit 2
python="${PYTHON:-python3}"
deadline="${MEGATRON_GKD_GPU_CHECK_SECONDS:-570}"

sum=0
for part in "${parts[@]}"; do
    for name in ${steps[$part]}; do sum=$((sum + limits[$name])); done
done
if [ "$sum" -gt "$deadline" ]; then
    echo "${parts[*]}: may take $sum s, more than the $deadline s of MEGATRON_GKD_GPU_CHECK_SECONDS; choose fewer parts, or run them one by one" >&2
    exit 2
fi

find_missing() {
    "$python" - "$@" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

def is_missing(wanted):
    name, _, least = wanted.partition(">=")
    try:
        return find_spec(name) is None or bool(least) and int(version(name).split(".")[0]) < int(least)
    except (ModuleNotFoundError, PackageNotFoundError):
        return True

print(*dict.fromkeys(name for name in sys.argv[1:] if is_missing(name)))
PYTHON
}

# shellcheck disable=SC2046 # names are divided by spaces
missing="$(find_missing $(for part in "${parts[@]}"; do echo "${packages[$part]}"; done))" || exit 2
if [ -n "$missing" ]; then
    echo "'$python' lacks $missing; install them or name another interpreter: PYTHON=... bash scripts/gpu_check.sh $target" >&2
    exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "torch $("$python" -c 'import torch; print(torch.__version__)') sees no CUDA device here; nothing was checked" >&2
    exit 2
fi

export MEGATRON_GKD_CUDA=1
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}"
export MAX_JOBS="${MAX_JOBS:-$(nproc)}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
summary="$out/summary.txt"
failed=0

# report NAME VERDICT [SECONDS LOG]: a line of the summary.
report() { printf '%-12s %-28s %s\n' "$1" "$2" "${3:-}" | tee -a "$summary"; }

# step NAME LOG COMMAND...: adds the command's output to LOG and a line to the summary.
step() {
    local name="$1" log="$2" limit="${limits[$1]}" started="$SECONDS" status verdict
    shift 2
    limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
    if [ "$limit" -le 0 ]; then
        failed=1
        report "$name" "FAILED: no time was left"
        return
    fi
    echo "== $name: $*" | tee -a "$out/$log"
    timeout --kill-after=5 "$limit" "$@" >>"$out/$log" 2>&1
    status=$?
    case $status in
        0) verdict="passed" ;;
        124 | 137) verdict="FAILED: stopped after $limit s" ;;
        *) verdict="FAILED: exit status $status" ;;
    esac
    [ $status -eq 0 ] || failed=1
    report "$name" "$verdict" "$(printf '%4d s   %s' $((SECONDS - started)) "$log")"
    [ $status -eq 0 ] || tail -n 15 "$out/$log"
}

# sanitize TOOL: the small tests that are named for it.
sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        failed=1
        report "$1" "FAILED: compute-sanitizer not found"
        return
    fi
    # The caching allocator would hide an access that is past a tensor's end but inside its block.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" sanitizer.log \
        compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 9 --target-processes all \
        "$python" -m pytest -x -q -m gpu -k sanitizer tests/ops
}

run_part() {
    case $1 in
        build) step build build.log "$python" setup.py build_ext --inplace ;;
        sanitizers)
            sanitize memcheck
            sanitize racecheck
            ;;
        tests)
            step tests tests.log "$python" -m pytest -q -m gpu tests/ops
            step transfer tests.log "$python" -m pytest -q -m gpu tests/rollout/vllm/test_transfer_groups.py
            ;;
        training) step training training.log "$python" -m pytest -q -m gpu tests/training/test_gpu_runs.py ;;
        benchmarks) step benchmarks benchmarks.log "$python" scripts/benchmarks/loss.py --device cuda --output "$out" ;;
        clusters)
            mkdir -p "$out/clusters"
            MEGATRON_GKD_CLUSTER=1 step clusters clusters.log "$python" -m pytest -q -m gpu tests/ops/test_fused_linear.py tests/ops/test_passes.py
            MEGATRON_GKD_CLUSTER=1 step cluster_benchmarks clusters.log "$python" scripts/benchmarks/loss.py --device cuda --output "$out/clusters"
            ;;
        vllm)
            step vllm tests.log "${MEGATRON_GKD_VLLM_PYTHON:-$python}" -m pytest -q -m vllm \
                tests/rollout/vllm/test_server.py -k "Engine or again"
            ;;
    esac
}

rm -f "$out"/{summary.txt,build.log,tests.log,training.log,sanitizer.log,benchmarks.log,clusters.log}
{
    date -u '+%Y-%m-%d %H:%M UTC'
    "$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)'
    git log -1 --format='commit %h %s' 2>/dev/null
} | tee "$summary"
for part in "${parts[@]}"; do run_part "$part"; done
for run in "$out"/loss_*.json; do
    [ ! -e "$run" ] || "$python" scripts/benchmarks/targets.py "$run" | tee -a "$summary"
done
echo "Results are in $out"
exit $failed
