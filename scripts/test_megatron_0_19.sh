#!/usr/bin/env bash
# The layout tests on Megatron-Core 0.19.2, beside the release that is installed: bash scripts/test_megatron_0_19.sh [pytest arguments]
#
# Its metadata requires Python 3.12, but its wheel for 3.11 works; it goes into a folder of its own, which precedes the environment's.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env dev docs
overlay=.venv/megatron-core-0.19.2
if [ ! -d "$overlay/megatron" ]; then
    pip install --quiet --no-deps --ignore-requires-python --target "$overlay" "megatron-core==0.19.2"
fi
export PYTHONPATH="$PWD/$overlay${PYTHONPATH:+:$PYTHONPATH}"
python -c 'import megatron.core as m; assert m.__version__.startswith("0.19.2"), m.__version__'
exec python -m pytest -q tests/training/test_layouts.py tests/models/test_logits_parity.py "$@"
