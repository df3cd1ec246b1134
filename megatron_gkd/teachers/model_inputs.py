"""The microbatches that a teacher's model reads, which may differ from the student's in prompts, tokens and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_gkd.data.microbatch import Microbatch, add_pixels, collate, pad_to, shard_context_parallel
from megatron_gkd.data.rows import BadRow
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.data.vision.comparison import is_same_processing
from megatron_gkd.data.vision.expansion import replace_image_tokens
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.agreement import run_on_all
from megatron_gkd.runtime.mesh import Mesh


@dataclass(frozen=True)
class TeacherMicrobatch:
    """A microbatch that the teacher reads.

    Attributes:
        microbatch: of this rank.
        has_students_labels: whether each label is where it is in the student's microbatch, on the same rank.
    """

    microbatch: Microbatch
    has_students_labels: bool


@dataclass(frozen=True)
class ModelInputs:
    """What a teacher's model reads of the student's rows.

    Attributes:
        student: what the student's processor makes of images; None for a text model.
        teacher: what the teacher's processor makes of them; None for a text model, whose rows have none.
    """

    student: ImageProcessing | None = None
    teacher: ImageProcessing | None = None

    @cached_property
    def is_same_processing(self) -> bool:
        """Whether both models read the same tokens, positions and pixels."""
        if self.student is None or self.teacher is None:
            return self.student is self.teacher
        return self.student is self.teacher or is_same_processing(self.student, self.teacher)

    def view(self, sample: Sample) -> Sample:
        """Return the teacher's sequence with the same labels in the same order; `sample` itself where it is the same.

        Raises:
            UserError: the teacher's processor refuses an image.
        """
        viewed = teacher_view(sample)
        if not viewed.images or self.student is None or self.teacher is None or self.is_same_processing:
            return viewed
        try:
            return replace_image_tokens(viewed, self.student, self.teacher)
        except BadRow as error:
            raise UserError(f"row {sample.row_id} of the dataset: the teacher can't read it: {error}") from error

    def build(
        self, microbatches: Sequence[Microbatch], mesh: Mesh, *, equal_lengths: bool = False
    ) -> list[TeacherMicrobatch]:
        """Build what the teacher reads of the student's microbatches; of a multimodal teacher all ranks must call it.

        Args:
            microbatches: the student's, of this rank.
            mesh: the groups of this rank.
            equal_lengths: pad all to the longest, as the interleaved schedule needs it.

        Raises:
            UserError: in all ranks; an image can't be read.
        """
        if self.teacher is None:
            return self._build(microbatches, mesh, equal_lengths)
        return run_on_all(lambda: self._build(microbatches, mesh, equal_lengths))

    def _build(self, microbatches: Sequence[Microbatch], mesh: Mesh, equal_lengths: bool) -> list[TeacherMicrobatch]:
        views = [[self.view(sample) for sample in one.samples] for one in microbatches]
        is_same = [
            all(view is sample for view, sample in zip(viewed, one.samples, strict=True))
            for viewed, one in zip(views, microbatches, strict=True)
        ]
        reads_as_is = [same and self._has_inputs(one) for same, one in zip(is_same, microbatches, strict=True)]
        if equal_lengths and not (all(reads_as_is) and len({one.total_length for one in microbatches}) == 1):
            reads_as_is = [False] * len(microbatches)
        rebuilt = {index: self._collate(views[index], mesh) for index, as_is in enumerate(reads_as_is) if not as_is}
        if equal_lengths and rebuilt:
            longest = max(whole.total_length for whole in rebuilt.values())
            rebuilt = {index: pad_to(whole, longest) for index, whole in rebuilt.items()}
        result = [one if self.teacher is not None else one.without_vision() for one in microbatches]
        for index, whole in rebuilt.items():
            part = shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size())
            result[index] = part.to(microbatches[index].input_ids.device)
        return [TeacherMicrobatch(one, same) for one, same in zip(result, is_same, strict=True)]

    def _has_inputs(self, microbatch: Microbatch) -> bool:
        """Return whether the teacher can read a microbatch of the student, if its rows are the same for both."""
        return self.teacher is None or (microbatch.vision is not None and self.is_same_processing)

    def _collate(self, samples: Sequence[Sample], mesh: Mesh) -> Microbatch:
        """Build a whole microbatch with what the teacher's model reads beside the tokens; pixels on the first stage."""
        whole = collate(
            samples,
            pad_multiple=mesh.layout.pad_multiple,
            total_multiple=mesh.layout.total_multiple,
            images=self.teacher,
        )
        return whole if self.teacher is None or mesh.pp.rank() else add_pixels(whole, self.teacher)
