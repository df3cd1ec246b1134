"""When a teacher that scores ahead gets the rows of a step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from batching import ONE_RANK
from rows import RandomRows

from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.microbatch import collate
from megatron_gkd.data.order import SequentialOrder
from megatron_gkd.errors import UserError
from megatron_gkd.teachers.several import SeveralTeachers
from megatron_gkd.training.batches import AgreedBatches, announce_ahead
from megatron_gkd.training.step_prompts import StepPrompts

ROWS = [RandomRows(count=6)[index] for index in range(6)]


class Recorder:
    def __init__(self, events: list):
        self.events = events

    def begin(self, samples) -> None:
        self.events.append([sample.row_id for sample in samples])


def batches():
    """Yield three batches, the second of which the student samples."""
    yield [collate(ROWS[:2], pad_multiple=1, pad_token_id=0), collate(ROWS[2:3], pad_multiple=1, pad_token_id=0)]
    yield None
    yield [collate(ROWS[3:], pad_multiple=1, pad_token_id=0)]


def test_a_batch_is_yielded_after_the_teacher_gets_the_next_one():
    events = []
    for batch in announce_ahead(batches(), Recorder(events)):
        events.append("sampled" if batch is None else sum(one.num_rows for one in batch))
    assert events == [[0, 1, 2], [], 3, [3, 4, 5], "sampled", 3]


def test_without_scoring_ahead_batches_are_read_when_needed():
    drawn = []
    source = (drawn.append(batch) or batch for batch in batches())
    ahead = announce_ahead(source, SimpleNamespace())
    assert next(ahead) is drawn[0] and len(drawn) == 1
    assert list(announce_ahead([None], None)) == [None]


def test_each_of_several_teachers_gets_its_own_rows():
    a, b = [], []
    teachers = {("a", "x"): Recorder(a), ("b",): Recorder(b), ("c",): SimpleNamespace()}
    SeveralTeachers(teachers, mesh=None).begin(iter(ROWS))  # of the tags a and b in turn
    assert (a, b) == ([[0, 2, 4]], [[1, 3, 5]])


class FailingLoader:
    """Yield three batches; that of the second step cannot be made on one rank."""

    def __init__(self, fails: bool):
        self.fails = fails

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        yield [1]
        if self.fails:
            raise UserError("a.png: cannot be decoded")
        yield [2]
        yield [3]


def read_until_one_rank_fails(rank, world_size):
    batches = iter(AgreedBatches(FailingLoader(fails=rank == 1)))
    first = next(batches)
    with pytest.raises(UserError, match=r"^a\.png: cannot be decoded$"):
        next(batches)
    return first, list(AgreedBatches(FailingLoader(fails=False)))


def test_a_batch_that_one_rank_cannot_make_is_an_error_on_all_ranks(gloo_world):
    assert gloo_world(2).run(read_until_one_rank_fails) == [([1], [[1], [2], [3]])] * 2


class UnreadableImages:
    """The processing of a model whose images are gone."""

    position_rows = 1

    def positions(self, input_ids, images):
        return np.arange(len(input_ids))[None]

    def pixels(self, images):
        raise UserError("a.png: cannot be decoded")


def build_sampled_rows_on_a_first_stage(rank, world_size):
    config = replace(ONE_RANK, images=UnreadableImages(), needs_pixels=rank == 0)
    prompts = StepPrompts(ROWS, SequentialOrder(len(ROWS)), LambdaSchedule(1.0, "row", seed=1), config)
    with pytest.raises(UserError, match=r"^a\.png: cannot be decoded$"):
        prompts.build_microbatches([[0], [1]], ROWS.__getitem__)
    return True


def test_sampled_rows_whose_image_one_rank_cannot_read_are_an_error_on_all_ranks(gloo_world):
    assert gloo_world(2).run(build_sampled_rows_on_a_first_stage) == [True, True]
