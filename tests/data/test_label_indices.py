import numpy as np
import pytest
import torch

from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.microbatch import collate, pad_to, shard_context_parallel
from megatron_gkd.data.sample import FROM_DATASET, IGNORED_LABEL, Sample


def sample(length, trained):
    input_ids = np.arange(100, 100 + length)
    labels = np.full(length, IGNORED_LABEL)
    labels[trained] = input_ids[trained] + 1
    return Sample(input_ids, labels, FROM_DATASET, 0)


SAMPLES = [sample(9, [2, 3, 6]), sample(5, []), sample(11, [0, 4, 5, 9])]


@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("total_length", [None, 60])
def test_indices_of_all_ranks_cover_every_label_once(cp_size, total_length):
    whole = collate(SAMPLES, pad_multiple=2 * cp_size, pad_token_id=0)
    if total_length:
        whole = pad_to(whole, total_length, 0)
    wanted = np.concatenate([s.labels[s.labels != IGNORED_LABEL] for s in SAMPLES])
    assert whole.num_labels == len(wanted) == 7
    seen = []
    for rank in range(cp_size):
        part = shard_context_parallel(whole, rank, cp_size)
        numbers = local_label_indices(part, rank, cp_size)
        labels = part.labels[0][part.labels[0] != IGNORED_LABEL]
        assert torch.equal(torch.from_numpy(wanted)[numbers], labels)
        seen += numbers.tolist()
    assert sorted(seen) == list(range(7))
