"""The kernels of the loss on the meta device: they allocate what the compiled ones do, and compute nothing.

Matrix products stay those of torch, so that their FLOPs are counted. The products that are added to the gradient's
buffer need no memory of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_gkd.ops import add_product, passes
from megatron_gkd.ops.topk_rows import NUM_NORMALIZERS, NUM_SUMS
from megatron_gkd.runtime.meter import record_flops


class _Kernels:
    """The functions of the compiled module, with its arguments."""

    has_cuda = True

    @staticmethod
    def statistics(student: Tensor, teacher: Tensor, mask: Any, temperature: float, first: int, *which: bool) -> Tensor:
        """See ``passes.statistics``."""
        moments, untempered = which
        return student.new_empty(len(student), (10 if moments else 4) + untempered, dtype=torch.float32)

    @staticmethod
    def student_statistics(student: Tensor, temperature: float) -> Tensor:
        """See ``passes.student_statistics``."""
        return student.new_empty(len(student), 4, dtype=torch.float32)

    @staticmethod
    def token_statistics(
        student: Tensor, teacher: Tensor | None, mask: Any, labels: Tensor | None, *rest: Any
    ) -> Tensor:
        """See ``combine.token_statistics``."""
        columns = 4 if teacher is None else (10 if rest[-1] else 4) + (labels is not None)
        return student.new_empty(len(student) * (columns + (labels is not None)), dtype=torch.float32)

    @staticmethod
    def combine_statistics(
        gathered: Tensor,
        rows: int,
        has_teacher: bool,
        moments: bool,
        mask: Any,
        labels: Tensor | None,
        token_weights: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor | None, ...]:
        """See ``combine.combine_statistics``."""
        new = gathered.new_empty
        is_kl = rest[3] in ("forward_kl", "reverse_kl")
        of_labels = (None, None, None) if labels is None else (new(2, rows), new(rows), new(rows, dtype=torch.int64))
        normalizers, slope_sum = new(rows, 4) if has_teacher else None, new(rows) if has_teacher and is_kl else None
        return normalizers, slope_sum, None if token_weights is None else new(rows), *of_labels

    @staticmethod
    def combine_sums(gathered: Tensor, *rest: Any) -> Tensor:
        """See ``combine.combine_sums``."""
        return gathered.new_empty(gathered.shape[1])

    @staticmethod
    def sums(student: Tensor, teacher: Tensor, mask: Any, normalizers: Tensor, *divergence: Any) -> Tensor:
        """See ``passes.sums``."""
        return normalizers.new_empty(len(student), 2)

    @staticmethod
    def gradient(*args: Any) -> None:
        """See ``passes.gradient``, which writes in place."""

    @staticmethod
    def loss(*args: Any) -> None:
        """See ``passes.loss``, which does nothing where rows are not kept on chip; the passes need no less memory."""

    cross_entropy_gradient = softcap = top_k_gradient = gradient
    most_places = 1024

    @staticmethod
    def top_k_select(logits: Tensor, k: int, temperature: float | None, first: int) -> Tensor:
        """See ``topk_passes.select``."""
        return logits.new_empty(len(logits), 2 * k + 2 * (temperature is not None), dtype=torch.int32)

    @staticmethod
    def top_k_merge(gathered: Tensor, places: int, k: int, temperature: float | None) -> tuple[Tensor, Tensor, Any]:
        """See ``topk_passes.merge``."""
        rows = gathered.shape[1]
        values = gathered.new_empty(rows, k, dtype=torch.float32)
        return values.long(), values, None if temperature is None else values.new_empty(rows)

    @staticmethod
    def top_k_statistics(
        student: Tensor, ids: Tensor, labels: Tensor | None, temperature: float, bucket: bool, first: int
    ) -> Tensor:
        """See ``topk_passes.statistics``."""
        return student.new_empty(len(student), 6 if labels is not None else 4 if bucket else 2, dtype=torch.float32)

    @staticmethod
    def top_k_combine(
        sums: Tensor, cross_entropy: Any, weights: Tensor, labels: Any, label_weights: Any, *rest: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """See ``topk_passes.combine``."""
        new = torch.empty_like
        return new(weights), new(weights), None if labels is None else new(weights)

    @staticmethod
    def top_k_sums(
        student: Tensor, ids: Tensor, values: Tensor, tail: Any, gathered: Tensor, labels: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """See ``topk_passes.sums``."""
        rows = len(student)
        cross_entropy = None if labels is None else gathered.new_empty(rows)
        return gathered.new_empty(rows, NUM_NORMALIZERS), gathered.new_empty(rows, NUM_SUMS), cross_entropy


def replace_kernels() -> None:
    """Use these kernels for the rest of the process."""
    passes.kernels_on = _kernels_on
    add_product._method = _method  # type: ignore[assignment]  # without the cache, which has nothing to hold


def _kernels_on(device: torch.device) -> Any:
    return _Kernels


def _method(device: torch.device, operands: torch.dtype, target: torch.dtype) -> Any:
    return _count_product


def _count_product(target: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    record_flops(2.0 * a.shape[0] * a.shape[1] * b.shape[1])
