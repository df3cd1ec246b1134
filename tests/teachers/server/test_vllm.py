"""The teacher behind a real vLLM server: the contract, the local teacher's loss, and a server that dies in a run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import vllm_server
from checkpoints import tiny_checkpoint, tiny_tokenizer
from command_line import train
from layouts import DENSE
from teachers.contract import CHECKPOINT, TeacherContract, in_every_rank
from teachers.server.test_images import K, images_that_readers_turn, score_rows
from teachers.server.test_images import rows as image_rows
from teachers.server.test_run import prepare, steps_of
from teachers.server.test_teacher import fail_to_make, results_of
from teachers.vision_rows import image_sample, processing_of, vision_log_probs, vision_teacher
from training.test_layouts import assert_equal_runs
from training.test_server_teacher import TAILS
from training_layouts import train_steps
from vision_checkpoints import vision_tokenizer

from megatron_gkd.data.vision.processor import PixelLimits
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.servers import open_client
from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer
from megatron_gkd.teachers.server.tokenizer import tokenizer_probes

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def teacher_server(tmp_path_factory) -> Iterator[vllm_server.VllmServer]:
    """It runs."""
    if not vllm_server.is_installed():
        pytest.skip(vllm_server.WHY_ABSENT)
    server = vllm_server.VllmServer(CHECKPOINT(), tmp_path_factory.mktemp("teacher") / "server.log", max_model_len=256)
    try:
        server.ensure_running()
        yield server
    finally:
        server.kill()


class TestTeacherOfVllm(TeacherContract):
    ROUNDING = 1e-5  # a batch is what has arrived together

    @pytest.fixture(scope="class", params=["TP2xCP2"])
    @classmethod
    def results(cls, request, gloo_world, teacher_server):
        return in_every_rank(gloo_world, request.param, results_of, [teacher_server.url])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 65}, "greater than max allowed: 64.*start it with --max-logprobs 65"),
        ({"max_length": 256}, "start it with --max-model-len 257"),
    ],
)
def test_an_unusable_server_is_refused_at_the_start(options, message, gloo_world, teacher_server):
    (found, _) = gloo_world(2).run(fail_to_make, [teacher_server.url], options)
    assert re.search(message, found), found


def test_its_tokenizer_is_compared(teacher_server):
    def connect(tokenizer):
        requirements = TeacherRequirements(4, 255, tokenizer_probes(tokenizer))
        server = TeacherServer(teacher_server.url, open_client(60.0, 4), requirements)
        server.handshake(max_downtime=5.0)
        return server

    connect(tiny_tokenizer()).check()
    with pytest.raises(UserError, match="its tokenizer is not the student's"):
        connect(tiny_tokenizer(prefix="v"))


@pytest.fixture(scope="module")
def image_server(tmp_path_factory) -> Iterator[vllm_server.VllmServer]:
    if not vllm_server.is_installed():
        pytest.skip(vllm_server.WHY_ABSENT)
    server = vllm_server.VllmServer(vision_teacher(), tmp_path_factory.mktemp("images") / "server.log")
    server.flags.append("--enable-scale-out")
    try:
        server.ensure_running()
        yield server
    finally:
        server.kill()


def test_rows_with_images_are_scored_as_by_transformers(image_server, gloo_world):
    """Also those that no two readers decode alike, unless they are sent as they were read here."""
    processing = processing_of(vision_teacher())
    rows = [*image_rows(processing), *map(partial(image_sample, processing, 3), images_that_readers_turn())]
    expected = torch.cat([vision_log_probs(vision_teacher(), row) for row in rows]).topk(K).values.float()
    for values in gloo_world(2).run(score_rows, image_server.url, vision_teacher(), rows):
        torch.testing.assert_close(values.sort(-1, descending=True).values, expected, atol=1e-4, rtol=0)


def test_a_server_with_other_limits_of_pixels_is_refused(image_server):
    limits = PixelLimits(max_pixels=32 * 32)
    requirements = TeacherRequirements(
        4, 255, tokenizer_probes(vision_tokenizer()), processing_of(vision_teacher(), limits)
    )
    server = TeacherServer(image_server.url, open_client(60.0, 4), requirements)
    with pytest.raises(UserError, match="images of 64x64 pixels, of which the student's processor makes"):
        server.handshake(max_downtime=5.0)


def test_a_server_without_the_route_of_images_is_refused(teacher_server):
    images = processing_of(vision_teacher())
    requirements = TeacherRequirements(4, 255, tokenizer_probes(tiny_tokenizer()), images)
    server = TeacherServer(teacher_server.url, open_client(60.0, 4), requirements)
    with pytest.raises(UserError, match="start it with --enable-scale-out"):
        server.handshake(max_downtime=5.0)


@pytest.mark.parametrize("tail", TAILS)
def test_the_loss_is_that_of_the_local_teachers_top_k(tail, gloo_world, teacher_server):
    student, distill = tiny_checkpoint("qwen3_tied", seed=2), {"distill": TAILS[tail]}
    local = gloo_world(1).run(train_steps, student, CHECKPOINT(), distill)[0]
    world_size, changes = DENSE["CP2xDP2, packed"]
    server = {"teacher": {"teacher_model": None, "teacher_model_server": teacher_server.url}}
    found = gloo_world(world_size).run(train_steps, student, None, changes | server | distill)[0]
    assert_equal_runs(found, local, tolerance=1e-4)


def test_a_run_continues_after_a_server_is_killed_and_restarted(teacher_server, tmp_path):
    """Which takes longer than 20 seconds, and does not change what is learned."""
    teachers = {
        "local": ["--teacher_model", str(CHECKPOINT())],
        "server": ["--teacher_model_server", teacher_server.url],
    }
    local, by_server = (prepare(tmp_path / name) for name in teachers)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, by_server, *teachers["server"])
        while len(steps_of(by_server)) < 3:
            assert not run.done(), run.result().stderr
            time.sleep(0.02)
        teacher_server.kill()
        killed_at = len(steps_of(by_server))
        teacher_server.start()
        finished = run.result()
    assert finished.returncode == 0, finished.stderr
    finished = train(local, *teachers["local"])
    assert finished.returncode == 0, finished.stderr
    found, expected = steps_of(by_server), steps_of(local)
    assert killed_at < len(found) == 30
    for a, b in zip(found, expected, strict=True):
        assert a["num_tokens"] == b["num_tokens"] and a["dropped_tokens"] == 0
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
