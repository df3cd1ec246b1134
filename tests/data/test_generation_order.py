"""The rows of steps whose prompts are completed several times: every row of the data once, whoever writes responses."""

import math

import numpy as np
import pytest

from megatron_gkd.data.generation_order import GenerationOrder
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.order import SampleOrder

CASES = [
    (1.0, "step", 1, 2, 4),
    (1.0, "step", 3, 4, 4),
    (0.5, "step", 2, 4, 4),
    (0.5, "row", 1, 2, 6),
    (0.4, "row", 2, 8, 4),
    (0.4, "row", 4, 8, 2),
]


def build(lmbda, granularity, steps, per_prompt, batch, size=23):
    schedule = LambdaSchedule(lmbda, granularity, 5, steps, per_prompt)
    return schedule, GenerationOrder(SampleOrder([size], [1.0], seed=3, shuffle=True), schedule, batch)


def expected_steps(schedule, sequence, batch, num_generations):
    """The same, place by place: per step its rows, and which of them the student generates."""
    position, steps = 0, []
    for generation in range(num_generations):
        step = generation * schedule.steps_per_generation + 1
        by_group = []
        for is_sampled in schedule.groups(step, batch).tolist():
            taken = 1 if is_sampled else schedule.num_generations
            rows = [sequence[position + i] for i in range(taken)]
            by_group.append((rows * (schedule.num_generations // taken), is_sampled))
            position += taken
        places = [(rows[i], is_sampled) for i in range(schedule.num_generations) for rows, is_sampled in by_group]
        steps += [places[i : i + batch] for i in range(0, len(places), batch)]
    return steps, position


@pytest.mark.parametrize("case", CASES)
def test_rows_of_each_step(case):
    schedule, order = build(*case)
    batch, sequence = case[-1], SampleOrder([23], [1.0], seed=3, shuffle=True)
    steps, taken = expected_steps(schedule, sequence, batch, num_generations=6)
    assert len(steps) == 6 * schedule.steps_per_generation
    found = [
        list(zip(order.rows_of_step(step, batch), schedule.rows(step, batch).tolist(), strict=True))
        for step in range(1, len(steps) + 1)
    ]
    assert found == steps
    assert order.count_rows(len(steps)) == taken
    later = build(*case)[1]  # a resumed run starts in the middle
    assert later.rows_of_step(len(steps) - 1, batch) == order.rows_of_step(len(steps) - 1, batch)


def test_the_completions_of_a_prompt_are_spread_over_the_steps():
    _, order = build(1.0, "step", steps=4, per_prompt=4, batch=6)
    steps = [order.rows_of_step(step, 6) for step in range(1, 5)]
    assert steps[0] == steps[1] == steps[2] == steps[3] and len(set(steps[0])) == 6
    _, order = build(1.0, "step", steps=1, per_prompt=4, batch=8)
    assert sorted(order.rows_of_step(1, 8)) == sorted(4 * order.rows_of_step(1, 8)[:2])


def test_an_epoch_has_every_row_once():
    """Whoever writes the responses: a row that the student responds to has all its completions, another is one row."""
    schedule, order = build(0.5, "row", steps=2, per_prompt=4, batch=4, size=50)
    num_steps = next(step for step in range(2, 999, 2) if order.count_rows(step) >= 50)
    trained = []
    for step in range(1, num_steps + 1):
        trained += zip(order.rows_of_step(step, 4), schedule.rows(step, 4).tolist(), strict=True)
    first_epoch = SampleOrder([50], [1.0], seed=3, shuffle=True)
    extra = [first_epoch[position] for position in range(50, int(order.count_rows(num_steps)))]
    for row in set(range(50)) - set(extra):
        sources = [is_sampled for one, is_sampled in trained if one == row]
        assert sources in ([False], [True] * 4)
    assert {source for _, source in trained} == {True, False}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_rows", [0.5, 7, 23, 46.5])
def test_steps_of_epochs(case, num_rows):
    _, order = build(*case)
    steps = order.count_steps(num_rows)
    assert steps == next(step for step in range(1, 1000) if order.count_rows(step) >= num_rows - 1e-9)
    assert build(*case)[1].count_rows(steps) == order.count_rows(steps)


def test_as_many_steps_as_all_completions_need():
    _, order = build(1.0, "step", steps=3, per_prompt=4, batch=4)
    assert order.count_steps(23) == math.ceil(23 * 4 / 4)


def test_another_batch_size_is_an_error():
    with pytest.raises(ValueError, match="global_batch_size is 3; the order has 4"):
        build(1.0, "step", 1, 2, 4)[1].rows_of_step(1, 3)


def test_only_groups_are_drawn():
    schedule, _ = build(0.5, "row", steps=2, per_prompt=4, batch=4)
    assert [len(schedule.groups(step, 4)) for step in (1, 2, 3)] == [2, 2, 2]
    rows = np.concatenate([schedule.rows(1, 4), schedule.rows(2, 4)])
    assert (rows.reshape(4, 2) == schedule.groups(1, 4)).all()
