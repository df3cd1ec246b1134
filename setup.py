"""Builds megatron_gkd._C, the compiled kernels of the loss; the metadata is in pyproject.toml.

    pip install --no-build-isolation -e .      # uses the torch that is installed

    MEGATRON_GKD_CUDA     auto (default): GPU kernels where torch has CUDA and nvcc is found; 1: always; 0: never
    TORCH_CUDA_ARCH_LIST  GPU architectures ("8.0;9.0;10.0"; default: those of the GPUs present)
    MAX_JOBS              compilers that run at once

Without torch or a compiler the package installs all the same and computes in plain torch, slower.
"""

import os
import sys
from pathlib import Path

from setuptools import Command, Extension, setup

CPU_SOURCES = [f"{name}bindings.cpp" for name in ("", "combine_", "loss_", "top_k_")]
CPU_SOURCES += [f"cpu/{name}.cpp" for name in ("combine", "dispatch", "top_k")]
CPU_SOURCES += [f"cpu/{kind}_{isa}.cpp" for kind in ("kernels", "top_k") for isa in ("default", "avx2", "avx512")]
CUDA_NAMES = ("statistics", "sums", "gradient", "gradient_capped", "softcap", "combine", "cluster_loss")
CUDA_NAMES += ("top_k", "top_k_gradient", "top_k_select")
CUDA_SOURCES = [f"cuda/{name}.cu" for name in CUDA_NAMES]
# Infinities and NaN keep their meaning: no -ffast-math.
CPU_FLAGS = ["-O3", "-std=c++20", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
CUDA_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "--expt-extended-lambda"]


def wants_cuda() -> bool:
    """Return whether to build the GPU kernels; see MEGATRON_GKD_CUDA."""
    from torch.utils.cpp_extension import CUDA_HOME
    from torch.version import cuda

    setting = os.environ.get("MEGATRON_GKD_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"MEGATRON_GKD_CUDA = {setting!r}: must be auto, 0 or 1")
    possible = cuda is not None and CUDA_HOME is not None
    if setting == "1" and not possible:
        raise SystemExit(
            f"MEGATRON_GKD_CUDA = 1: needs a torch with CUDA (this one: {cuda}) and nvcc (found: {CUDA_HOME})"
        )
    return setting != "0" and possible


def extension() -> Extension:
    """Return the extension for what this machine can build."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    with_cuda = wants_cuda()
    names = CPU_SOURCES + (CUDA_SOURCES if with_cuda else [])
    return (CUDAExtension if with_cuda else CppExtension)(
        "megatron_gkd._C",
        [str(Path("csrc") / name) for name in names],
        define_macros=[("MEGATRON_GKD_WITH_CUDA", None)] if with_cuda else [],
        extra_compile_args={"cxx": CPU_FLAGS, "nvcc": CUDA_FLAGS} if with_cuda else CPU_FLAGS,
        extra_link_args=["-fopenmp"],
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        py_limited_api=False,
    )


def build_command() -> type[Command]:
    """Return a build_ext that leaves the kernels out where they cannot be built."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if os.environ.get("MEGATRON_GKD_CUDA") == "1":
                    raise
                print(f"megatron_gkd: no compiled kernels, plain torch is used: {error}", file=sys.stderr)

    return Build


try:
    import torch  # noqa: F401
except ImportError:
    print(
        "megatron_gkd: torch is not importable here, so no kernels are compiled and plain torch is used. "
        "Install torch first, then: pip install --no-build-isolation -e .",
        file=sys.stderr,
    )
    setup()
else:
    setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
