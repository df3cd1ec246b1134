"""The passes over a top-k on the emulated GPU and on the CPU; see ``emulated_kernels`` and csrc/top_k.h."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_bool, c_char_p, c_double, c_float, c_int, c_int64, c_void_p, pointer
from dataclasses import dataclass
from pathlib import Path

import torch
from csrc.emulated_kernels import DIVERGENCES, TYPES, address, build_library, check
from torch import Tensor

SOURCES = (
    "csrc/cuda/top_k.cu",
    "csrc/cuda/top_k_gradient.cu",
    "csrc/cuda/top_k_select.cu",
    "csrc/cpu/top_k_default.cpp",
    "tests/csrc/emulated_top_k.cpp",
)


class Matrix(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("rows", c_int64), ("columns", c_int64), ("type", c_int)]


class Tokens(Structure):
    _fields_ = [
        ("ids", c_void_p),
        ("values", c_void_p),
        ("tail", c_void_p),
        ("k", c_int64),
        ("first", c_int64),
        ("vocabulary", c_int64),
    ]


class Loss(Structure):
    _fields_ = [("kind", c_int), ("beta", c_double), ("temperature", c_double)]


_ARGUMENTS = {
    "select": [POINTER(Matrix), c_int64, c_double, c_int64, c_void_p],
    "merge": [c_void_p, *[c_int64] * 4, c_double, *[c_void_p] * 3],
    "statistics": [POINTER(Matrix), POINTER(Tokens), c_int, c_double, c_void_p, c_void_p],
    "sums": [*map(POINTER, (Matrix, Tokens, Loss)), c_void_p, c_int64, c_int, *[c_void_p] * 4],
    "combine": [c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_float, *[c_void_p] * 5],
    "gradient": [
        *map(POINTER, (Matrix, Tokens, Loss, Matrix)),
        *[c_void_p] * 2,
        c_int64,
        *[c_void_p] * 3,
        c_float,
        *[c_void_p] * 2,
    ],
}


def build(folder: Path) -> ctypes.CDLL:
    """Compile the passes over a top-k into a library of their own; see `build_library`."""
    library = build_library(folder / "emulated_top_k.so", SOURCES)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"top_k_{name}")
        function.argtypes, function.restype = [c_bool, *arguments], c_char_p
    library.reverse_threads.argtypes, library.reverse_threads.restype = [c_bool], None
    return library


@dataclass(frozen=True)
class Problem:
    """Logits of a student, and the tokens and loss that they are compared by. `tail` None: no bucket."""

    student: Tensor
    ids: Tensor
    values: Tensor
    tail: Tensor | None
    kind: str = "generalized_jsd"
    beta: float = 0.3
    temperature: float = 1.0
    labels: Tensor | None = None

    @property
    def columns(self) -> int:
        return 6 if self.labels is not None else 4 if self.tail is not None else 2

    def tokens(self, first: int = 0, vocabulary: int | None = None):
        vocabulary = self.student.shape[1] if vocabulary is None else vocabulary
        pointers = address(self.ids), address(self.values), address(self.tail)
        return pointer(Tokens(*pointers, self.ids.shape[1], first, vocabulary))

    @property
    def loss(self):
        return pointer(Loss(DIVERGENCES.index(self.kind), self.beta, self.temperature))


@dataclass(frozen=True)
class TopKKernels:
    """The passes on one device; `on_gpu`: the emulated one."""

    library: ctypes.CDLL
    on_gpu: bool

    def _call(self, name: str, *arguments) -> None:
        check(getattr(self.library, f"top_k_{name}")(self.on_gpu, *arguments))

    def select(self, logits: Tensor, k: int, temperature: float = 0.0, first: int = 0) -> Tensor:
        """Return candidates, int32 [N, words]; temperature 0: without a tail."""
        out = torch.full((len(logits), 2 * k + 2 * (temperature != 0)), -12345, dtype=torch.int32)
        self._call("select", _matrix(logits), k, temperature, first, address(out))
        return out

    def merge(self, gathered: Tensor, places: int, k: int, temperature: float = 0.0) -> tuple[Tensor, ...]:
        """Return ids and values [N, k], and the tail [N]."""
        ranks, rows, _ = gathered.shape
        ids, values = torch.full((rows, k), -9), torch.full((rows, k), -9.0)
        tail = torch.full((rows,), -9.0) if temperature != 0 else None
        outputs = address(ids), address(values), address(tail)
        self._call("merge", address(gathered), ranks, rows, places, k, temperature or 1.0, *outputs)
        return ids, values, tail

    def statistics(self, problem: Problem) -> Tensor:
        """Return the statistics [N, 2, 4 or 6]."""
        out = torch.full((len(problem.student), problem.columns), -12345.0)
        options = problem.columns, problem.temperature, address(problem.labels)
        self._call("statistics", _matrix(problem.student), problem.tokens(), *options, address(out))
        return out

    def sums(self, problem: Problem, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalizers [N, 8], sums [N, 7] and cross-entropies [N]."""
        rows = len(problem.student)
        outputs = torch.full((rows, 8), -9.0), torch.full((rows, 7), -9.0), torch.full((rows,), -9.0)
        addresses = [address(x) for x in outputs]
        if problem.labels is None:
            addresses[2] = None
        inputs = _matrix(problem.student), problem.tokens(), problem.loss, address(statistics), 1, problem.columns
        self._call("sums", *inputs, address(problem.labels), *addresses)
        return outputs

    def combine(
        self,
        sums: Tensor,
        cross_entropy: Tensor | None,
        weight: Tensor,
        labels: Tensor | None,
        label_weight: Tensor | None,
        factor: float,
    ) -> tuple[Tensor, ...]:
        """Return metrics [N, 7]; losses, slope sums, scaled weights and scaled label weights [N] of sums [R, N, 7]."""
        ranks, rows, width = sums.shape
        outputs = torch.full((rows, width), -9.0), *(torch.full((rows,), -9.0) for _ in range(4))
        addresses = [address(x) for x in outputs]
        if label_weight is None:
            addresses[-1] = None
        inputs = cross_entropy, weight, labels, label_weight
        self._call("combine", address(sums), ranks, rows, *map(address, inputs), factor, *addresses)
        return outputs

    def gradient(
        self,
        out: Tensor,
        problem: Problem,
        normalizers: Tensor,
        sums: Tensor,
        weight: Tensor,
        label_weight: Tensor | None = None,
        softcap: float = 0.0,
    ) -> None:
        """Write the gradient into `out` [N, width]."""
        work = torch.full((len(out), 9), -9.0), torch.full(problem.ids.shape, -9.0)
        slope_sum = sums[:, 1]
        self._call(
            "gradient",
            _matrix(problem.student),
            problem.tokens(),
            problem.loss,
            _matrix(out),
            address(normalizers),
            address(slope_sum),
            slope_sum.stride(0),
            address(weight),
            address(label_weight),
            address(problem.labels),
            softcap,
            *map(address, work),
        )


def _matrix(x: Tensor):
    return pointer(Matrix(x.data_ptr(), x.stride(0), *x.shape, TYPES.index(x.dtype)))
