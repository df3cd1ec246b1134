"""Which rows decode together, and where their tokens go."""

from __future__ import annotations

import torch

from megatron_gkd.rollout.megatron.decode_batch import BatchLimits, DecodeBatch, DecodeSequence


def sequence_of(length: int, index: int = 9, num_reserved: int = 10) -> DecodeSequence:
    return DecodeSequence(index, list(range(10 * index, 10 * index + length)), index, num_reserved)


def batch_of(*lengths: int, size: int = 4, max_prompt_tokens: int = 100) -> DecodeBatch:
    batch = DecodeBatch(0, BatchLimits(size, 1000, max_prompt_tokens))
    for i, length in enumerate(lengths):
        batch.admit(sequence_of(length, i))
    return batch


def test_a_batch_has_one_token_of_started_rows_then_whole_prompts_then_padding():
    batch = batch_of(2, 1, 3)
    batch.sequences[0].token_ids = [70, 71]
    batch.sequences[1].token_ids = [80]
    assert batch.num_tokens == 5
    inputs = batch.next_inputs(6, max_position=9, cp_size=2)
    assert inputs.input_ids.tolist() == [[71, 80, 20, 21, 22, 0]]
    assert inputs.position_ids.tolist() == [[3, 1, 0, 1, 2, 0]]
    assert inputs.padding_mask.tolist() == [[False] * 5 + [True]]
    assert inputs.decode_positions.tolist() == [3, 1] and inputs.max_decode_length == 4
    assert inputs.prompt_lengths == [3]
    assert inputs.last_tokens.tolist() == [0, 1, 4]
    assert inputs.total_length == 12 and inputs.max_seqlen == 9


def test_an_empty_batch_gives_padding():
    inputs = batch_of().next_inputs(2, max_position=5, cp_size=1)
    assert inputs.padding_mask.all() and inputs.num_rows == 0
    assert inputs.last_tokens.dtype == inputs.decode_positions.dtype == torch.int64
    assert len(inputs.last_tokens) == len(inputs.decode_positions) == 0


def test_room_is_limited_by_the_rows_and_by_the_padded_prompts_of_one_pass():
    row = sequence_of(6)
    assert batch_of(5, size=2).has_room(row)
    assert not batch_of(5, 5, size=2).has_room(row)
    assert batch_of(5, max_prompt_tokens=12).has_room(row)
    assert not batch_of(5, max_prompt_tokens=11).has_room(row), "padded to 6 tokens each"
    assert batch_of(max_prompt_tokens=3).has_room(row), "a long prompt goes alone"
    started = batch_of(50, max_prompt_tokens=6)
    started.sequences[0].token_ids = [1]
    assert started.has_room(row)


def test_rows_of_the_cache_are_as_long_as_the_longest_sequence_in_progress_needs():
    batch = DecodeBatch(0, BatchLimits(max_rows=99, max_tokens=100, max_prompt_tokens=1000))
    batch.admit(sequence_of(6, 0, num_reserved=250))
    assert batch.cache_shape == (1, 250) and not batch.has_room(sequence_of(1)), "more than the limit goes alone"
    batch.sequences.clear()
    for index, num_reserved in enumerate((50, 40)):
        batch.admit(sequence_of(6, index, num_reserved=num_reserved))
    assert batch.cache_shape == (2, 50) and not batch.has_room(sequence_of(6, 2, num_reserved=1))
    del batch.sequences[0]
    assert batch.has_room(sequence_of(6, 2, num_reserved=40)) and not batch.has_room(sequence_of(6, 2, num_reserved=51))
    batch.admit(sequence_of(6, 2, num_reserved=10))
    assert batch.cache_shape == (2, 50), "there is room"
    del batch.sequences[0]
    for index in range(3, 12):
        assert batch.has_room(sequence_of(6, index, num_reserved=10))
        batch.admit(sequence_of(6, index, num_reserved=10))
    assert batch.cache_shape == (10, 10) and len(batch.sequences) == 10
    assert not batch.has_room(sequence_of(6, 12, num_reserved=10))


def test_a_cache_is_not_copied_for_few_more_rows():
    batch = DecodeBatch(0, BatchLimits(max_rows=99, max_tokens=1010, max_prompt_tokens=1000))
    for index in range(10):
        batch.admit(sequence_of(1, index, num_reserved=101))
    batch.sequences = [sequence_of(1, index, num_reserved=91) for index in range(10)]
    assert not batch.has_room(sequence_of(1, num_reserved=91)), "11 rows of 91 are one more"
    batch.sequences = batch.sequences[1:]
    batch.sequences[:] = [sequence_of(1, index, num_reserved=80) for index in range(10)]
    assert batch.has_room(sequence_of(1, num_reserved=80)), "12 rows of 80 are two more"


def test_the_last_row_moves_into_the_place_of_a_finished_one():
    batch = batch_of(1, 2, 3, 4)
    for row in batch.sequences:
        row.token_ids = [7]
    moves = []
    finished = batch.remove(lambda row: row.index in (0, 2), lambda *move: moves.append(move))
    assert [row.index for row in finished] == [2, 0]
    assert [row.index for row in batch.sequences] == [3, 1]
    assert moves == [(0, 3, 2, 4), (0, 2, 0, 4)]


def test_rows_that_finish_at_the_end_leave_nothing_to_move():
    batch = batch_of(1, 2)
    batch.sequences[1].token_ids = [7]
    assert [row.index for row in batch.remove(lambda row: row.index == 1, None)] == [1]
    assert len(batch.sequences) == 1
