"""Random numbers of draws: each (seed, position, place) has one of its own, made by hashing the three.

Neither the layout nor the rest of the batch changes it. A place below `FIRST_BLOCK_PLACE` is a token id.

Shape suffixes: n rows, p places.
"""

from __future__ import annotations

from torch import Tensor

FIRST_BLOCK_PLACE = 2**40
"""The place of the first block of token ids; no vocabulary has as many ids."""

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants (Steele, Lea and Flood 2014), as int64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def gumbel_noise(seeds_n: Tensor, positions_n: Tensor, places: Tensor) -> Tensor:
    """Return standard Gumbel noise, fp64 [n, p], of the places [p], or [n, p] where rows have places of their own.

    Row i is SplitMix64's stream of a key made of its seed and position.
    """
    keys_n = _mix(_mix(seeds_n + _GOLDEN) + (positions_n + 1) * _GOLDEN)
    # 52 bits and a half, so that neither 0 nor 1 comes out.
    uniform_np = (_shift_right(_mix(keys_n[:, None] + (places + 1) * _GOLDEN), 12).double() + 0.5) * 2.0**-52
    return -(-uniform_np.log()).log()


def fold_to_int64(seed: int) -> int:
    """Return any integer folded into the range of an int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer; int64 products wrap around."""
    x = (x ^ _shift_right(x, 30)) * _FACTORS[0]
    x = (x ^ _shift_right(x, 27)) * _FACTORS[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift an int64 as if it were unsigned: zeros come in from the left."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
