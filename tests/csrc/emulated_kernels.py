"""The GPU's kernels on a CPU: csrc/cuda compiled by g++ against ``cuda_emulator``, beside the CPU's own kernels.

Mirrors csrc/params.h. Both sets of kernels get the same parameters, so that whatever one writes, the other must write.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of FloatType
ROOT = Path(__file__).parents[2]


def listed_divergences() -> tuple[str, ...]:
    """The names in GKD_DIVERGENCES, which are in the order of DivergenceKind."""
    (entries,) = re.findall(r"#define GKD_DIVERGENCES\(X\)((?:.*\\\n)*.*\n)", (ROOT / "csrc/divergences.h").read_text())
    return tuple(re.findall(r"X\((\w+),", entries))


DIVERGENCES = listed_divergences()
SUMMED = tuple(kind for kind in DIVERGENCES if kind not in ("forward_kl", "reverse_kl"))  # the others need only pass 1

SOURCES = (
    "csrc/cuda/statistics.cu",
    "csrc/cuda/sums.cu",
    "csrc/cuda/gradient.cu",
    "csrc/cuda/gradient_capped.cu",
    "csrc/cuda/softcap.cu",
    "csrc/cuda/cluster_loss.cu",
    "csrc/cpu/kernels_default.cpp",
    "tests/csrc/emulated_kernels.cpp",
)
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi")


class Logits(Structure):
    _fields_ = [
        ("student", c_void_p),
        ("teacher", c_void_p),
        ("student_stride", c_int64),
        ("teacher_stride", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("type", c_int),
        ("has_teacher", c_bool),
    ]

    @classmethod
    def from_tensors(cls, student: Tensor, teacher: Tensor | None) -> Logits:
        strides = student.stride(0), 0 if teacher is None else teacher.stride(0)
        return cls(
            student.data_ptr(),
            address(teacher),
            *strides,
            *student.shape,
            TYPES.index(student.dtype),
            teacher is not None,
        )


class StatisticsParams(Structure):
    _fields_ = [
        ("logits", Logits),
        ("mask", c_void_p),
        ("scale", c_float),
        ("untempered_scale", c_float),
        ("moments", c_bool),
        ("first", c_int64),
        ("out", c_void_p),
    ]


class SumsParams(Structure):
    _fields_ = [
        ("logits", Logits),
        ("mask", c_void_p),
        ("scale", c_float),
        ("normalizers", c_void_p),
        ("kind", c_int),
        ("beta", c_double),
        ("out", c_void_p),
    ]


class GradientParams(Structure):
    _fields_ = [
        ("logits", Logits),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("width", c_int64),
        ("scale", c_float),
        ("inverse_temperature", c_float),
        ("normalizers", c_void_p),
        ("slope_sum", c_void_p),
        ("weight", c_void_p),
        ("kind", c_int),
        ("beta", c_double),
        ("label_weight", c_void_p),
        ("label_shift", c_void_p),
        ("label_bias", c_void_p),
        ("label", c_void_p),
        ("inverse_softcap", c_float),
    ]


class LossParams(Structure):
    _fields_ = [("statistics", StatisticsParams), ("gradient", GradientParams), ("sums", c_void_p)]


class SoftcapParams(Structure):
    _fields_ = [("logits", Logits), ("out", c_void_p), ("out_stride", c_int64), ("cap", c_float)]


PARAMS = {"statistics": StatisticsParams, "sums": SumsParams, "gradient": GradientParams, "softcap": SoftcapParams}


class KernelError(RuntimeError):
    """A kernel did something that CUDA does not allow."""


def build(folder: Path, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile the passes into one library; see `build_library`."""
    return _with_types(build_library(folder / "emulated_kernels.so", SOURCES, extra_flags))


