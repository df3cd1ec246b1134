#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes, without a network: bash scripts/gpu_check.sh OUTDIR
#
# Builds the extension with CUDA, runs the GPU tests, runs a few of them under compute-sanitizer, and the benchmarks; then compares the
# targets. OUTDIR gets summary.txt, a log of every step, and the benchmarks' results. Later steps run whatever became of earlier ones;
# the exit status is 1 where any failed.
#
#   PYTHON                  the interpreter, with torch, setuptools, pytest, hypothesis, transformers, httpx, rich and matplotlib (python3)
#   TORCH_CUDA_ARCH_LIST    what to compile for (the GPU's own architecture)
#   MEGATRON_GKD_VLLM_PYTHON  a python with vLLM: the student's weights are also sent to a server, over nccl if there are two GPUs
#   PYTHONPATH              may name a folder with Liger Kernel, TRL and ms-swift, for the benchmarks
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash scripts/gpu_check.sh OUTDIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out="$(cd "$1" && pwd)"
cd "$(dirname "$0")/.." || exit 2
python="${PYTHON:-python3}"

if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "'$python' has no torch; name one that has: PYTHON=... bash scripts/gpu_check.sh $1" >&2
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
deadline=465 # seconds for all steps together
failed=0

# step NAME SECONDS LOG COMMAND...: adds the command's output to LOG and a line to the summary.
step() {
    local name="$1" limit="$2" log="$3" started="$SECONDS" status verdict
    shift 3
    limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
    if [ "$limit" -le 0 ]; then
        failed=1
        printf '%-12s %s\n' "$name" "FAILED: no time was left" | tee -a "$summary"
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
    printf '%-12s %-28s %4d s   %s\n' "$name" "$verdict" $((SECONDS - started)) "$log" | tee -a "$summary"
    [ $status -eq 0 ] || tail -n 15 "$out/$log"
}

# sanitize TOOL: the small tests that are named for it.
sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        failed=1
        printf '%-12s %s\n' "$1" "FAILED: compute-sanitizer not found" | tee -a "$summary"
        return
    fi
    # The caching allocator would hide an access that is past a tensor's end but inside its block.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" 120 sanitizer.log \
        compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 9 --target-processes all \
        "$python" -m pytest -q -m gpu -k sanitizer tests/ops
}

rm -f "$out"/{summary.txt,build.log,tests.log,sanitizer.log,benchmarks.log}
{
    date -u '+%Y-%m-%d %H:%M UTC'
    "$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)'
    git log -1 --format='commit %h %s' 2>/dev/null
} | tee "$summary"

step build 200 build.log "$python" setup.py build_ext --inplace
step tests 120 tests.log "$python" -m pytest -q -m gpu tests/ops
step transfer 60 tests.log "$python" -m pytest -q -m gpu tests/rollout/vllm/test_transfer_groups.py
step benchmarks 200 benchmarks.log "$python" scripts/benchmarks/loss.py --device cuda --output "$out"
sanitize memcheck
sanitize racecheck
if [ -n "${MEGATRON_GKD_VLLM_PYTHON:-}" ]; then
    step vllm 240 tests.log "$python" -m pytest -q -m vllm tests/rollout/vllm/test_server.py -k "Engine or again"
fi
for run in "$out"/loss_*.json; do
    [ ! -e "$run" ] || "$python" scripts/benchmarks/targets.py "$run" | tee -a "$summary"
done
echo "Results are in $out"
exit $failed
