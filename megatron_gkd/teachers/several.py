"""Several teachers, each for the rows that have one of its tags."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import FollowsStudent, Part, Parts, ScoresAhead, TeacherSource, select_parts
from megatron_gkd.teachers.selection import select_rows


class SeveralTeachers:
    """Score each row with the teacher of its tag.

    Args:
        teachers: by their tags; a tag belongs to one of them. They are resident one after another.
        mesh: the groups of the student.
    """

    def __init__(self, teachers: Mapping[tuple[str, ...], TeacherSource], mesh: Mesh) -> None:
        self.teachers, self.mesh = teachers, mesh

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """See ``TeacherSource.resident``; each teacher is resident while it scores."""
        return contextlib.nullcontext()

    def begin(self, samples: Iterable[Sample]) -> None:
        """See ``ScoresAhead.begin``; each teacher that scores ahead gets its rows."""
        samples = list(samples)
        for tags, teacher in self.teachers.items():
            if isinstance(teacher, ScoresAhead):
                teacher.begin(filter(_has_one_of(tags), samples))

    def score(self, microbatches: Sequence[Microbatch]) -> list[Parts | None]:
        """See ``TeacherSource.score``.

        Every teacher scores as many microbatches as there are, whatever its share of the rows: ranks wait for each
        other where they share experts or the responses of a server.
        """
        parts: list[list[Part]] = [[] for _ in microbatches]
        for tags, teacher in self.teachers.items():
            selected = [select_rows(microbatch, _has_one_of(tags), self.mesh) for microbatch in microbatches]
            with teacher.resident():
                signals = teacher.score([microbatch for microbatch, _ in selected])
            for parts_of_one, (_, rows), signal in zip(parts, selected, signals, strict=True):
                if signal is not None:
                    parts_of_one += select_parts(rows, signal)
        return [Parts(tuple(parts_of_one)) if parts_of_one else None for parts_of_one in parts]

    def after_update(self) -> None:
        """See ``FollowsStudent.after_update``."""
        for teacher in self.teachers.values():
            if isinstance(teacher, FollowsStudent):
                teacher.after_update()


def _has_one_of(tags: tuple[str, ...]) -> Callable[[Sample], bool]:
    return lambda sample: sample.tag in tags


def require_teachers(dataset: TokenizedDataset, tags: Iterable[str], key: str) -> None:
    """Check that every row has a teacher.

    Args:
        dataset: the rows.
        tags: of all teachers.
        key: the rows' key that holds their tag.

    Raises:
        UserError: a row has a tag that no teacher has.
    """
    known = sorted(tags)
    unknown = sorted(set(dataset.tags) - set(known))
    if unknown:
        row = dataset.first_row_with_tag(unknown[0])
        raise UserError(
            f"row {row} of the dataset: {key} = {unknown[0]!r}: no teacher has this tag; the teachers' tags are "
            f"{', '.join(known)}"
        )
