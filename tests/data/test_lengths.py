import itertools

import numpy as np

from megatron_gkd.data.lengths import Bin, LengthSummary, format_histogram, make_histogram


def test_summary():
    found = LengthSummary.from_lengths(np.arange(1, 102))
    assert found == LengthSummary(1, 51.0, 96.0, 101)
    assert found.text() == "min 1, median 51, 95 % up to 96, max 101"


def test_bins_hold_every_length_once():
    rng = np.random.default_rng(0)
    for most in (1, 5, 10, 11, 4097):
        lengths = rng.integers(1, most + 1, 200)
        bins = make_histogram(lengths)
        assert len(bins) <= 10 and sum(one.rows for one in bins) == 200
        assert bins[0].start == lengths.min() and bins[-1].end == lengths.max()
        assert all(before.end + 1 == after.start for before, after in itertools.pairwise(bins))
        assert [one.rows for one in bins] == [int(((lengths >= b.start) & (lengths <= b.end)).sum()) for b in bins]


def test_text():
    lines = format_histogram([Bin(8, 9, 1), Bin(10, 11, 80), Bin(12, 13, 0)])
    assert lines == ["  8-9   1 #", "10-11  80 " + "#" * 40, "12-13   0"]
