import pytest
import torch

from megatron_gkd.runtime.context_parallel import context_parallel_indices


def test_zigzag_by_sequence():
    boundaries = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert context_parallel_indices(boundaries, 0, 2).tolist() == [0, 3, 4, 5, 10, 11]
    assert context_parallel_indices(boundaries, 1, 2).tolist() == [1, 2, 6, 7, 8, 9]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_ranks_hold_every_position_once(size):
    boundaries = torch.tensor([0, 12, 24, 60], dtype=torch.int32)
    shares = [context_parallel_indices(boundaries, rank, size) for rank in range(size)]
    assert {len(share) for share in shares} == {60 // size}
    assert torch.cat(shares).sort().values.tolist() == list(range(60))
    assert shares[0].dtype == torch.int64


def test_one_rank_may_hold_an_odd_number():
    assert context_parallel_indices(torch.tensor([0, 3]), 0, 1).tolist() == [0, 1, 2]


def test_a_sequence_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="a sequence of 6 tokens cannot be split into 4 equal chunks"):
        context_parallel_indices(torch.tensor([0, 4, 10]), 0, 2)
