import numpy as np
import pytest

from megatron_gkd.data.prompt_frame import Frame
from megatron_gkd.data.sample import IGNORED_LABEL, shift_labels
from megatron_gkd.data.truncation import truncate


def row(*trained):
    """Ids 0, 1, ... of which the given ones are trained on."""
    input_ids = np.arange(10)
    return input_ids, shift_labels(input_ids, np.isin(input_ids, trained))


def test_a_row_that_fits_is_left_alone():
    input_ids, labels = truncate(*row(8, 9), 10, "delete")
    assert input_ids.tolist() == list(range(10))
    assert labels[7:].tolist() == [8, 9, IGNORED_LABEL]


def test_delete():
    assert truncate(*row(8, 9), 9, "delete") is None


def test_left_keeps_the_response():
    input_ids, labels = truncate(*row(8, 9), 4, "left")
    assert input_ids.tolist() == [6, 7, 8, 9]
    assert labels.tolist() == [IGNORED_LABEL, 8, 9, IGNORED_LABEL]


def test_left_truncates_the_end_of_a_response_that_is_too_long_itself():
    input_ids, labels = truncate(*row(5, 6, 7, 8, 9), 4, "left")
    assert input_ids.tolist() == [4, 5, 6, 7]
    assert labels.tolist() == [5, 6, 7, IGNORED_LABEL]


def test_left_removes_earlier_turns_before_the_last_one():
    _, labels = truncate(*row(2, 3, 8, 9), 3, "left")
    assert labels.tolist() == [8, 9, IGNORED_LABEL]


def test_right():
    input_ids, labels = truncate(*row(5, 6, 7, 8, 9), 7, "right")
    assert input_ids.tolist() == list(range(7))
    assert labels[4:].tolist() == [5, 6, IGNORED_LABEL]


@pytest.mark.parametrize(("strategy", "length"), [("right", 5), ("left", 1)])
def test_nothing_of_the_response_may_be_left(strategy, length):
    _, labels = truncate(*row(8, 9), length, strategy)
    assert len(labels) == length
    assert (labels == IGNORED_LABEL).all()


def test_the_row_given_is_not_changed():
    input_ids, labels = row(5, 6, 7)
    before = labels.copy()
    truncate(input_ids, labels, 6, "right")
    np.testing.assert_array_equal(labels, before)


def test_left_keeps_the_frame_of_the_prompt():
    frame = Frame(header=2, footer=2)
    assert truncate(*row(6, 7, 8, 9), 9, "left", frame)[0].tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    ids, labels = truncate(*row(6, 7, 8, 9), 6, "left", frame)
    assert ids.tolist() == [0, 1, 4, 5, 6, 7], "the response loses its end"
    assert labels.tolist() == [-100, -100, -100, 6, 7, -100]


def test_the_token_before_removed_ones_predicts_nothing():
    ids, labels = truncate(*row(1, 2, 3, 6, 7), 8, "left", Frame(header=2))
    assert ids.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert labels.tolist() == [1, -100, -100, 6, 7, -100, -100, -100]
