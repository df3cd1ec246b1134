import numpy as np
import pytest

from megatron_gkd.data.lambda_schedule import LambdaSchedule


@pytest.mark.parametrize("granularity", ["step", "row"])
@pytest.mark.parametrize("lmbda", [0.0, 0.3, 0.5, 1.0])
def test_the_share_of_rows_is_lmbda(granularity, lmbda):
    schedule = LambdaSchedule(lmbda, granularity, seed=5)
    steps = np.stack([schedule.rows(step, 8) for step in range(1, 2001)])
    assert steps.mean() == pytest.approx(lmbda, abs=0.04 if granularity == "step" else 0.012)
    whole = (steps.all(1) | ~steps.any(1)).all()
    assert whole == (granularity == "step" or lmbda in (0.0, 1.0))
    assert [schedule.any(step, 8) for step in range(1, 51)] == steps[:50].any(1).tolist()


def test_it_is_a_function_of_seed_and_step():
    rows = LambdaSchedule(0.5, "row", seed=1).rows(7, 64)
    assert (LambdaSchedule(0.5, "row", seed=1).rows(7, 64) == rows).all()
    assert (LambdaSchedule(0.5, "row", seed=2).rows(7, 64) != rows).any()
    assert (LambdaSchedule(0.5, "row", seed=1).rows(8, 64) != rows).any()


def test_more_lmbda_only_adds_rows():
    few, many = (LambdaSchedule(lmbda, "row", seed=1).rows(3, 256) for lmbda in (0.2, 0.6))
    assert (few <= many).all() and few.sum() < many.sum()


@pytest.mark.parametrize("granularity", ["step", "row"])
def test_a_generation_is_drawn_as_a_whole(granularity):
    """One draw for all its rows, or one for each, which are those of its first step in a batch as large."""
    schedule = LambdaSchedule(0.5, granularity, seed=5, steps_per_generation=3)
    whole = LambdaSchedule(0.5, granularity, seed=5)
    drawn = []
    for generation in range(20):
        steps = schedule.generation_steps(3 * generation + 2)
        assert steps == range(3 * generation + 1, 3 * generation + 4)
        rows = np.concatenate([schedule.rows(step, 4) for step in steps])
        assert (rows == whole.rows(steps[0], 12)).all()
        drawn.append(rows.mean())
    assert set(drawn) == {0.0, 1.0} if granularity == "step" else len(set(drawn)) > 3
