#!/usr/bin/env bash
# Sets up .venv, then distils a small model that solves arithmetic word problems: bash scripts/quickstart.sh [--fresh] [--seeds N]
# The whole experiment, with the students that sample themselves, as it is in the README: bash scripts/quickstart.sh --seeds 3 --on-policy --record
# The same with a student that is its own teacher: bash scripts/quickstart.sh --seeds 3 --self --record
# Adapters (LoRA) against all parameters: bash scripts/quickstart.sh --seeds 3 --lora --record
#
# Two gloo processes with tensor parallelism 2, on CPUs; everything it writes is under runs/quickstart. What is done already is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
# shellcheck disable=SC2119 # no extras
setup_env
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}"
exec python -m quickstart "$@"
