import numpy as np
import pytest

from megatron_gkd.data.prompt import answered, prompt_of
from megatron_gkd.data.sample import FROM_DATASET, Sample, shift_labels


def sample(trained):
    input_ids = np.arange(10, 10 + len(trained))
    return Sample(input_ids, shift_labels(input_ids, np.array(trained, dtype=bool)), FROM_DATASET, 3)


@pytest.mark.parametrize(
    ("trained", "length"),
    [
        ([0, 0, 0, 1, 1], 3),
        ([0, 1, 1, 0, 0, 1, 1, 1], 5),  # of several turns, the last is answered
        ([0, 1, 1, 0, 1, 0], 4),
        ([0, 0, 0], 3),  # a prompt alone
    ],
)
def test_the_prompt_ends_where_the_last_answer_begins(trained, length):
    assert prompt_of(sample(trained)).tolist() == list(range(10, 10 + length))


def test_an_answered_prompt():
    found = answered(np.array([5, 6, 7]), [1, 2], row_id=9)
    assert found.input_ids.tolist() == [5, 6, 7, 1, 2] and found.input_ids.dtype == np.int64
    assert found.labels.tolist() == [-100, -100, 1, 2, -100]
    assert (found.source, found.row_id) == ("student", 9)
    assert prompt_of(found).tolist() == [5, 6, 7]
    assert (answered(np.array([5]), [1], row_id=9, trained=False).labels == -100).all()
