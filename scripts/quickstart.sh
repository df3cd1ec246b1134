#!/usr/bin/env bash
# Sets up .venv, then trains and compares small models that solve arithmetic word problems: bash scripts/quickstart.sh [--fresh]
#
# The experiments of docs/results.md, which take longer:
#   bash scripts/quickstart.sh --experiment --seeds 3 --on-policy --record    # offline, mixed and on-policy students
#   bash scripts/quickstart.sh --experiment --seeds 3 --self --record         # a student that is its own teacher
#   bash scripts/quickstart.sh --experiment --seeds 3 --lora --record         # adapters against all parameters
#   bash scripts/quickstart.sh --images --seeds 3 --record                    # multimodal models that read drawn digits
#
# Two gloo processes on CPUs. Everything is written to runs/quickstart; stages that are done are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
# shellcheck disable=SC2119 # no extras
setup_env
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}"
exec python -m quickstart "$@"
