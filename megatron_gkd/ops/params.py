"""The arguments of the passes, which ``csrc/params.h`` mirrors.

Shape suffixes: N tokens, V valid columns of this rank's vocabulary shard.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Logits(NamedTuple):
    """Hold the logits of both models, over this rank's valid columns.

    Attributes:
        student: [N, V].
        teacher: [N, V], of the same dtype.
        mask: bool [N], False for rows that are not read; None if all rows are.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor | None = None


class DivergenceRows(NamedTuple):
    """Hold what the gradient of the divergence needs of each token, in the dtype of the statistics.

    Attributes:
        normalizers: [N, 4], from ``Normalizers.packed``.
        slope_sum: [N], over the whole vocabulary, in the unit of the implementation that computed it.
        weight: [N], the gradient of the loss by each token's divergence.
    """

    normalizers: Tensor
    slope_sum: Tensor
    weight: Tensor


class LabelRows(NamedTuple):
    """Hold what the gradient of the cross-entropy needs of each token, in the dtype of the statistics.

    Attributes:
        normalizers: [2, N], shift and bias of the student at temperature 1.
        weight: [N], the gradient of the loss by each token's cross-entropy.
        column: int64 [N], this shard's column of the label; -1 where another rank has it.
    """

    normalizers: Tensor
    weight: Tensor
    column: Tensor
