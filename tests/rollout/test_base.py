"""What can't be sampled with is refused by name."""

from __future__ import annotations

import pytest

from megatron_gkd.rollout.base import Sampling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_completion_length": 0}, "max_completion_length is 0; it must be at least 1"),
        ({"temperature": -0.5}, r"temperature is -0.5; it must be 0 \(greedy\) or in \[0.01, 1000\]"),
        ({"temperature": 1e-40}, "temperature is 1e-40; it must be 0"),
        ({"temperature": 1e38}, "temperature is 1e.38; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be a positive number, or 0 or None"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop_token_ids": (3, -1)}, r"stop_token_ids are \(3, -1\)"),
        ({"stop": ("a", "")}, "a text that ends completions is not empty"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_completion_length": 8} | changes)


def test_filters_may_be_off():
    for top_k in (None, 0, 5):
        Sampling(8, temperature=0, top_k=top_k, top_p=1.0)
