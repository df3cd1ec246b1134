"""When a teacher that scores ahead gets the rows of a step."""

from __future__ import annotations

from types import SimpleNamespace

from rows import RandomRows

from megatron_gkd.data.microbatch import collate
from megatron_gkd.teachers.several import SeveralTeachers
from megatron_gkd.training.batches import announce_ahead

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
