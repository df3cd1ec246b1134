"""The three passes over logits that make up every loss here, by compiled kernels or in plain torch.

    statistics   one read of both logits: maxima, sums of exponentials, moments   then one collective
    sums         one read: value and slope of the divergence                      then one collective
    gradient     one read, one write                                              no collective

Their numbers are documented in ``csrc/params.h``; ``normalizers`` makes the first pass's whole over the ranks.
MEGATRON_GKD_IMPL chooses: auto (compiled where there are kernels for the tensor, else torch), torch, or compiled (an
error where there are none).
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from megatron_gkd.ops import torch_passes
from megatron_gkd.ops.spec import DivergenceSpec

_CHOICES = ("auto", "torch", "compiled")


def _load(choice: str) -> ModuleType | None:
    """The kernels' module, or None where plain torch serves."""
    if choice not in _CHOICES:
        raise ValueError(f"MEGATRON_GKD_IMPL is {choice!r}; allowed are {', '.join(_CHOICES)}")
    if choice == "torch":
        return None
    try:
        from megatron_gkd import _C
    except ImportError as error:
        how = "build them with: pip install --no-build-isolation -e ."
        if choice == "compiled":
            raise ImportError(
                f"MEGATRON_GKD_IMPL is compiled, but there are no compiled kernels ({error}); {how}"
            ) from error
        warnings.warn(f"no compiled kernels ({error}), so the loss is computed in plain torch; {how}", stacklevel=2)
        return None
    return _C


_kernels = _load(os.environ.get("MEGATRON_GKD_IMPL", "auto"))


def implementation(device: torch.device | str = "cpu") -> str:
    """What serves 16- and 32-bit logits on `device`, in words."""
    device = torch.device(device)
    if not _compiled_for(device):
        return "torch"
    return f"compiled ({_kernels.cpu_capability()})" if device.type == "cpu" else "compiled (CUDA)"


def _compiled_for(device: torch.device) -> bool:
    return _kernels is not None and (device.type == "cpu" or (device.type == "cuda" and _kernels.has_cuda))


def _compiled(logits: Tensor) -> bool:
    return logits.dtype != torch.float64 and _compiled_for(logits.device)


def statistics(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None,
    spec: DivergenceSpec,
    *,
    moments: bool,
    untempered: bool = False,
) -> Tensor:
    """[N, 4 (+ 6 with moments) (+ 1 untempered)] of this rank's V valid columns."""
    if not _compiled(student_NV):
        return torch_passes.statistics(student_NV, teacher_NV, mask_N, spec, moments=moments, untempered=untempered)
    return _kernels.statistics(student_NV, teacher_NV, mask_N, spec.temperature, spec.shard.first, moments, untempered)


def sums(
    student_NV: Tensor, teacher_NV: Tensor, mask_N: Tensor | None, normalizers_N4: Tensor, spec: DivergenceSpec
) -> Tensor:
    """[N, 2]: the sums of values and slopes over this rank's columns."""
    if not _compiled(student_NV):
        return torch_passes.sums(student_NV, teacher_NV, mask_N, normalizers_N4, spec)
    return _kernels.sums(
        student_NV, teacher_NV, mask_N, normalizers_N4, spec.divergence.name, spec.beta, spec.temperature
    )


def gradient(
    out: Tensor,
    student_NV: Tensor,
    teacher_NV: Tensor,
    normalizers_N4: Tensor,
    slope_sum_N: Tensor,
    weight_N: Tensor,
    spec: DivergenceSpec,
    *,
    untempered_2N: Tensor | None = None,
    label_weight_N: Tensor | None = None,
    label_N: Tensor | None = None,
) -> None:
    """Write ∂/∂z_S of sum_n (weight[n] D_n + label_weight[n] CE_n) into `out` [N, >= V], which may be the logits.

    Rows of weight 0 become exactly 0, whatever they held, and so do columns from V on. `label_N` int64 holds columns of
    this shard, -1 for labels of other shards.
    """
    per_row = (normalizers_N4, slope_sum_N, weight_N, untempered_2N, label_weight_N, label_N)
    if not _compiled(student_NV):
        torch_passes.gradient(out, student_NV, teacher_NV, *per_row, spec)
    else:
        _kernels.gradient(out, student_NV, teacher_NV, *per_row, spec.divergence.name, spec.beta, spec.temperature)
