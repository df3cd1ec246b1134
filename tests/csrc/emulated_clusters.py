"""The kernel that keeps rows on chip, run by the emulator: csrc/cuda/cluster_loss.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch
from csrc.emulated_kernels import DIVERGENCES, LOG2_E, GradientParams, Logits, LossParams, StatisticsParams, check
from torch import Tensor


class Found(NamedTuple):
    """The statistics [N, 10 (+ 1 with labels)], the sums [N, 2]; NaN where the kernel wrote nothing."""

    statistics: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Options:
    """The divergence and its parameters."""

    kind: str
    beta: float = 0.5
    temperature: float = 1.0


def cluster_loss(
    library: ctypes.CDLL,
    out: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    options: Options,
    labels: tuple[Tensor | None, Tensor] | None = None,
) -> Found:
    """Write the gradient into `out` [N, >= V]. `labels`: their weights [N], if any, and columns int64 [N]."""
    logits, temperature = Logits.from_tensors(student, teacher), options.temperature
    found = Found(torch.full((len(out), 10 + (labels is not None)), torch.nan), torch.full((len(out), 2), torch.nan))
    untempered_scale = 0.0 if labels is None else LOG2_E
    statistics = StatisticsParams(
        logits, None, LOG2_E / temperature, untempered_scale, True, 0, found.statistics.data_ptr()
    )
    gradient = GradientParams(logits=logits, out=out.data_ptr(), out_stride=out.stride(0), width=out.shape[1])
    gradient.scale, gradient.inverse_temperature = LOG2_E / temperature, 1 / temperature
    gradient.weight, gradient.kind, gradient.beta = weight.data_ptr(), DIVERGENCES.index(options.kind), options.beta
    if labels is not None and labels[0] is not None:
        gradient.label_weight, gradient.label = (x.data_ptr() for x in labels)
    check(library.cuda_cluster_loss(LossParams(statistics, gradient, found.sums.data_ptr())))
    return found
