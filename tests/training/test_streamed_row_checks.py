"""What a run requires of streamed rows, each checked when it is drawn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from training_layouts import recipe_of

from megatron_gkd.data.sample import Sample
from megatron_gkd.data.streams.tokenized import StreamedRow
from megatron_gkd.data.vision.image import Image

TEACHERS = {
    "teachers": [{"tags": ["a"], "teacher_model": "teacher"}, {"tags": ["b"], "teacher_kind": "none"}],
    "teacher_tag_key": "domain",
    "teacher_model": None,
}
PICTURE = Image("/x.png", 28, 28, "d")


def row_of(tag=None, images=0, num_videos=0, teacher_prompt=None):
    ids = np.array([5, 6])
    sample = Sample(ids, ids, "dataset", 0, teacher_prompt, tag, (PICTURE,) * images)
    return StreamedRow(0, 0, 0, sample, num_patches=4 * images, num_videos=num_videos)


def problem_of(changes, *rows, has_images=False):
    """The first problem of rows that are drawn one after the other."""
    from megatron_gkd.training.streamed_row_checks import StreamedRowChecks

    recipe = recipe_of(changes)
    places = [place for place, teacher in recipe.teacher.all.items() if teacher.source == "local"]
    checkpoints = {place: SimpleNamespace(has_images=has_images) for place in places}
    checks = StreamedRowChecks.from_recipe(recipe, checkpoints)
    return next((problem for row in rows if (problem := checks.find_problem(row)) is not None), None)


@pytest.mark.parametrize(
    ("changes", "row", "problem"),
    [
        (
            {"teacher": TEACHERS},
            row_of(tag="c"),
            "domain = 'c': no teacher has this tag; the teachers' tags are a, b",
        ),
        (
            {"teacher": TEACHERS},
            row_of(tag="a", images=1),
            "the row has images, and teacher.teachers[0].teacher_model = teacher reads text alone; name a multimodal "
            "teacher",
        ),
        (
            {"distill": {"lmbda": 1}, "rollout": {"engine": "vllm_server", "vllm_server_urls": ["http://a:1"]}},
            row_of(num_videos=1),
            "the row has a video; rollout.engine = vllm_server: is sent no videos; use the engine megatron",
        ),
        (
            {"teacher": {"teacher_model": None, "teacher_model_server": ["http://a:1"]}},
            row_of(num_videos=1),
            "the row has a video; teacher.teacher_model_server: is sent no videos; use a teacher_model, or a cache of "
            "one's scores",
        ),
    ],
)
def test_a_row_that_the_run_cannot_use(changes, row, problem):
    assert problem_of(changes, row) == problem


def test_rows_that_are_used():
    assert problem_of({}, row_of(), row_of(images=1), has_images=True) is None
    assert problem_of({"teacher": TEACHERS}, row_of(tag="a"), row_of(tag="b", images=1)) is None


def test_a_row_has_as_many_images_as_vllm_takes():
    changes = {"distill": {"lmbda": 1}, "rollout": {"engine": "vllm", "vllm_limit_mm_per_prompt": {"image": 2}}}
    rows = [row_of(images=2), row_of(images=3)]
    assert problem_of(changes, rows[0], has_images=True) is None
    assert problem_of(changes, *rows, has_images=True) == (
        "the row has 3 images; raise rollout.vllm_limit_mm_per_prompt = {'image': 2}"
    )


def test_one_of_the_first_rows_has_a_teacher_prompt_where_the_student_is_its_teacher():
    from megatron_gkd.training.streamed_row_checks import ROWS_WITHOUT_TEACHER_PROMPT

    changes = {"teacher": {"teacher_kind": "self", "teacher_model": None}}
    without = [row_of()] * ROWS_WITHOUT_TEACHER_PROMPT
    problem = problem_of(changes, *without)
    assert problem is not None and problem.startswith(
        "none of the 1000 rows so far has a teacher_prompt, without which teacher and student are the same and the "
        "divergence is 0 (teacher.teacher_kind = self); add that key"
    )
    with_prompt = row_of(teacher_prompt=np.array([5]))
    assert problem_of(changes, *without[1:], with_prompt, *without) is None
