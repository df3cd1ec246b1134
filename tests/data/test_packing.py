from dataclasses import replace

import pytest
from batching import ONE_RANK
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.data.packing import plan_microbatches

MAX_LENGTH = 64
CONFIG = replace(ONE_RANK, packing=True, max_length=10)


@st.composite
def batches(draw):
    dp_size, multiple = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    micro_batch_size = draw(st.integers(1, 3))
    rows = dp_size * multiple * micro_batch_size * draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, MAX_LENGTH + 8), min_size=rows, max_size=rows))
    return lengths, dict(dp_size=dp_size, microbatch_multiple=multiple, micro_batch_size=micro_batch_size)


@settings(deadline=None)
@given(batches(), st.booleans())
def test_every_row_once_and_every_rank_the_same_number_of_microbatches(batch, packing):
    lengths, layout = batch
    plan = plan_microbatches(lengths, replace(CONFIG, packing=packing, max_length=MAX_LENGTH, **layout))
    assert len(plan) == layout["dp_size"]
    assert len({len(bins) for bins in plan}) == 1
    assert len(plan[0]) % layout["microbatch_multiple"] == 0
    assert sorted(row for bins in plan for bin_ in bins for row in bin_) == list(range(len(lengths)))
    for bin_ in (bin_ for bins in plan for bin_ in bins):
        assert bin_
        if packing:
            assert len(bin_) == 1 or sum(lengths[row] for row in bin_) <= MAX_LENGTH
        else:
            assert len(bin_) == layout["micro_batch_size"]


def plan(lengths, **options):
    return plan_microbatches(lengths, replace(CONFIG, **options))


def test_packing_fills_microbatches():
    assert plan([6, 5, 4, 5]) == [[[0, 2], [1, 3]]]


def test_a_row_that_is_too_long_goes_alone():
    assert plan([3, 14, 7]) == [[[1], [0, 2]]]


def test_bins_are_split_until_every_rank_has_as_many():
    assert plan([2, 2, 2, 2], dp_size=2) == [[[0, 2]], [[1, 3]]]
    assert plan([1, 1, 1, 1], dp_size=2, microbatch_multiple=2) == [[[0], [2]], [[1], [3]]]


def test_ranks_get_about_as_many_tokens():
    lengths = [10, 9, 8, 7, 4, 3, 2, 1]
    for packing in (False, True):
        tokens = [
            sum(lengths[row] for bin_ in bins for row in bin_) for bins in plan(lengths, dp_size=2, packing=packing)
        ]
        assert max(tokens) - min(tokens) <= 4


@pytest.mark.parametrize(
    ("rows", "options", "divisor"),
    [
        (3, dict(dp_size=2), 2),
        (6, dict(dp_size=2, microbatch_multiple=2), 4),
        (6, dict(dp_size=2, packing=False, micro_batch_size=2), 4),
        (0, {}, 1),
    ],
)
def test_rows_that_cannot_be_divided_are_refused(rows, options, divisor):
    with pytest.raises(ValueError, match=f"{rows} rows cannot be divided: not a positive multiple of {divisor}"):
        plan([1] * rows, **options)
