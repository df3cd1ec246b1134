"""The order of rows that come from streams, with sources in memory."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.data.streams.raw_order import CHUNK_ROWS, Place, ReadOrder, read_chunks
from megatron_gkd.errors import UserError


class Numbers:
    """Rows that hold their own number. `reads`: the places from which they were read."""

    def __init__(self, size, name="numbers"):
        self.size, self.name, self.reads = size, name, []

    def read(self, start):
        self.reads.append(start)
        for number in range(start, self.size):
            yield {"number": number}


def chunks_of(sizes, start=None, weights=None, seed=5, buffer_size=7):
    order = ReadOrder(tuple(weights or [1.0] * len(sizes)), seed, buffer_size)
    return read_chunks([Numbers(size) for size in sizes], order, start or [Place()] * len(sizes))


def rows_of(count, *args, **options):
    chunks = chunks_of(*args, **options)
    rows = list(islice(chain.from_iterable(chunk.rows for chunk in chunks), count))
    assert all(row.values["number"] == row.index for row in rows)
    return [(row.source, row.epoch, row.index) for row in rows]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**31))
def test_a_pass_has_every_row_once(size, buffer_size, seed):
    rows = rows_of(3 * size, [size], buffer_size=buffer_size, seed=seed)
    for epoch in range(3):
        of_epoch = rows[epoch * size : (epoch + 1) * size]
        assert {row[1] for row in of_epoch} == {epoch}
        assert sorted(row[2] for row in of_epoch) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**31))
def test_a_row_is_drawn_from_the_buffer(size, buffer_size, seed):
    for position, (_, _, index) in enumerate(rows_of(size, [size], buffer_size=buffer_size, seed=seed)):
        assert abs(position - index) < buffer_size


def test_each_pass_has_an_order_of_its_own_and_permutes_other_rows_together():
    rows = [index for _, _, index in rows_of(200, [100], buffer_size=10)]
    first, second = rows[:100], rows[100:]
    assert first != second
    assert rows != [index for _, _, index in rows_of(200, [100], buffer_size=10, seed=6)]

    def ends_of_blocks(order):
        return {end for end in range(1, 100) if set(order[:end]) == set(range(end))}

    assert not ends_of_blocks(first) <= ends_of_blocks(second)
    assert not ends_of_blocks(second) <= ends_of_blocks(first)


def test_a_buffer_of_twice_the_rows_permutes_all_of_them():
    firsts = {rows_of(1, [20], buffer_size=40, seed=seed)[0][2] for seed in range(200)}
    assert firsts == set(range(20))


def test_without_a_buffer_the_order_is_that_of_the_source():
    assert rows_of(10, [4], buffer_size=None) == [(0, n // 4, n % 4) for n in range(10)]


def test_the_order_of_a_seed_stays_what_it_is():
    """A change here changes what a resumed run trains on."""
    rows = [row[::2] for row in rows_of(12, [8, 3], buffer_size=4, weights=[2.0, 1.0])]
    assert rows == [(0, 0), (1, 0), (0, 1), (0, 3), (1, 1), (0, 5), (0, 2), (1, 2), (0, 4), (0, 7), (1, 0), (0, 6)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.25, 1.0, 3.0])), min_size=1, max_size=3),
    st.one_of(st.none(), st.integers(1, 40)),
    st.integers(0, 12),
)
def test_reading_goes_on_from_any_chunk(sources, buffer_size, done):
    sizes, weights = zip(*sources, strict=True)
    options = dict(buffer_size=buffer_size, weights=weights)
    whole = list(islice(chunks_of(sizes, **options), done + 3))
    rest = list(islice(chunks_of(sizes, start=whole[done].start, **options), 3))
    assert rest == whole[done:]


def test_going_on_reads_no_row_before_the_block():
    source = Numbers(1000)
    order = ReadOrder((1.0,), 5, 100)
    chunk = next(read_chunks([source], order, [Place(0, 960, 960)]))
    assert len(chunk.rows) == CHUNK_ROWS
    assert 860 < source.reads[0] <= 960


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.7, 0.1)])
def test_weights_are_shares_of_the_rows_at_any_time(weights):
    rows = rows_of(500, [5] * len(weights), weights=weights)
    counts = Counter()
    for read, row in enumerate(rows, start=1):
        counts[row[0]] += 1
        for source, weight in enumerate(weights):
            assert abs(counts[source] - read * weight / sum(weights)) <= 1 + 1e-9


def test_a_source_without_rows_ends_the_run():
    with pytest.raises(UserError, match="numbers: yields nothing to train on: it has no rows"):
        next(chunks_of([0]))