def build_library(target: Path, sources: tuple[str, ...], extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile sources into a library, two compilers at once; skip the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("the GPU's kernels are emulated by way of g++, which is not here")

    def compile_(source: str) -> Path:
        compiled = target.parent / (Path(source).name + ".o")
        include = f"-I{ROOT / 'tests/csrc/cuda_emulator'}"
        _run("g++", *FLAGS, *extra_flags, include, "-x", "c++", "-c", str(ROOT / source), "-o", str(compiled))
        return compiled

    with ThreadPoolExecutor(2) as compilers:
        objects = [str(path) for path in compilers.map(compile_, sources)]
    _run("g++", "-shared", *extra_flags, *objects, "-o", str(target))
    return ctypes.CDLL(str(target))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def _with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    for device in ("cuda", "cpu"):
        for name, params in PARAMS.items():
            function = getattr(library, f"{device}_{name}")
            function.argtypes, function.restype = [POINTER(params)], ctypes.c_char_p
    library.cuda_cluster_loss.argtypes = [POINTER(LossParams)]
    library.cuda_cluster_loss.restype = ctypes.c_char_p
    switches, numbers = ("reverse_threads", "use_clusters"), ("set_compute_capability", "set_multiprocessors")
    for name, argument in [(name, c_bool) for name in switches] + [(name, c_int) for name in numbers]:
        function = getattr(library, name)
        function.argtypes, function.restype = [argument], None
    return library


def check(error: bytes | None) -> None:
    if error is not None:
        raise KernelError(error.decode())


@dataclass(frozen=True)
class Kernels:
    """The passes on one `device`: "cuda", which is emulated, or "cpu". Logits are [N, V]; see csrc/params.h."""

    library: ctypes.CDLL
    device: str

    def _call(self, name: str, params: Structure) -> None:
        check(getattr(self.library, f"{self.device}_{name}")(byref(params)))

    def statistics(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        first: int = 0,
        moments: bool = True,
        untempered: bool = False,
    ) -> Tensor:
        """Return the statistics [N, 4 (10 with moments) (+ 1 untempered)]."""
        columns = (10 if moments else 4) + untempered
        out = torch.full((len(student), columns), -12345.0)
        scales = LOG2_E / temperature, LOG2_E if untempered else 0.0
        params = StatisticsParams(
            Logits.from_tensors(student, teacher), address(mask), *scales, moments, first, out.data_ptr()
        )
        self._call("statistics", params)
        return out

    def student_statistics(self, student: Tensor, *, temperature: float = 1.0) -> Tensor:
        """[N, 4], of the student alone."""
        out = torch.full((len(student), 4), -12345.0)
        logits = Logits.from_tensors(student, None)
        self._call("statistics", StatisticsParams(logits, None, LOG2_E / temperature, LOG2_E, True, 0, out.data_ptr()))
        return out

    def sums(
        self,
        student: Tensor,
        teacher: Tensor,
        normalizers: Tensor,
        *,
        kind: str,
        beta: float = 0.5,
        mask: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return the sums [N, 2]."""
        out = torch.full((len(student), 2), -12345.0)
        params = SumsParams(
            Logits.from_tensors(student, teacher),
            address(mask),
            LOG2_E / temperature,
            normalizers.data_ptr(),
            DIVERGENCES.index(kind),
            beta,
            out.data_ptr(),
        )
        self._call("sums", params)
        return out

    def gradient(
        self,
        out: Tensor,
        student: Tensor,
        teacher: Tensor,
        normalizers: Tensor,
        slope_sum: Tensor,
        weight: Tensor,
        *,
        kind: str,
        beta: float = 0.5,
        temperature: float = 1.0,
        cross_entropy: tuple[Tensor, Tensor, Tensor] | None = None,
        softcap: float | None = None,
    ) -> None:
        """Write the gradient into `out` [N, width].

        `cross_entropy`: weights [N], untempered normalizers [2, N], labels int64 [N].
        """
        label_weight, untempered, label = cross_entropy or (None, None, None)
        shift, bias = (None, None) if untempered is None else untempered
        params = GradientParams(
            Logits.from_tensors(student, teacher),
            out.data_ptr(),
            out.stride(0),
            out.shape[1],
            LOG2_E / temperature,
            1 / temperature,
            normalizers.data_ptr(),
            slope_sum.data_ptr(),
            weight.data_ptr(),
            DIVERGENCES.index(kind),
            beta,
            *(address(x) for x in (label_weight, shift, bias, label)),
            0 if softcap is None else 1 / softcap,
        )
        self._call("gradient", params)

    def cross_entropy_gradient(
        self,
        out: Tensor,
        student: Tensor,
        untempered: Tensor,
        label_weight: Tensor,
        label: Tensor,
        softcap: float | None = None,
    ) -> None:
        """Into `out` [N, width], without a teacher."""
        params = GradientParams(logits=Logits.from_tensors(student, None), out=out.data_ptr(), out_stride=out.stride(0))
        params.width, params.scale, params.inverse_temperature = out.shape[1], 1, 1
        params.kind = DIVERGENCES.index("forward_kl")
        params.label_weight, params.label = label_weight.data_ptr(), label.data_ptr()
        params.label_shift, params.label_bias = (x.data_ptr() for x in untempered)
        params.inverse_softcap = 0 if softcap is None else 1 / softcap
        self._call("gradient", params)

    def softcap(self, out: Tensor, logits: Tensor, cap: float) -> None:
        """Write the bounded logits into `out` [N, V], which may be the logits."""
        self._call("softcap", SoftcapParams(Logits.from_tensors(logits, None), out.data_ptr(), out.stride(0), cap))


def address(x: Tensor | None) -> int | None:
    """Return where a tensor's data begins; None for none."""
    return None if x is None else x.data_ptr()


def normalizers_of(statistics: Tensor) -> Tensor:
    """Return the normalizers [N, 4] of the statistics of a whole vocabulary."""
    maxima, sums = statistics[:, 0:4:2], statistics[:, 1:4:2]
    return torch.stack([torch.where(maxima == -torch.inf, 0, maxima), sums.log2()], -1).flatten(1).contiguous()
