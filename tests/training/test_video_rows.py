"""Rows with videos are refused where images alone are sent, before a model is built."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_gkd.data.sample import Sample
from megatron_gkd.data.vision.image import Video
from megatron_gkd.errors import UserError
from megatron_gkd.rollout.vllm.prompt import build_prompts
from megatron_gkd.teachers.server.response import ScoreRequest
from megatron_gkd.training.teacher_rows import refuse_videos, require_readers_of_videos

VIDEO = Video("/v.gif", 16, 16, "00", (0, 1), 2.0, 2)


def recipe(source: str = "local", engine: str = "megatron", lmbda: float = 0.0) -> SimpleNamespace:
    teachers = {"teacher": SimpleNamespace(source=source)}
    return SimpleNamespace(
        distill=SimpleNamespace(lmbda=lmbda),
        rollout=SimpleNamespace(engine=engine),
        teacher=SimpleNamespace(all=teachers),
    )


def rows(*num_videos: int) -> SimpleNamespace:
    return SimpleNamespace(num_videos=np.array(num_videos))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"engine": "vllm", "lmbda": 0.5},
            "rollout.engine = vllm: is sent no videos, and row 1 of the dataset",
        ),
        ({"source": "server"}, "teacher.teacher_model_server: is sent no videos, and row 1 of the dataset"),
    ],
)
def test_engines_and_teachers_with_images_alone(keys, message):
    with pytest.raises(UserError, match=message):
        require_readers_of_videos(recipe(**keys), rows(0, 2))
    require_readers_of_videos(recipe(**keys), rows(0, 0))
    require_readers_of_videos(recipe(engine="vllm"), rows(0, 2))
    require_readers_of_videos(recipe(lmbda=1.0), rows(0, 2))


def test_responses_are_not_generated_to_videos():
    with pytest.raises(UserError, match=r"data.dataset: row 1 has a video"):
        refuse_videos(rows(0, 1))
    refuse_videos(rows(0, 0))


def test_no_request_has_a_video():
    processing = SimpleNamespace()
    with pytest.raises(UserError, match=r"/v.gif: vLLM is sent no videos"):
        build_prompts([[1]], [(VIDEO,)], processing)
    sample = Sample(np.array([1, 2]), np.array([2, -100]), "dataset", 0, images=(VIDEO,))
    with pytest.raises(UserError, match=r"/v.gif: a teacher's server is sent no videos"):
        ScoreRequest.from_sample(sample, processing)
