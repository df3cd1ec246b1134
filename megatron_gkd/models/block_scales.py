"""Dequantize FP8 matrices with a scale for each block of rows and columns, as DeepSeek-V3 has them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_gkd.checkpoint_format.quantization import scale_name
from megatron_gkd.models.lazy_tensor import LazyTensor


class BlockScales:
    """The scales in a checkpoint, each of which is read when its matrix is.

    mcore-bridge would split the scales over the ranks instead, which is wrong where a rank's share of a matrix is no
    multiple of a block, and dequantize by Transformer Engine, which needs a GPU.

    Args:
        block_size: the rows and columns that share a scale.
        dtype: of dequantized matrices.
    """

    def __init__(self, block_size: tuple[int, int], dtype: torch.dtype) -> None:
        self.block_size, self.dtype = block_size, dtype
        self._scales: dict[str, LazyTensor] = {}

    def add(self, name: str, scales: LazyTensor) -> None:
        """Remember the scales of this name."""
        self._scales[name] = scales

    def dequantize(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight of this name in `dtype` if it has scales, else as it is."""
        scales = self._scales.get(scale_name(name))
        return weight if scales is None else dequantize(weight, scales.load(), self.block_size).to(self.dtype)


def dequantize(weight: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Return each number times the scale of its block, in fp32.

    transformers 5.12 takes the size of blocks from the shapes, which is wrong where these are no multiples of it.

    Args:
        weight: FP8 numbers [..., M, N].
        scales: [..., ceil(M / block_size[0]), ceil(N / block_size[1])].
        block_size: rows and columns of a block; the last ones may be smaller.

    Returns:
        [..., M, N].
    """
    rows, columns = weight.shape[-2:]
    by_row = scales.float().repeat_interleave(block_size[0], dim=-2)[..., :rows, :]
    by_number = by_row.repeat_interleave(block_size[1], dim=-1)[..., :columns]
    return by_number * weight.float()
