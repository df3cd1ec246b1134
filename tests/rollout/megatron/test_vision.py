"""The embedded engine with images: transformers' tokens for every kind of model and layout."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from rollout.vision_contract import (
    VISION_CHECKPOINT,
    VisionEngineContract,
    VisionPrompts,
    assert_completions,
    complete,
    expected_completions,
)
from vision_checkpoints import tiny_vision_checkpoint

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.base import Completion


def open_engine(mesh, checkpoint, **limits):
    from megatron_gkd.data.vision.processor import open_processing
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.rollout.megatron.engine import MegatronEngine

    virtual = mesh.layout.virtual_pipeline
    model = MegatronModel.load(Checkpoint.open(str(checkpoint)), mesh, BuildOptions(virtual_pipeline=virtual))
    return MegatronEngine(model, [2], open_processing(checkpoint), **limits)


def contract_results(rank, world_size, checkpoint, prompts):
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    results = complete(open_engine(initialize_mesh(Layout(), seed=1), checkpoint), prompts)
    destroy_mesh()
    return results


class TestMegatronEngine(VisionEngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, gloo_world):
        return gloo_world(1).run(contract_results, VISION_CHECKPOINT(), VisionPrompts.of(VISION_CHECKPOINT()))[0]


def complete_under(rank, world_size, checkpoint, layout, prompts) -> list[Completion]:
    """Each replica's completions; each of two replicas has other prompts. Few prompts start at a time."""
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(**layout), seed=1)
    engine = open_engine(mesh, checkpoint, max_prompt_tokens=20, max_batch_tokens=100)
    own = slice(mesh.dp.rank(), None, mesh.dp.size())
    ids, images = prompts.ids[own], prompts.images[own]
    completions = engine.generate(ids, prompts.sampling, list(range(len(ids))), images)
    destroy_mesh()
    return completions


@functools.cache
def expected(family):
    checkpoint = tiny_vision_checkpoint(family)
    prompts = VisionPrompts.of(checkpoint)
    return checkpoint, prompts, expected_completions(checkpoint, prompts)


TP_SP = {"tensor": 2, "sequence_parallel": True}
CASES = {
    "qwen2_5_vl": [{}, TP_SP, {"pipeline": 2}, {"context": 2}, {}],
    "qwen3_vl": [{}, TP_SP],
    "internvl": [{}, {"pipeline": 2}],
    "glm4v": [{}],
    "qwen3_vl_moe": [{"tensor": 2, "sequence_parallel": True, "expert": 2}],
}


def world_sizes():
    for family, layouts in CASES.items():
        for index, layout in enumerate(layouts):
            world_size = 2 if layout or index else 1
            name = "".join(f"{key[0]}{value}" for key, value in layout.items()) or f"DP{world_size}"
            yield pytest.param(family, layout, world_size, id=f"{family}-{name}")


@pytest.mark.parametrize(("family", "layout", "world_size"), list(world_sizes()))
def test_greedy_tokens_are_those_of_transformers(family, layout, world_size, gloo_world):
    checkpoint, prompts, wanted = expected(family)
    found = gloo_world(world_size).run(complete_under, checkpoint, layout, prompts)
    replicas = 1 if layout else world_size
    for rank, completions in enumerate(found):
        assert_completions(completions, wanted[rank % replicas :: replicas])


VIDEO = [(16, 24, seed) for seed in range(5)]
PROMPTS_WITH_VIDEOS: list[list] = [
    [10, VIDEO, 11, 12],
    [20, (16, 16, 3), 21, VIDEO[::-1][:3], 22],
    [10, VIDEO[::-1], 11],
]


@pytest.mark.parametrize(("family", "layout"), [("qwen2_5_vl", {"pipeline": 2}), ("qwen3_vl", {})])
def test_greedy_tokens_after_videos_are_those_of_transformers(family, layout, gloo_world):
    checkpoint = tiny_vision_checkpoint(family)
    prompts = VisionPrompts.of(checkpoint, parts=PROMPTS_WITH_VIDEOS)
    wanted = expected_completions(checkpoint, prompts)
    for completions in gloo_world(2 if layout else 1).run(complete_under, checkpoint, layout, prompts):
        assert_completions(completions, wanted)


def count_tower_calls(rank, world_size, checkpoint, prompts):
    """How often the tower ran, and how many images it read, while completions were generated."""
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    engine = open_engine(initialize_mesh(Layout(), seed=1), checkpoint)
    (chunk,), calls = engine.model.chunks, []
    chunk.visual.visual.register_forward_hook(lambda module, inputs, options, output: calls.append(1), with_kwargs=True)
    engine.generate(prompts.ids, prompts.sampling, list(range(len(prompts.ids))), prompts.images)
    destroy_mesh()
    return len(calls)


def test_the_tower_runs_for_new_prompts_alone(gloo_world):
    """One pass starts all prompts; the seven that follow have no images, and no blank one."""
    checkpoint, prompts, _ = expected("qwen2_5_vl")
    assert gloo_world(1).run(count_tower_calls, checkpoint, prompts) == [1]


def complete_without_a_file(rank, world_size, checkpoint, prompts):
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    engine = open_engine(initialize_mesh(Layout(pipeline=world_size), seed=1), checkpoint)
    images = [tuple(replace(image, location="/gone.png") for image in some) for some in prompts.images]
    with pytest.raises(UserError, match=r"^/gone\.png: No such file or directory; it was there when the rows were"):
        engine.generate(prompts.ids, prompts.sampling, list(range(len(prompts.ids))), images)
    destroy_mesh()
    return True


def test_an_image_that_is_gone_is_an_error_on_stages_that_read_none_too(gloo_world):
    checkpoint, prompts, _ = expected("qwen2_5_vl")
    assert gloo_world(2).run(complete_without_a_file, checkpoint, prompts) == [True, True]
