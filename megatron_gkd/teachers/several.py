"""Several teachers, each for the rows that have one of its tags."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import FollowsStudent, Part, Parts, ScoresAhead, TeacherSource
from megatron_gkd.teachers.selection import select_rows


class SeveralTeachers:
    """`teachers` by their tags; a tag belongs to one of them. They are resident one after another."""

    def __init__(self, teachers: Mapping[tuple[str, ...], TeacherSource], mesh: Mesh):
        self.teachers, self.mesh = teachers, mesh

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """Each teacher is, while it scores."""
        return contextlib.nullcontext()

    def begin(self, samples: Iterable[Sample]) -> None:
        """As `ScoresAhead.begin`: each teacher that can hears of its rows."""
        samples = list(samples)
        for tags, teacher in self.teachers.items():
            if isinstance(teacher, ScoresAhead):
                teacher.begin(filter(_has_one_of(tags), samples))

    def score(self, microbatches: Sequence[Microbatch]) -> list[Parts | None]:
        """Every teacher sees as many microbatches as there are, whatever its share of the rows: ranks wait for each
        other where they share experts or a server's answers.
        """
        parts: list[list[Part]] = [[] for _ in microbatches]
        for tags, teacher in self.teachers.items():
            chosen = [select_rows(microbatch, _has_one_of(tags), self.mesh) for microbatch in microbatches]
            with teacher.resident():
                signals = teacher.score([part for part, _ in chosen])
            for found, (_, rows), signal in zip(parts, chosen, signals, strict=True):
                if signal is not None:
                    found.append(Part(rows, signal))
        return [Parts(tuple(found)) if found else None for found in parts]

    def after_update(self) -> None:
        for teacher in self.teachers.values():
            if isinstance(teacher, FollowsStudent):
                teacher.after_update()


def _has_one_of(tags: tuple[str, ...]):
    def wanted(sample: Sample) -> bool:
        return sample.tag in tags

    return wanted


def require_teachers(dataset: TokenizedDataset, tags: Iterable[str], key: str) -> None:
    """UserError for a row whose tag no teacher has. `key`: the rows' key that holds it."""
    known = sorted(tags)
    strangers = sorted(set(dataset.tags) - set(known))
    if strangers:
        row = dataset.first_row_with_tag(strangers[0])
        raise UserError(
            f"row {row} of the dataset: {key} = {strangers[0]!r} is no teacher's tag; the tags are {', '.join(known)}"
        )
