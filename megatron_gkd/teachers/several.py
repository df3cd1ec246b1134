"""Several teachers, each for the rows that have one of its tags."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import IGNORE, Sample
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Part, Parts, TeacherSource
from megatron_gkd.teachers.selection import select_rows


class SeveralTeachers:
    """`teachers` by their tags; a tag belongs to one of them. They are resident one after another."""

    def __init__(self, teachers: Mapping[tuple[str, ...], TeacherSource], mesh: Mesh):
        self.teachers, self.mesh = teachers, mesh

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """Each teacher is, while it scores."""
        return contextlib.nullcontext()

    def score(self, microbatches: Sequence[Microbatch]) -> list[Parts | None]:
        """Every teacher sees as many microbatches as there are, whatever its share of the rows: ranks wait for each
        other where they share experts or a server's answers."""
        parts: list[list[Part]] = [[] for _ in microbatches]
        for tags, teacher in self.teachers.items():
            chosen = [select_rows(microbatch, _has_one_of(tags), self.mesh) for microbatch in microbatches]
            with teacher.resident():
                signals = teacher.score([part for part, _ in chosen])
            for found, (_, rows), signal in zip(parts, chosen, signals, strict=True):
                if signal is not None:
                    found.append(Part(rows, signal))
        return [Parts(tuple(found)) if found else None for found in parts]


def _has_one_of(tags: tuple[str, ...]):
    def wanted(sample: Sample) -> bool:
        return sample.tag in tags

    return wanted


def require_teachers(samples: Iterable[Sample], tags: Iterable[str], key: str) -> None:
    """UserError for a row with labels whose tag no teacher has. `key`: the rows' key that holds it."""
    known = sorted(tags)
    for sample in samples:
        if sample.tag not in known and (sample.labels != IGNORE).any():
            raise UserError(
                f"row {sample.row_id} of the dataset: {key} = {sample.tag!r} is no teacher's tag; "
                f"the tags are {', '.join(known)}"
            )
