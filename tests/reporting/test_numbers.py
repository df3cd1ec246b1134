import pytest

from megatron_gkd.reporting.numbers import format_count, format_rate, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (9_994, "9.99 K"),
        (9_995, "10.0 K"),
        (99_960, "100 K"),
        (999_600, "1.00 M"),
        (1_720_574_976, "1.72 B"),
        (30_532_122_624, "30.5 B"),
        (2.5e15, "2500 T"),
    ],
)
def test_three_digits_and_a_unit(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (99.94, "99.9 s"), (99.96, "1 min 40 s"), (3725, "1 h 2 min")]
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_rates():
    assert format_rate(2400.4, "rows") == "2400 rows/s" and format_rate(0.25, "tensors") == "0.2 tensors/s"
