from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.data.order import PADDING_ROW, SampleOrder, SequentialOrder


def epoch(order, number):
    return [order[position] for position in range(number * order.epoch_length, (number + 1) * order.epoch_length)]


@given(st.integers(1, 50), st.integers(0, 2**31), st.integers(0, 5))
def test_an_epoch_is_a_permutation(size, seed, number):
    assert sorted(epoch(SampleOrder([size], [1.0], seed, shuffle=True), number)) == list(range(size))


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    order = SampleOrder([100], [1.0], 1, shuffle=True)
    first, second = epoch(order, 0), epoch(order, 1)
    assert first != second
    assert epoch(order, 0) == first  # going back is no different
    assert epoch(SampleOrder([100], [1.0], 1, shuffle=True), 1) == second
    assert epoch(SampleOrder([100], [1.0], 2, shuffle=True), 0) != first


def test_the_order_of_a_seed_stays_what_it_is():
    """A change here changes what every recipe trains on: resumed runs would see rows twice or never."""
    order = SampleOrder([6, 4], [1.0, 0.5], 1234, shuffle=True)
    assert epoch(order, 0) == [0, 1, 3, 5, 6, 2, 9, 4]


def test_weights_are_passes_over_a_dataset():
    order = SampleOrder([4, 10, 3], [1.0, 0.5, 2.0], 0, shuffle=True)
    assert order.epoch_length == 4 + 5 + 6
    halves = []
    for number in range(3):
        counts = Counter(epoch(order, number))
        assert all(counts[row] == 1 for row in range(4))
        assert all(counts[row] == 2 for row in range(14, 17))
        halves.append({row for row in range(4, 14) if counts[row]})
        assert all(counts[row] == 1 for row in halves[-1])
    assert {len(half) for half in halves} == {5}
    assert len(set(map(frozenset, halves))) > 1


def test_without_shuffling_rows_come_in_their_order():
    order = SampleOrder([2, 2], [2.5, 1.0], 0, shuffle=False)
    rows = epoch(order, 0)
    assert rows[:4] == [0, 1, 0, 1]
    assert rows[4] in (0, 1)
    assert rows[5:] == [2, 3]


def test_steps_follow_one_another_across_epochs():
    order = SampleOrder([5], [1.0], 0, shuffle=True)
    rows = [row for step in range(1, 6) for row in order.rows_of_step(step, 3)]
    assert rows == epoch(order, 0) + epoch(order, 1) + epoch(order, 2)


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([1], [], "1 sizes but 0 weights"),
        ([1], [0.0], r"weights must be positive, not \[0.0\]"),
        ([1], [0.1], "no rows"),
        ([], [], "no rows"),
    ],
)
def test_an_order_without_rows_is_refused(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder(sizes, weights, 0, shuffle=True)


def test_validation_fills_up_its_last_batch():
    order = SequentialOrder(5)
    assert order.num_steps(4) == 2
    assert order.rows_of_step(1, 4) == [0, 1, 2, 3]
    assert order.rows_of_step(2, 4) == [4, PADDING_ROW, PADDING_ROW, PADDING_ROW]
