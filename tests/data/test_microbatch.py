from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_gkd.data.microbatch import Microbatch, collate, concatenate, pad_to, shard_context_parallel
from megatron_gkd.data.sample import FROM_DATASET, FROM_STUDENT, Sample
from megatron_gkd.runtime.context_parallel import context_parallel_indices

PAD = 99


def sample(*input_ids, source=FROM_DATASET):
    """The second half is trained on."""
    labels = [*input_ids[1:], -100]
    labels[: len(input_ids) // 2] = [-100] * (len(input_ids) // 2)
    return Sample(np.array(input_ids), np.array(labels), source, 0)


@pytest.fixture
def microbatch():
    return collate([sample(1, 2, 3, 4, 5), sample(6, 7, 8, source=FROM_STUDENT)], pad_multiple=4, pad_token_id=PAD)


def test_samples_are_padded_and_concatenated(microbatch):
    assert microbatch.input_ids.tolist() == [[1, 2, 3, 4, 5, PAD, PAD, PAD, 6, 7, 8, PAD]]
    assert microbatch.labels.tolist() == [[-100, -100, 4, 5, -100, -100, -100, -100, -100, 8, -100, -100]]
    assert microbatch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]]
    assert microbatch.padding_mask.tolist() == [[False] * 5 + [True] * 3 + [False] * 3 + [True]]
    assert microbatch.from_dataset.tolist() == [[True] * 8 + [False] * 4]
    assert microbatch.cu_seqlens.tolist() == [0, 8, 12]
    assert (microbatch.max_seqlen, microbatch.num_rows, microbatch.num_labels) == (8, 2, 3)


def test_types(microbatch):
    assert {microbatch.input_ids.dtype, microbatch.labels.dtype, microbatch.position_ids.dtype} == {torch.int64}
    assert {microbatch.padding_mask.dtype, microbatch.from_dataset.dtype} == {torch.bool}
    assert microbatch.cu_seqlens.dtype == torch.int32


def test_context_parallel_shares_make_up_the_whole(microbatch):
    shares = [shard_context_parallel(microbatch, rank, 2) for rank in range(2)]
    assert shares[0].input_ids.tolist() == [[1, 2, PAD, PAD, 6, PAD]]
    assert shares[1].labels.tolist() == [[4, 5, -100, -100, 8, -100]]
    assert sum(len(share.label_positions) for share in shares) == microbatch.num_labels
    for rank, share in enumerate(shares):
        assert torch.equal(share.cu_seqlens, microbatch.cu_seqlens)
        assert (share.max_seqlen, share.num_rows) == (microbatch.max_seqlen, microbatch.num_rows)
        indices = context_parallel_indices(microbatch.cu_seqlens, rank, 2)
        for name in ("input_ids", "labels", "position_ids", "padding_mask", "from_dataset"):
            assert torch.equal(getattr(share, name), getattr(microbatch, name)[:, indices])


def test_one_context_parallel_rank_holds_the_whole(microbatch):
    assert shard_context_parallel(microbatch, 0, 1) is microbatch


def test_moving_to_a_device_moves_every_tensor(microbatch):
    moved = microbatch.to("meta")
    assert {value.device.type for value in vars(moved).values() if torch.is_tensor(value)} == {"meta"}
    assert moved.num_rows == 2


def test_nothing_makes_no_microbatch():
    for samples in ([], [sample()]):
        with pytest.raises(ValueError, match="at least one sample, and every sample at least one token"):
            collate(samples, pad_multiple=1, pad_token_id=PAD)


def test_pad_to_appends_a_sequence_of_padding():
    microbatch = collate([sample(5, 6, 7), sample(8)], pad_multiple=2, pad_token_id=1)
    longer = pad_to(microbatch, 12, pad_token_id=1)
    assert pad_to(microbatch, 6, pad_token_id=1) is microbatch
    assert longer.total_length == longer.input_ids.shape[1] == 12
    assert longer.cu_seqlens.tolist() == [0, 4, 6, 12] and longer.cu_seqlens.dtype == torch.int32
    assert longer.max_seqlen == 6 and longer.num_rows == 2
    assert longer.num_labels == microbatch.num_labels
    assert longer.padding_mask[0, 6:].all() and longer.position_ids[0, 6:].tolist() == [0, 1, 2, 3, 4, 5]


class TestWeights:
    @pytest.fixture
    def weighted(self):
        weights = np.array([0, 0, 0.5, 2, 0], np.float32)
        return collate([replace(sample(1, 2, 3, 4, 5), label_weights=weights), sample(6, 7, 8)], pad_multiple=4)

    def test_they_are_where_the_labels_are(self, weighted, microbatch):
        found = weighted.label_weights
        assert found.dtype == torch.float32 and found.shape == weighted.labels.shape
        assert found.squeeze(0)[weighted.label_positions].tolist() == [0.5, 2, 1]
        assert microbatch.label_weights is None

    def test_context_parallel_ranks_have_those_of_their_labels(self, weighted):
        for rank in range(2):
            share = shard_context_parallel(weighted, rank, 2)
            indices = context_parallel_indices(weighted.cu_seqlens, rank, 2)
            assert torch.equal(share.label_weights, weighted.label_weights[:, indices])

    def test_beside_microbatches_without(self, weighted, microbatch):
        for both in (concatenate([weighted, microbatch]), concatenate([microbatch, weighted])):
            weights = both.label_weights.squeeze(0)[both.label_positions].tolist()
            assert sorted(weights) == [0.5, 1, 1, 1, 1, 2] and both.label_weights.shape == both.labels.shape
        assert concatenate([microbatch, microbatch]).label_weights is None

    def test_padding_and_transport(self, weighted, microbatch):
        longer = pad_to(weighted, 20)
        assert longer.label_weights.shape == longer.labels.shape == (1, 20)
        assert pad_to(microbatch, 20).label_weights is None
        for one in (longer, microbatch):
            back = Microbatch.from_arrays(one.to_arrays())
            assert (back.label_weights is None) == (one.label_weights is None)
        assert torch.equal(Microbatch.from_arrays(longer.to_arrays()).label_weights, longer.label_weights)
