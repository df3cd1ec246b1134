from dataclasses import replace

import numpy as np
import pytest

from megatron_gkd.data.prompt import extract_prompt, replace_response
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
def test_the_prompt_ends_where_the_last_response_begins(trained, length):
    assert extract_prompt(sample(trained)).tolist() == list(range(10, 10 + length))


def test_replace_response():
    row = replace(sample([0, 0, 0, 1, 1]), row_id=9, teacher_prompt=np.array([5, 6]), tag="math")
    found = replace_response(row, [1, 2])
    assert found.input_ids.tolist() == [10, 11, 12, 1, 2] and found.input_ids.dtype == np.int64
    assert found.labels.tolist() == [-100, -100, 1, 2, -100]
    assert (found.source, found.row_id, found.tag) == ("student", 9, "math")
    assert found.teacher_prompt.tolist() == [5, 6]
    assert extract_prompt(found).tolist() == [10, 11, 12]
    assert (replace_response(row, [1], trained=False).labels == -100).all()
