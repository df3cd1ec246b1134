"""The passes over logits in plain torch: for fp64, and where no kernels are compiled.

Inputs and outputs are those of the kernels; see ``csrc/params.h``. Shape suffixes: N tokens, n of a block, V valid
columns of this rank's vocabulary shard. Logits are of any float dtype; all else is in fp32 (fp64 for fp64 logits).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_gkd.ops.params import DivergenceRows, LabelRows, Logits
from megatron_gkd.ops.pointwise import pointwise, softcap_slope, weighted
from megatron_gkd.ops.spec import LOG2_E, ShardSpec, accumulate_dtype, round_to

# Rows are taken in blocks, which bounds the temporaries of a pass whatever N is: about 1 MiB each in fp32, so that they
# stay in a CPU's cache, but enough rows of a large vocabulary to keep a GPU busy.
BLOCK_ELEMENTS = 1 << 18
BLOCK_MIN_ROWS = 16


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, width = logits.shape
    step = max(BLOCK_MIN_ROWS, BLOCK_ELEMENTS // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def statistics(logits: Logits, spec: ShardSpec, *, moments: bool, untempered: bool) -> Tensor:
    """Compute ``passes.statistics`` in plain torch."""
    student_NV, teacher_NV, mask_N = logits
    dtype = accumulate_dtype(student_NV.dtype)
    columns = (10 if moments else 4) + untempered
    out = torch.zeros(len(student_NV), columns, dtype=dtype, device=student_NV.device)
    if student_NV.shape[1] == 0:  # all padding: no maximum and no mass
        out[:, [0, 2]] = -torch.inf
    else:
        for block in _blocks(student_NV):
            student_nV, teacher_nV = student_NV[block].to(dtype), teacher_NV[block].to(dtype)
            _write_statistics(out[block], student_nV, teacher_nV, spec, moments)
            if untempered:
                out[block, -1] = _untempered_sum(student_nV, out[block, 0])
    if mask_N is not None:
        nothing = torch.zeros_like(out[0])
        nothing[[1, 3, columns - 1] if untempered else [1, 3]] = 1
        out = torch.where(mask_N[:, None], out, nothing)
    return out


def student_statistics(student_NV: Tensor, spec: ShardSpec) -> Tensor:
    """Compute ``passes.student_statistics`` in plain torch."""
    dtype = accumulate_dtype(student_NV.dtype)
    out = torch.zeros(len(student_NV), 4, dtype=dtype, device=student_NV.device)
    if student_NV.shape[1] == 0:  # all padding: no maximum and no mass
        out[:, 0] = -torch.inf
        return out
    for block in _blocks(student_NV):
        z = student_NV[block].to(dtype)
        maximum = z.amax(-1)
        bits = _shifted(z, maximum) * spec.scale(dtype)
        weights = bits.exp2()
        out[block, 0], out[block, 1] = maximum, weights.sum(-1)
        out[block, 2], out[block, 3] = weighted(weights, bits).sum(-1), _untempered_sum(z, maximum)
    return out


def _untempered_sum(z: Tensor, maximum: Tensor) -> Tensor:
    return (_shifted(z, maximum) * round_to(LOG2_E, z.dtype)).exp2().sum(-1)


def _shifted(z: Tensor, maximum: Tensor) -> Tensor:
    return z - torch.where(maximum == -torch.inf, 0, maximum)[:, None]


def _write_statistics(out: Tensor, student_nV: Tensor, teacher_nV: Tensor, spec: ShardSpec, moments: bool) -> None:
    scale = spec.scale(out.dtype)
    bits, weights, tops = [], [], []
    for model, z in enumerate((student_nV, teacher_nV)):
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
    """Return log-probabilities in nats, [n, V]."""
    return ((z - shift[:, None]) * scale - bias[:, None]) * math.log(2)


def sums(logits: Logits, normalizers_N4: Tensor, spec: ShardSpec) -> Tensor:
    """Compute ``passes.sums`` in plain torch."""
    student_NV, teacher_NV, mask_N = logits
    out = normalizers_N4.new_zeros(len(student_NV), 2)
    scale, terms = spec.scale(out.dtype), pointwise(spec.divergence)
    for block in _blocks(student_NV):
        student_shift, student_bias, teacher_shift, teacher_bias = normalizers_N4[block].unbind(-1)
        a = _log_probs(student_NV[block].to(out.dtype), student_shift, student_bias, scale)
        b = _log_probs(teacher_NV[block].to(out.dtype), teacher_shift, teacher_bias, scale)
        value, slope = terms(a, b, a.exp(), b.exp(), spec.beta)
        out[block, 0], out[block, 1] = value.sum(-1), slope.sum(-1)
    return out if mask_N is None else torch.where(mask_N[:, None], out, 0)


def gradient(out: Tensor, logits: Logits, rows: DivergenceRows, labels: LabelRows | None, spec: ShardSpec) -> None:
    """Compute ``passes.gradient`` in plain torch."""
    student_NV, teacher_NV, _ = logits
    dtype, valid = rows.slope_sum.dtype, student_NV.shape[1]
    scale, terms = spec.scale(dtype), pointwise(spec.divergence)
    for block in _blocks(student_NV):
        z, t = student_NV[block].to(dtype), teacher_NV[block].to(dtype)
        student_shift, student_bias, teacher_shift, teacher_bias = rows.normalizers[block].unbind(-1)
        a, b = _log_probs(z, student_shift, student_bias, scale), _log_probs(t, teacher_shift, teacher_bias, scale)
        p = a.exp()
        _, slope = terms(a, b, p, b.exp(), spec.beta)
        factor = rows.weight[block, None] / spec.temperature
        total = torch.where(factor == 0, 0, (slope - p * rows.slope_sum[block, None]) * factor)
        if labels is not None:
            _add_cross_entropy(total, z, labels, block)
        out[block, :valid] = _before_softcap(total, z, spec.softcap)
    out[:, valid:] = 0


def cross_entropy_gradient(out: Tensor, student_NV: Tensor, labels: LabelRows, softcap: float | None = None) -> None:
    """Compute ``passes.cross_entropy_gradient`` in plain torch."""
    dtype, valid = labels.weight.dtype, student_NV.shape[1]
    for block in _blocks(student_NV):
        z = student_NV[block].to(dtype)
        total = torch.zeros_like(z)
        _add_cross_entropy(total, z, labels, block)
        out[block, :valid] = _before_softcap(total, z, softcap)
    out[:, valid:] = 0


def _add_cross_entropy(total: Tensor, z: Tensor, labels: LabelRows, block: slice) -> None:
    """Add the gradient of the cross-entropy of a block of rows to `total` [n, V]."""
    factor = labels.weight[block, None]
    probabilities = _log_probs(z, labels.normalizers[0, block], labels.normalizers[1, block], LOG2_E).exp()
    total += torch.where(factor == 0, 0, probabilities * factor)
    if z.shape[1]:
        column = labels.column[block, None]
        total.scatter_add_(1, column.clamp(min=0), torch.where(column < 0, 0, -factor))


def _before_softcap(gradient: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """Return the gradient by what the logits were before their softcap."""
    return gradient if softcap is None else gradient * softcap_slope(logits, softcap)


def softcap(logits_NV: Tensor, cap: float) -> None:
    """Compute ``passes.softcap`` in plain torch."""
    for block in _blocks(logits_NV):
        z = logits_NV[block].to(accumulate_dtype(logits_NV.dtype))
        logits_NV[block] = (z / cap).tanh() * cap
