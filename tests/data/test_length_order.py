"""Steps of rows of about the same length: the same rows in each epoch, and less padding."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from batching import ONE_RANK
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.data.length_order import LengthGroupedOrder
from megatron_gkd.data.loader import StepLoader
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.sample import Sample

BATCH = 8


class Rows:
    """Rows of random lengths."""

    def __init__(self, count):
        self.lengths = np.random.default_rng(0).integers(2, 200, count)
        self.num_labels = self.lengths - 1
        self.num_patches = np.zeros(count, dtype=np.int64)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, row):
        return Sample(np.full(self.lengths[row], 1), np.full(self.lengths[row], 1), "dataset", row)


def orders(count, seed=3, weights=(1.0,)):
    rows = Rows(count)
    sizes = [count] if len(weights) == 1 else [count // 2, count - count // 2]
    plain = SampleOrder(sizes, list(weights), seed, shuffle=True)
    return rows, plain, LengthGroupedOrder(plain, rows.lengths, seed, BATCH)


@settings(deadline=None)
@given(st.integers(1, 300), st.sampled_from([(1.0,), (2.0, 0.5)]), st.integers(0, 2**31))
def test_each_epoch_has_the_rows_that_it_would_have_anyway(count, weights, seed):
    _, plain, grouped = orders(max(count, 2), seed, weights)
    length = plain.epoch_length
    for epoch in range(4):
        positions = range(epoch * length, (epoch + 1) * length)
        assert Counter(grouped[p] for p in positions) == Counter(plain[p] for p in positions)


def test_the_order_depends_on_the_seed_and_the_position_alone():
    _, _, grouped = orders(100)
    steps = [grouped.rows_of_step(step, BATCH) for step in range(1, 40)]
    assert [grouped.rows_of_step(step, BATCH) for step in range(39, 0, -1)] == steps[::-1]
    assert [orders(100)[2].rows_of_step(step, BATCH) for step in range(1, 40)] == steps
    assert orders(100, seed=4)[2].rows_of_step(1, BATCH) != steps[0]
    with pytest.raises(ValueError, match="grouped for steps of 8 rows, not 4"):
        grouped.rows_of_step(1, 4)


def test_the_order_of_the_steps_is_random():
    rows, _, grouped = orders(1600)
    means = [rows.lengths[grouped.rows_of_step(step, BATCH)].mean() for step in range(1, 201)]
    assert abs(np.corrcoef(means, np.arange(200))[0, 1]) < 0.2
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_rows_of_a_step_have_about_the_same_length():
    rows, plain, grouped = orders(1001)
    spread = {
        order: np.mean([np.ptp(rows.lengths[order.rows_of_step(step, BATCH)]) for step in range(1, 500)])
        for order in (plain, grouped)
    }
    assert spread[plain] > 140 and spread[grouped] < 10


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_microbatches_of_equal_lengths_have_less_padding_and_ranks_equal_work(micro_batch_size):
    """As interleaved pipelines need them: each is padded to the longest of its rank and step."""
    rows, plain, grouped = orders(400)
    padded, longest = {}, {}
    for order in (plain, grouped):
        tokens = []
        for rank in range(2):
            config = replace(
                ONE_RANK,
                global_batch_size=BATCH,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp_size=2,
                equal_lengths=True,
            )
            steps = list(StepLoader(rows, order, config, range(1, 51)))
            tokens.append([sum(one.total_length for one in step) for step in steps])
        padded[order] = np.sum(tokens) - rows.lengths.sum()
        longest[order] = np.max(tokens, axis=0).sum()
    assert padded[grouped] < 0.1 * padded[plain]
    assert longest[grouped] < 0.85 * longest[plain]
