#!/usr/bin/env bash
# Makes .venv, installs the project into it and activates it: source scripts/setup_env.sh; setup_env [extra ...]
#
#   PYTHON                    interpreter of a new .venv, 3.11 or later (python3)
#   MEGATRON_GKD_TORCH        the torch to install (torch==2.13.0)
#   MEGATRON_GKD_TORCH_INDEX  another index than pip's own; without an NVIDIA driver pip's own index is searched for a CPU build
#                             first, then https://download.pytorch.org/whl/cpu
#
#   MEGATRON_GKD_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS   how the kernels are built; see setup.py
#
# It installs again only when pyproject.toml, setup.py, csrc, the extras or one of these settings has changed.

setup_env() {
    local python="${PYTHON:-python3}" torch="${MEGATRON_GKD_TORCH:-torch==2.13.0}" extras stamp wanted
    extras="$(IFS=,; echo "$*")"
    stamp=".venv/.installed${extras:+-${extras//,/-}}"

    if [ ! -x .venv/bin/python ]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "Python 3.11 or later is needed; '$python' is $("$python" --version 2>&1 | head -n 1 || true). Name another: PYTHON=python3.12 bash ..." >&2
            return 1
        fi
        echo "== Making .venv with $("$python" --version)"
        "$python" -m venv .venv || return 1
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate

    wanted="$({
        cat pyproject.toml setup.py scripts/constraints.txt
        find csrc -type f -print0 | sort -z | xargs -0 cat
        echo "$torch ${MEGATRON_GKD_TORCH_INDEX:-} ${MEGATRON_GKD_CUDA:-} ${TORCH_CUDA_ARCH_LIST:-} $extras $PWD"
    } | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    echo "== Installing $torch"
    install_torch "$torch" || return 1
    # Not isolated: the kernels are built against the torch that is installed.
    echo "== Building and installing megatron-gkd${extras:+[$extras]}"
    pip install --quiet "setuptools>=77" ninja || return 1
    pip install --quiet --no-build-isolation --constraint scripts/constraints.txt --editable ".${extras:+[$extras]}" || return 1
    echo "$wanted" >"$stamp"
}

install_torch() {
    local torch="$1" index="${MEGATRON_GKD_TORCH_INDEX:-}"
    if [ -n "$index" ]; then
        pip install --quiet "$torch" --extra-index-url "$index"
    elif command -v nvidia-smi >/dev/null; then
        pip install --quiet "$torch"
    else
        install_cpu_torch "$torch"
    fi
}

# pip's plain answer may be a CUDA build of several gigabytes: a dry run shows what it would install.
install_cpu_torch() {
    local torch="$1" plan
    plan="$(pip install --quiet --dry-run --ignore-installed --no-deps --report - "$torch" 2>/dev/null || true)"
    if grep -Eq '"version": "[^"]*\+cpu"' <<<"$plan"; then
        pip install --quiet "$torch"
    elif ! pip install --quiet "$torch" --index-url https://download.pytorch.org/whl/cpu; then
        echo "No CPU build of $torch could be had from download.pytorch.org; installing pip's own choice" >&2
        pip install --quiet "$torch"
    fi
}
