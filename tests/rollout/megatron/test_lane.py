"""Which rows decode together, and where their tokens go."""

from __future__ import annotations

import torch

from megatron_gkd.rollout.megatron.lane import Lane, Row


def lane_of(*lengths: int, size: int = 4, max_prompt_tokens: int = 100) -> Lane:
    lane = Lane(0, size, max_prompt_tokens)
    lane.rows = [Row(i, list(range(10 * i, 10 * i + length)), seed=i) for i, length in enumerate(lengths)]
    return lane


def test_a_batch_has_one_token_of_started_rows_then_whole_prompts_then_padding():
    lane = lane_of(2, 1, 3)
    lane.rows[0].token_ids = [70, 71]
    lane.rows[1].token_ids = [80]
    assert lane.num_tokens == 5
    batch = lane.next_batch(6, max_position=9, cp_size=2)
    assert batch.input_ids.tolist() == [[71, 80, 20, 21, 22, 0]]
    assert batch.position_ids.tolist() == [[3, 1, 0, 1, 2, 0]]
    assert batch.padding_mask.tolist() == [[False] * 5 + [True]]
    assert batch.decoding.tolist() == [3, 1] and batch.longest == 4
    assert batch.prompt_lengths == [3]
    assert batch.last_tokens.tolist() == [0, 1, 4]
    assert batch.total_length == 12 and batch.max_seqlen == 9


def test_an_empty_lane_gives_padding():
    batch = lane_of().next_batch(2, max_position=5, cp_size=1)
    assert batch.padding_mask.all() and batch.num_rows == 0
    assert batch.last_tokens.dtype == batch.decoding.dtype == torch.int64
    assert len(batch.last_tokens) == len(batch.decoding) == 0


def test_room_ends_with_the_rows_or_with_the_padded_prompts_of_one_pass():
    row = Row(9, [1] * 6, seed=0)
    assert lane_of(5, size=2).has_room(row)
    assert not lane_of(5, 5, size=2).has_room(row)
    assert lane_of(5, max_prompt_tokens=12).has_room(row)
    assert not lane_of(5, max_prompt_tokens=11).has_room(row), "padded to 6 tokens each"
    assert lane_of(max_prompt_tokens=3).has_room(row), "a long prompt goes alone"
    started = lane_of(50, max_prompt_tokens=6)
    started.rows[0].token_ids = [1]
    assert started.has_room(row)


def test_the_last_row_moves_into_the_place_of_a_finished_one():
    lane = lane_of(1, 2, 3, 4)
    for row in lane.rows:
        row.token_ids = [7]
    moves = []
    finished = lane.remove(lambda row: row.index in (0, 2), lambda *move: moves.append(move))
    assert [row.index for row in finished] == [2, 0]
    assert [row.index for row in lane.rows] == [3, 1]
    assert moves == [(0, 3, 2, 4), (0, 2, 0, 4)]


def test_rows_that_finish_at_the_end_leave_nothing_to_move():
    lane = lane_of(1, 2)
    lane.rows[1].token_ids = [7]
    assert [row.index for row in lane.remove(lambda row: row.index == 1, None)] == [1]
    assert len(lane.rows) == 1
