#!/usr/bin/env bash
# Runs the static checks and prints one line for each, with its output if it fails: bash scripts/lint.sh [check ...]
#
# Without arguments it runs all of `checks`. Their settings are in pyproject.toml and .clang-format.
# The tools of the active environment are used; where none is active, .venv is set up.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    # shellcheck source=scripts/setup_env.sh
    source scripts/setup_env.sh
    setup_env dev docs
fi

checks=(ruff-format ruff mypy codespell clang-format shellcheck)

run_check() {
    case "$1" in
        ruff-format) ruff format --check . ;;
        ruff) ruff check . ;;
        mypy) mypy ;;
        codespell) codespell ;;
        clang-format)
            find csrc tests/csrc \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
                xargs -0 clang-format --dry-run -Werror
            ;;
        shellcheck)
            find .ci scripts docs \( -name '*.sh' -o -name '*.sbatch' -o -path .ci/run \) -print0 |
                xargs -0 shellcheck --external-sources
            ;;
        *)
            echo "check = $1: unknown; allowed are ${checks[*]}"
            return 2
            ;;
    esac
}

[ $# -gt 0 ] || set -- "${checks[@]}"
status=0
for check in "$@"; do
    started=$SECONDS
    if output="$(run_check "$check" 2>&1)"; then
        printf 'lint: %-12s passed (%d s)\n' "$check" $((SECONDS - started))
    else
        status=1
        printf '%s\nlint: %-12s FAILED (%d s)\n' "$output" "$check" $((SECONDS - started))
    fi
done
exit $status
