"""How a language model scales and bounds its logits, from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron_gkd.checkpoint_format.config_values import Config, refuse

_SCALES: dict[str, Callable[[float], float]] = {
    "logits_scaling": lambda divisor: 1 / divisor,
    "logit_scale": lambda factor: factor,
}
_SOFTCAP = "final_logit_softcapping"

HEAD_KEYS = (*_SCALES, _SOFTCAP)
"""The keys that `Family.head_keys` may name: a divisor, a factor, and the bound of the logits."""


@dataclass(frozen=True)
class HeadScaling:
    """What a model makes of the product z of hidden states and LM head: cap tanh(scale z / cap).

    Attributes:
        scale: of all logits.
        softcap: cap, the bound of the logits; None without one.
    """

    scale: float = 1.0
    softcap: float | None = None


def read_head_scaling(config: Config, keys: Iterable[str]) -> HeadScaling:
    """Return how a language model scales and bounds its logits.

    Args:
        config: as transformers completes it: families differ in the values of keys that config.json leaves out.
        keys: those of `HEAD_KEYS` that the family's implementation in transformers reads. Others have no effect there.
    """
    scale, softcap = 1.0, None
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if key == _SOFTCAP:
            softcap = float(value)
        else:
            scale *= _SCALES[key](value)
    return HeadScaling(scale, softcap)


def wrong_head_scaling(config: Config, keys: Iterable[str]) -> Iterator[str]:
    """Yield a line for each of the keys whose value in config.json is no positive number."""
    for key in keys:
        value = config.get(key)
        if value is not None and not (type(value) in (int, float) and 0 < value < float("inf")):
            yield refuse(config, key, "must be a positive number or null")
