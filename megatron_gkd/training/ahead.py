"""A teacher that works elsewhere hears of a step's rows while the step before is still going on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.teachers.base import ScoresAhead, TeacherSource

Batch = list[Microbatch] | None


def announce_ahead(batches: Iterable[Batch], teacher: TeacherSource | None) -> Iterator[Batch]:
    """The `batches` as they are, each given out when the teacher knows the next one.

    So a step's rows are scored while the student trains on the rows before, or samples. What it samples (None) is known
    to nobody yet.
    """
    if not isinstance(teacher, ScoresAhead):
        yield from batches
        return

    def announced() -> Iterator[Batch]:
        for batch in batches:
            teacher.begin(sample for microbatch in batch or () for sample in microbatch.samples)
            yield batch

    for batch, _ in itertools.pairwise(itertools.chain(announced(), [None])):
        yield batch
