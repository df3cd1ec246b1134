"""Images with the real vLLM, in process and on a server: the contract, new weights, and other limits of pixels."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import pytest
import torch
import vllm_server
from rollout.new_weights import weights_of
from rollout.vision_contract import (
    LIMITS,
    VISION_CHECKPOINT,
    VisionEngineContract,
    VisionPrompts,
    assert_completions,
    complete,
    expected_completions,
)
from world import World

from megatron_gkd.data.vision.processor import open_processing
from megatron_gkd.rollout.base import RolloutFailed

NO_VLLM = "no vLLM in this environment: bash scripts/test.sh runs this in .venv-vllm"
pytestmark = pytest.mark.vllm
in_vllm_environment = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NO_VLLM)


@pytest.fixture(scope="module")
def world():
    """One process of its own: vLLM stays in it."""
    world = World(1)
    yield world
    world.close()


@functools.cache
def engine_in_process(checkpoint):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.rollout.vllm.colocated import VllmColocatedEngine
    from megatron_gkd.rollout.vllm.engine_arguments import ColocatedOptions
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    options = ColocatedOptions(torch.float32, 128, kv_cache_memory_bytes=32 << 20)
    opened, processing = Checkpoint.open(str(checkpoint)), open_processing(checkpoint, LIMITS)
    engine = VllmColocatedEngine.start(initialize_mesh(Layout(), seed=1), opened, options, processing)
    destroy_mesh()  # the engine has no group of it
    return engine


def results_in_process(rank, world_size, checkpoint, prompts):
    engine = engine_in_process(checkpoint)
    engine.load_weights(weights_of(checkpoint), version=1)
    return complete(engine, prompts)


@in_vllm_environment
class TestVllmColocatedEngine(VisionEngineContract):
    limits = LIMITS

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, world):
        checkpoint = VISION_CHECKPOINT()
        return world.run(results_in_process, checkpoint, VisionPrompts.of(checkpoint, LIMITS))[0]


def load_one_after_another(engine, checkpoints, prompts):
    """Greedy completions with the weights of each checkpoint: vLLM keeps what its tower made of an image."""
    found = []
    for version, checkpoint in enumerate(checkpoints):
        engine.load_weights(weights_of(checkpoint), version)
        found.append(engine.generate(prompts.ids, prompts.sampling, [0] * len(prompts.ids), prompts.images))
    return found


def load_in_process(rank, world_size, checkpoints, prompts, reset=True):
    engine = engine_in_process(checkpoints[0])
    with pytest.MonkeyPatch.context() as patch:
        if not reset:
            patch.setattr(engine.vllm.llm.llm_engine, "reset_encoder_cache", lambda: None)
        return load_one_after_another(engine, checkpoints, prompts)


def check_new_weights(found, checkpoints, prompts):
    for completions, checkpoint in zip(found, checkpoints, strict=True):
        assert_completions(completions, expected_completions(checkpoint, prompts, LIMITS))


@in_vllm_environment
def test_new_weights_of_the_tower_too(world):
    checkpoints, prompts = [VISION_CHECKPOINT(), VISION_CHECKPOINT(8)], VisionPrompts.of(VISION_CHECKPOINT(), LIMITS)
    check_new_weights(world.run(load_in_process, checkpoints, prompts)[0], checkpoints, prompts)


@in_vllm_environment
def test_without_a_reset_the_cache_of_images_would_be_stale(world):
    """Last of its process, whose vLLM has failed then."""
    checkpoints, prompts = [VISION_CHECKPOINT(), VISION_CHECKPOINT(8)], VisionPrompts.of(VISION_CHECKPOINT(), LIMITS)
    with pytest.raises(RolloutFailed, match="Encoder cache miss"):
        world.run(load_in_process, checkpoints, prompts, reset=False)


@contextlib.contextmanager
def engine_on(url, folder, checkpoint, weight_sync="folder", limits=LIMITS):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.rollout.vllm.server import VllmServerEngine
    from megatron_gkd.rollout.vllm.server_options import RolloutServerOptions
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(), seed=1)
    options = RolloutServerOptions((url,), folder, max_length=128, weight_sync=weight_sync, max_downtime=60)
    processing = open_processing(checkpoint, limits)
    try:
        engine = VllmServerEngine(mesh, Checkpoint.open(str(checkpoint)), options, processing)
        with contextlib.closing(engine):
            yield engine
    finally:
        destroy_mesh()


def results_on(rank, world_size, url, folder, checkpoint, prompts):
    with engine_on(url, folder, checkpoint) as engine:
        engine.load_weights(weights_of(checkpoint), version=1)
        return complete(engine, prompts)


class TestVllmServerEngine(VisionEngineContract):
    """The server's own weights are others: every completion must be by those that the engine has sent."""

    limits = LIMITS

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, vision_server, gloo_world, tmp_path_factory):
        checkpoint, folder = VISION_CHECKPOINT(), tmp_path_factory.mktemp("sync")
        prompts = VisionPrompts.of(checkpoint, LIMITS)
        return gloo_world(1).run(results_on, vision_server.url, folder, checkpoint, prompts)[0]


def load_on(rank, world_size, url, folder, weight_sync, checkpoints, prompts):
    with engine_on(url, folder, checkpoints[0], weight_sync) as engine:
        return load_one_after_another(engine, checkpoints, prompts)


@pytest.mark.parametrize("weight_sync", ["folder", vllm_server.TRANSFER_BACKEND])
def test_servers_get_new_weights_of_the_tower_too(weight_sync, vision_server, gloo_world, tmp_path):
    checkpoints, prompts = [VISION_CHECKPOINT(), VISION_CHECKPOINT(8)], VisionPrompts.of(VISION_CHECKPOINT(), LIMITS)
    found = gloo_world(1).run(load_on, vision_server.url, tmp_path, weight_sync, checkpoints, prompts)[0]
    check_new_weights(found, checkpoints, prompts)


def complete_with_other_limits(rank, world_size, url, folder, checkpoint):
    prompts = VisionPrompts.of(checkpoint)
    with engine_on(url, folder, checkpoint, limits=None) as engine:
        engine.load_weights(weights_of(checkpoint), version=1)
        engine.generate(prompts.ids[3:4], prompts.sampling, [0], prompts.images[3:4])


def test_servers_with_other_limits_are_refused(vision_server, gloo_world, tmp_path):
    options = """'{"size": {"longest_edge": 4096, "shortest_edge": 64}}'"""
    message = f"makes 15 tokens of a prompt with .*, and that of student.model 20; .*--mm-processor-kwargs {options}"
    with pytest.raises(RolloutFailed, match=message):
        gloo_world(1).run(complete_with_other_limits, vision_server.url, tmp_path, VISION_CHECKPOINT())
