"""What can't be sampled with is refused by name."""

from __future__ import annotations

import pytest

from megatron_gkd.rollout.base import Completion, RolloutFailed, Sampling, check_completions, check_prompts


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
        ({"min_p": -0.1}, "min_p is -0.1; it must be at least 0 and at most 1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.4}, r"repetition_penalty is 0.4; it must be in \[0.5, 2.0\]"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"stop_token_ids": (3, -1)}, r"stop_token_ids are \(3, -1\)"),
        ({"reserved_ids": (3, -1)}, r"reserved_ids are \(3, -1\)"),
        ({"stop": ("a", "")}, "a text that ends completions is not empty"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_completion_length": 8} | changes)


def test_filters_may_be_off():
    for top_k in (None, 0, 5):
        Sampling(8, temperature=0, top_k=top_k, top_p=1.0)


def test_ids_that_may_not_be_drawn_are_named():
    sampling = Sampling(8, vocab_size=6, reserved_ids=(7, 3, 1))
    assert sampling.excluded_ids(8) == [1, 3, 6, 7]
    assert sampling.num_shared_ids(8) == 6 and sampling.num_shared_ids(5) == 5
    assert Sampling(8).excluded_ids(8) == []


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([2, 6], "drew the token id 6; student and teacher share 0 to 5"),
        ([2, 3, 1], "drew the token id 1, which stands for an image"),
    ],
)
def test_completions_with_other_ids_are_refused(token_ids, message):
    sampling = Sampling(8, vocab_size=6, reserved_ids=(1, 3))
    check_completions([Completion([0, 2, 5], [0.0] * 3, "length", 0)], sampling)
    with pytest.raises(RolloutFailed, match=message):
        check_completions([Completion(token_ids, [0.0] * len(token_ids), "length", 0)], sampling)


def test_every_prompt_has_images_or_none():
    with pytest.raises(ValueError, match="2 prompts and images of 1: each prompt needs its images, or none"):
        check_prompts([[1], [2]], [0, 0], 5, [()])
