"""Check each streamed row against the run's teachers and engine when it is drawn; ``teacher_rows`` checks others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gkd.config.schema import OneTeacher, Recipe, TaggedTeacher
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.streams.tokenized import StreamedRow
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.training.teacher_rows import require_key

ROWS_WITHOUT_TEACHER_PROMPT = 1000  # as many of a self-teacher's first rows may have none


@dataclass
class StreamedRowChecks:
    """What a run requires of a row beside being well-formed.

    Attributes:
        tag_key: the rows' key with a teacher's tag; None where there is one teacher.
        tags: of all teachers.
        text_teachers: teachers that read text alone, each with its name and the tags of its rows; None: all rows.
        most_images: of a row, and the key that limits them; None for any number.
        reads_no_videos: why a row with a video can't be used; None where it can.
        needs_teacher_prompt: the teacher's place in the recipe where it is the student with other prompts.
    """

    tag_key: str | None
    tags: tuple[str, ...]
    text_teachers: tuple[tuple[str, tuple[str, ...] | None], ...]
    most_images: tuple[int, str] | None
    reads_no_videos: str | None
    needs_teacher_prompt: str | None
    _without_prompt: int = 0

    @classmethod
    def from_recipe(cls, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> StreamedRowChecks:
        """Return the checks of a run. `checkpoints`: see ``open_teachers``."""
        section = recipe.teacher
        return cls(
            tag_key=require_key(section.teacher_tag_key, "teacher.teacher_tag_key") if section.teachers else None,
            tags=tuple(sorted(tag for teacher in section.teachers for tag in teacher.tags)),
            text_teachers=tuple(
                (f"{place}.teacher_model = {section.all[place].teacher_model}", _tags_of(section.all[place]))
                for place, checkpoint in checkpoints.items()
                if not checkpoint.has_images
            ),
            most_images=_limit_of_images(recipe),
            reads_no_videos=_reader_without_videos(recipe),
            needs_teacher_prompt=next(
                (
                    place
                    for place, teacher in section.all.items()
                    if teacher.source == "self" and teacher.teacher_model is None and teacher.teacher_ema is None
                ),
                None,
            ),
        )

    def find_problem(self, row: StreamedRow) -> str | None:
        """Return why this run can't use a row; None where it can."""
        sample = row.sample
        if sample is None:
            return None
        if self.tag_key is not None and sample.tag not in self.tags:
            known = ", ".join(self.tags)
            return f"{self.tag_key} = {sample.tag!r}: no teacher has this tag; the teachers' tags are {known}"
        if row.num_patches:
            for name, tags in self.text_teachers:
                if tags is None or sample.tag in tags:
                    return f"the row has images, and {name} reads text alone; name a multimodal teacher"
        if self.most_images is not None and len(sample.images) > self.most_images[0]:
            return f"the row has {len(sample.images)} images; raise {self.most_images[1]}"
        if row.num_videos and self.reads_no_videos is not None:
            return f"the row has a video; {self.reads_no_videos}"
        return self._find_missing_prompt(sample)

    def _find_missing_prompt(self, sample: Sample) -> str | None:
        if self.needs_teacher_prompt is None or self._without_prompt < 0:
            return None
        self._without_prompt = -1 if sample.teacher_prompt is not None else self._without_prompt + 1
        if self._without_prompt < ROWS_WITHOUT_TEACHER_PROMPT:
            return None
        return (
            f"none of the {self._without_prompt} rows so far has a teacher_prompt, without which teacher and student "
            f"are the same and the divergence is 0 ({self.needs_teacher_prompt}.teacher_kind = self); add that key, or "
            "name student.model in teacher_model, or set teacher_ema"
        )


def _limit_of_images(recipe: Recipe) -> tuple[int, str] | None:
    limits = recipe.rollout.vllm_limit_mm_per_prompt
    if recipe.distill.lmbda == 0 or recipe.rollout.engine != "vllm" or limits is None or "image" not in limits:
        return None
    return limits["image"], f"rollout.vllm_limit_mm_per_prompt = {limits}"


def _reader_without_videos(recipe: Recipe) -> str | None:
    if recipe.distill.lmbda > 0 and recipe.rollout.engine != "megatron":
        return f"rollout.engine = {recipe.rollout.engine}: is sent no videos; use the engine megatron"
    for place, teacher in recipe.teacher.all.items():
        if teacher.source == "server":
            return f"{place}.teacher_model_server: is sent no videos; use a teacher_model, or a cache of one's scores"
    return None


def _tags_of(teacher: OneTeacher) -> tuple[str, ...] | None:
    return teacher.tags if isinstance(teacher, TaggedTeacher) else None
