"""Check the rows of a run against its teachers, before a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from megatron_gkd.config.schema import OneTeacher, Recipe, TaggedTeacher, TeacherSection
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.reporting.logging import LOGGER
from megatron_gkd.teachers.cache.teacher import open_cache, require_rows
from megatron_gkd.teachers.self_teacher import require_teacher_prompts
from megatron_gkd.teachers.several import require_teachers

T = TypeVar("T")


def check_training_rows(
    section: TeacherSection, dataset: TokenizedDataset, checkpoints: Mapping[str, Checkpoint]
) -> None:
    """Raise a UserError where the training rows lack what a teacher needs; see also `check_rows`."""
    for place, teacher in section.all.items():
        if not teacher.is_named:
            _require_own_prompts(dataset, place)
        elif teacher.source == "self" and teacher.teacher_model is None and teacher.teacher_ema is None:
            require_teacher_prompts(dataset, place)
    check_rows(section, dataset, checkpoints)


def _require_own_prompts(dataset: TokenizedDataset, place: str) -> None:
    """Say that the student is the teacher that nothing names, or raise a UserError where no row has its prompt."""
    count = int((dataset.teacher_lengths > 0).sum())
    if not count:
        raise UserError(
            f"{place}.teacher_kind = null: no teacher is named, and no row of data.dataset has a teacher_prompt, with "
            "which the student would be its own; set teacher_model, teacher_model_server or teacher_cache, or "
            "teacher_kind = none to train without one"
        )
    LOGGER.info(
        "no teacher is named, and %d of %d rows have a teacher_prompt: the student is its own teacher, which reads it "
        "(%s.teacher_kind = self)",
        count,
        len(dataset),
        place,
    )


def check_rows(section: TeacherSection, dataset: TokenizedDataset, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise a UserError for a row that no teacher can score.

    Args:
        section: the recipe's teachers.
        dataset: the rows.
        checkpoints: see `open_teachers`.
    """
    if section.teachers:
        tag_key = require_key(section.teacher_tag_key, "teacher.teacher_tag_key")
        require_teachers(dataset, (tag for teacher in section.teachers for tag in teacher.tags), tag_key)
    for place, checkpoint in checkpoints.items():
        if not checkpoint.has_images:
            tags = _tags_of(section.all[place])
            row = next((row for row in _rows_with_images(dataset) if tags is None or dataset[row].tag in tags), None)
            if row is not None:
                key = f"{place}.teacher_model = {section.all[place].teacher_model}"
                raise UserError(
                    f"{key}: reads text alone, and row {row} of the dataset has images; name a multimodal teacher"
                )


def require_cached_rows(section: TeacherSection, dataset: TokenizedDataset, name: str) -> None:
    """Raise a UserError for a row that is missing in a cache without a fallback. All ranks must call it.

    Args:
        section: the recipe's teachers.
        dataset: the rows.
        name: of the dataset, for the message.
    """
    for place, teacher in section.all.items():
        if teacher.source == "cache":
            folder = require_key(teacher.teacher_cache, f"{place}.teacher_cache")
            require_rows(open_cache(folder), dataset, name, _tags_of(teacher))


def require_readers_of_videos(recipe: Recipe, dataset: TokenizedDataset) -> None:
    """Raise a UserError where a row has a video, and an engine or a teacher of the run is sent images alone."""
    rows = np.flatnonzero(dataset.num_videos > 0)
    if not len(rows):
        return
    reason = f"is sent no videos, and row {rows[0]} of the dataset has one"
    if recipe.distill.lmbda > 0 and recipe.rollout.engine != "megatron":
        raise UserError(f"rollout.engine = {recipe.rollout.engine}: {reason}; use the engine megatron")
    for place, teacher in recipe.teacher.all.items():
        if teacher.source == "server":
            raise UserError(f"{place}.teacher_model_server: {reason}; use a teacher_model, or a cache of one's scores")


def require_few_images(recipe: Recipe, dataset: TokenizedDataset) -> None:
    """Raise a UserError for a row with more images than vLLM in the training processes takes of a prompt."""
    limits = recipe.rollout.vllm_limit_mm_per_prompt
    if recipe.rollout.engine != "vllm" or limits is None or "image" not in limits:
        return
    for row in _rows_with_images(dataset):
        if (count := len(dataset[row].images)) > limits["image"]:
            raise UserError(
                f"rollout.vllm_limit_mm_per_prompt = {limits}: row {row} of the dataset has {count} images; raise it"
            )


def refuse_videos(dataset: TokenizedDataset) -> None:
    """Raise a UserError where a row has a video: generated rows hold token ids, which have none."""
    rows = np.flatnonzero(dataset.num_videos > 0)
    if len(rows):
        raise UserError(f"data.dataset: row {rows[0]} has a video; responses are generated to text and images alone")


def has_images(dataset: TokenizedDataset) -> bool:
    """Return whether a row has images, for the student or for the teacher."""
    return len(_rows_with_images(dataset)) > 0


def _rows_with_images(dataset: TokenizedDataset) -> list[int]:
    return np.flatnonzero(dataset.num_patches > 0).tolist()


def _tags_of(teacher: OneTeacher) -> tuple[str, ...] | None:
    """Return the tags of the rows that a teacher scores; None for all rows."""
    return teacher.tags if isinstance(teacher, TaggedTeacher) else None


def require_key(value: T | None, key: str) -> T:
    """Return the value of a key that the recipe's checks require in this place."""
    if value is None:
        raise UserError(f"{key} = null: must be set for this teacher")
    return value
