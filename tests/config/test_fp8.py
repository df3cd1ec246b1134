"""The numbers of tokens that microbatches are padded to for FP8."""

import pytest
from training_layouts import recipe_of

from megatron_gkd.config.fp8 import fp8_token_multiple

HYBRID = {"fp8_format": "hybrid"}
OF_TEACHER = {"teacher_model": "teacher", "teacher_fp8_format": "e4m3"}
SERVER = {"teacher_model": None, "teacher_model_server": ["http://127.0.0.1:8000"], "teacher_fp8_format": "e4m3"}


@pytest.mark.parametrize(
    ("changes", "multiple"),
    [
        ({}, 1),
        ({"megatron": {"fp8_recipe": "mxfp8"}}, 1),
        ({"megatron": HYBRID}, 16),
        ({"megatron": HYBRID | {"fp8_recipe": "mxfp8"}}, 32),
        ({"teacher": OF_TEACHER}, 16),
        ({"megatron": HYBRID, "teacher": OF_TEACHER | {"teacher_fp8_recipe": "mxfp8"}}, 32),
        ({"teacher": SERVER}, 1),
    ],
)
def test_the_multiple_is_that_of_all_models_in_fp8(changes, multiple):
    assert fp8_token_multiple(recipe_of(changes)) == multiple
