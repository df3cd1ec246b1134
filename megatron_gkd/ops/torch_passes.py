"""The three passes over a block of logits in plain torch: for fp64, and where no kernels are compiled.

What they take and return is what the kernels' ``csrc/params.h`` says. Shape suffixes: N tokens, V valid columns of this
rank's vocabulary shard. Logits are of any float type; all else is in fp32 (fp64 for fp64 logits).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_gkd.ops.pointwise import pointwise, weighted
from megatron_gkd.ops.spec import LOG2_E, DivergenceSpec, accumulate_dtype, round_to

# Rows are taken in blocks, which bounds the temporaries of a pass whatever N is: about 1 MiB each in fp32, so that they
# stay in a CPU's cache, but enough rows of a large vocabulary to keep a GPU busy.
BLOCK_ELEMENTS = 1 << 18
BLOCK_MIN_ROWS = 16


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, width = logits.shape
    step = max(BLOCK_MIN_ROWS, BLOCK_ELEMENTS // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def statistics(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None,
    spec: DivergenceSpec,
    *,
    moments: bool,
    untempered: bool,
) -> Tensor:
    dtype = accumulate_dtype(student_NV.dtype)
    columns = (10 if moments else 4) + untempered
    out = torch.zeros(len(student_NV), columns, dtype=dtype, device=student_NV.device)
    if student_NV.shape[1] == 0:  # all padding: no maximum and no mass
        out[:, [0, 2]] = -torch.inf
    else:
        for block in _blocks(student_NV):
            _statistics_block(out[block], student_NV[block].to(dtype), teacher_NV[block].to(dtype), spec, moments)
            if untempered:
                bits = _shifted(student_NV[block].to(dtype), out[block, 0]) * round_to(LOG2_E, dtype)
                out[block, -1] = bits.exp2().sum(-1)
    if mask_N is not None:
        nothing = torch.zeros_like(out[0])
        nothing[[1, 3, columns - 1] if untempered else [1, 3]] = 1
        out = torch.where(mask_N[:, None], out, nothing)
    return out


def _shifted(z: Tensor, maximum: Tensor) -> Tensor:
    return z - torch.where(maximum == -torch.inf, 0, maximum)[:, None]


def _statistics_block(out: Tensor, student: Tensor, teacher: Tensor, spec: DivergenceSpec, moments: bool) -> None:
    scale = spec.scale(out.dtype)
    bits, weights, tops = [], [], []
    for model, z in enumerate((student, teacher)):
        maximum, top = z.max(-1)
        bits.append(_shifted(z, maximum) * scale)
        weights.append(bits[model].exp2())
        tops.append(top)
        out[:, 2 * model], out[:, 2 * model + 1] = maximum, weights[model].sum(-1)
    if not moments:
        return
    difference = bits[0] - bits[1]
    for model, sign in ((0, 1), (1, -1)):
        first = 4 + 3 * model
        out[:, first] = weighted(weights[model], bits[model]).sum(-1)
        out[:, first + 1] = sign * weighted(weights[model], difference).sum(-1)
        out[:, first + 2] = tops[model] + spec.shard.first


def _log_probs(z: Tensor, shift: Tensor, bias: Tensor, scale: float) -> Tensor:
    """In nats, [n, V]."""
    return ((z - shift[:, None]) * scale - bias[:, None]) * math.log(2)


def sums(
    student_NV: Tensor, teacher_NV: Tensor, mask_N: Tensor | None, normalizers_N4: Tensor, spec: DivergenceSpec
) -> Tensor:
    out = normalizers_N4.new_zeros(len(student_NV), 2)
    scale, divergence = spec.scale(out.dtype), pointwise(spec.divergence, spec.beta)
    for block in _blocks(student_NV):
        student_shift, student_bias, teacher_shift, teacher_bias = normalizers_N4[block].unbind(-1)
        a = _log_probs(student_NV[block].to(out.dtype), student_shift, student_bias, scale)
        b = _log_probs(teacher_NV[block].to(out.dtype), teacher_shift, teacher_bias, scale)
        value, slope = divergence.terms(a, b, a.exp(), b.exp())
        out[block, 0], out[block, 1] = value.sum(-1), slope.sum(-1)
    return out if mask_N is None else torch.where(mask_N[:, None], out, 0)


def gradient(
    out: Tensor,
    student_NV: Tensor,
    teacher_NV: Tensor,
    normalizers_N4: Tensor,
    slope_sum_N: Tensor,
    weight_N: Tensor,
    untempered_2N: Tensor | None,
    label_weight_N: Tensor | None,
    label_N: Tensor | None,
    spec: DivergenceSpec,
) -> None:
    dtype, valid = slope_sum_N.dtype, student_NV.shape[1]
    scale, divergence = spec.scale(dtype), pointwise(spec.divergence, spec.beta)
    for block in _blocks(student_NV):
        z, t = student_NV[block].to(dtype), teacher_NV[block].to(dtype)
        student_shift, student_bias, teacher_shift, teacher_bias = normalizers_N4[block].unbind(-1)
        a, b = _log_probs(z, student_shift, student_bias, scale), _log_probs(t, teacher_shift, teacher_bias, scale)
        p = a.exp()
        _, slope = divergence.terms(a, b, p, b.exp())
        factor = weight_N[block, None] / spec.temperature
        total = torch.where(factor == 0, 0, (slope - p * slope_sum_N[block, None]) * factor)
        if label_weight_N is not None:
            factor = label_weight_N[block, None]
            probabilities = _log_probs(z, untempered_2N[0, block], untempered_2N[1, block], LOG2_E).exp()
            total += torch.where(factor == 0, 0, probabilities * factor)
            column = label_N[block, None]
            if valid:
                total.scatter_add_(1, column.clamp(min=0), torch.where(column < 0, 0, -factor))
        out[block, :valid] = total
    out[:, valid:] = 0
