"""`vllm_limit_mm_per_prompt` is compared with the rows and the student before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_gkd.config.schema import RolloutSection
from megatron_gkd.errors import UserError
from megatron_gkd.training.setup import _check_image_keys
from megatron_gkd.training.teacher_rows import require_few_images


class Rows:
    """Rows with these numbers of images."""

    def __init__(self, *counts: int) -> None:
        self.counts, self.num_patches = counts, 4 * np.array(counts)

    def __getitem__(self, row: int) -> SimpleNamespace:
        return SimpleNamespace(images=(None,) * self.counts[row])


def recipe_of(**rollout) -> SimpleNamespace:
    data = SimpleNamespace(min_pixels=None, max_pixels=None, max_patches=None)
    return SimpleNamespace(rollout=RolloutSection(**rollout), data=data, student=SimpleNamespace(model="student"))


def test_a_row_with_more_images_than_vllm_takes_is_refused():
    recipe = recipe_of(engine="vllm", vllm_limit_mm_per_prompt={"image": 2})
    require_few_images(recipe, Rows(0, 2, 1))
    message = r"rollout.vllm_limit_mm_per_prompt = {'image': 2}: row 2 of the dataset has 3 images; raise it"
    with pytest.raises(UserError, match=message):
        require_few_images(recipe, Rows(0, 2, 3))


@pytest.mark.parametrize("limits", [None, {"video": 0}])
def test_without_a_limit_of_images_all_rows_are_taken(limits):
    require_few_images(recipe_of(engine="vllm", vllm_limit_mm_per_prompt=limits), Rows(99))


def test_a_student_of_text_has_no_limit_of_images():
    with pytest.raises(UserError, match=r"{'image': 2}: the student student reads text alone; leave it out"):
        _check_image_keys(recipe_of(engine="vllm", vllm_limit_mm_per_prompt={"image": 2}), None)
    _check_image_keys(recipe_of(engine="vllm"), None)
