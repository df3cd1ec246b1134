"""Quantized checkpoints: what config.json says about them, and the numbers in their files.

They are dequantized when they are read: GPT-OSS's four-bit experts (MXFP4) by mcore-bridge, and matrices of FP8 numbers
with one scale for each block of rows and columns in `models/block_scales.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_gkd.checkpoint_format.config_values import Config, allow_only, refuse
from megatron_gkd.checkpoint_format.families.family import Family
from megatron_gkd.checkpoint_format.stored_tensor import Shape, StoredTensor

FP8, MXFP4 = "fp8", "mxfp4"
PACKED_BLOCKS, PACKED_SCALES = "_blocks", "_scales"
"""The last parts of the names of four-bit matrices, two numbers in a byte, and of their scales."""

_KEY = "quantization_config"
_SCALE = "_scale_inv"
_BLOCK_SIZE = (128, 128)
_MATRIX = "F8_E4M3"
_FLOATING = ("BF16", "F16", "F32", "F64")


def quantization_method(config: Config) -> str | None:
    """Return how a supported model's files are quantized: FP8, MXFP4 or None."""
    found = config.get(_KEY)
    return None if found is None else found["quant_method"]


def block_size(config: Config) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale in a supported model's FP8 files, None for other files."""
    if quantization_method(config) != FP8:
        return None
    rows, columns = config[_KEY].get("weight_block_size", _BLOCK_SIZE)
    return rows, columns


def is_scale(name: str) -> bool:
    """Return whether a tensor of this name has the scales of an FP8 matrix."""
    return name.endswith(_SCALE)


def scale_name(name: str) -> str:
    """Return the name of the scales of the FP8 matrix of this name."""
    return name + _SCALE


def unsupported_quantization(config: Config, family: Family) -> Iterator[str]:
    """Yield one line for each content of `quantization_config` that is not dequantized."""
    found = config.get(_KEY)
    if found is None:
        return
    if not isinstance(found, dict) or found.get("quant_method") != family.quantization:
        must = f"null or of quant_method {family.quantization}"
        yield refuse(config, _KEY, f"is not supported; must be {must}")
    elif family.quantization == FP8:
        yield from allow_only(found, activation_scheme="dynamic")
        sizes = found.get("weight_block_size", _BLOCK_SIZE)
        is_pair = isinstance(sizes, list | tuple) and len(sizes) == len(_BLOCK_SIZE)
        if not is_pair or not all(type(size) is int and size > 0 for size in sizes):
            yield refuse(found, "weight_block_size", "is not supported; must be two integers of at least 1")


def wrong_numbers(stored: Mapping[str, StoredTensor], config: Config) -> Iterator[str]:
    """Yield one line for each tensor whose kind of number is not read, and each FP8 matrix without fitting scales."""
    method, blocks = quantization_method(config), block_size(config)
    for name, one in stored.items():
        is_packed = method == MXFP4 and one.dtype == "U8" and name.endswith((PACKED_BLOCKS, PACKED_SCALES))
        if blocks is not None and one.dtype == _MATRIX:
            yield from _wrong_scales(name, stored, blocks)
        elif one.dtype not in _FLOATING and not is_packed:
            yield f"{one.file}: {name} is of type {one.dtype}; must be one of {', '.join(_FLOATING)}"
        elif blocks is not None and is_scale(name):
            matrix = stored.get(name.removesuffix(_SCALE))
            if matrix is None or matrix.dtype != _MATRIX:
                yield f"{one.file}: {name} has scales, but {name.removesuffix(_SCALE)} is no matrix of type {_MATRIX}"


def _wrong_scales(name: str, stored: Mapping[str, StoredTensor], blocks: tuple[int, int]) -> Iterator[str]:
    matrix, scales = stored[name], stored.get(scale_name(name))
    if len(matrix.shape) < len(blocks) or scales is None:
        yield f"{matrix.file}: {name} is of type {_MATRIX}; must be a matrix with scales in {scale_name(name)}"
        return
    *outer, rows, columns = matrix.shape
    expected: Shape = (*outer, -(-rows // blocks[0]), -(-columns // blocks[1]))
    if scales.shape != expected:
        why = f"{name} has the shape {matrix.shape}, and weight_block_size is {list(blocks)}"
        yield f"{scales.file}: {scale_name(name)} has the shape {scales.shape}; must be {expected}, as {why}"
