"""Prompts alone are used by on-policy rows of a step; the others are drawn from rows with a response."""

from collections import Counter

import numpy as np
import pytest

from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.off_policy_rows import OffPolicyRows
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.errors import UserError

HAS_RESPONSE = np.arange(40) % 4 == 0  # a quarter of the rows
BATCH, STEPS = 8, range(1, 41)


def orders(granularity="row", lmbda=0.5, sizes=(40,), weights=(1.0,), has_response=HAS_RESPONSE):
    plain = SampleOrder(sizes, weights, seed=7, shuffle=True)
    schedule = LambdaSchedule(lmbda, granularity, seed=7)
    return plain, OffPolicyRows(plain, plain, has_response, schedule), schedule


@pytest.mark.parametrize("granularity", ["row", "step"])
def test_only_prompts_alone_that_are_not_sampled_are_replaced(granularity):
    plain, order, schedule = orders(granularity)
    replaced = Counter()
    for step in STEPS:
        is_sampled = schedule.rows(step, BATCH)
        before, after = plain.rows_of_step(step, BATCH), order.rows_of_step(step, BATCH)
        for sampled, old, new in zip(is_sampled, before, after, strict=True):
            assert sampled or HAS_RESPONSE[new]
            if sampled or HAS_RESPONSE[old]:
                assert new == old
            else:
                replaced[new] += 1
    assert set(replaced) == set(np.flatnonzero(HAS_RESPONSE).tolist()), "every row with a response is drawn"


def test_the_rows_of_a_step_do_not_depend_on_the_steps_before():
    _, order, _ = orders()
    all_steps = [order.rows_of_step(step, BATCH) for step in STEPS]
    _, resumed, _ = orders()
    assert [resumed.rows_of_step(step, BATCH) for step in STEPS[20:]] == all_steps[20:]


def test_weights_hold_for_the_rows_that_are_drawn():
    _, order, _ = orders(lmbda=0.0, sizes=(4, 36), weights=(9.0, 1.0))
    drawn = Counter(row for step in range(1, 200) for row in order.rows_of_step(step, BATCH))
    assert 6 < drawn[0] / np.mean([drawn[row] for row in range(4, 40, 4)]) < 13


def test_a_row_that_is_rare_is_found():
    has_response = np.arange(40) == 39
    _, order, _ = orders(lmbda=0.0, has_response=has_response, sizes=(39, 1), weights=(50.0, 1.0))
    assert order.rows_of_step(1, BATCH) == [39] * BATCH
    _, order, _ = orders(lmbda=0.0, has_response=has_response, sizes=(39, 1), weights=(1.0, 0.1))
    assert order.rows_of_step(1, BATCH) == [39] * BATCH, "the epoch has none"


def test_rows_without_any_response_are_an_error():
    message = "distill.lmbda = 0.5: off-policy steps need rows with a response, and data.dataset has none; set "
    with pytest.raises(UserError, match=message):
        orders(has_response=np.zeros(40, dtype=bool))
