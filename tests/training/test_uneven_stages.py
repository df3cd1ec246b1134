"""Pipeline stages of unequal sizes: loss, gradients, adapters, rollouts and exports are those of one process."""

from __future__ import annotations

import functools

import lora_runs
import pytest
import torch
from checkpoints import tiny_checkpoint
from layouts import EP2, PP2, SP, TP2
from lora_runs import with_lora
from rollout.contract import REQUESTS
from training_layouts import assert_equal_runs, build, train_steps, weights_of

PP4 = {"pipeline_model_parallel_size": 4}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
FOUR = PP4 | {"pipeline_model_parallel_layout": "Et|t*2|t|L"}
OF_TEACHER = {"teacher": {"teacher_pipeline_model_parallel_layout": "E|t|t|L"}}
LAYOUTS = {  # of a student of four layers and a teacher of two
    "3+1": (2, {"parallel": PP2 | {"decoder_first_pipeline_num_layers": 3}}),
    "TP2+SP, 1+3": (4, {"parallel": TP2 | SP | PP2 | {"decoder_last_pipeline_num_layers": 3}}),
    "a layout for each of the two": (4, {"parallel": FOUR} | OF_TEACHER),
}
VIRTUAL = {  # of a student of six layers
    "4+2": (2, {"parallel": PP2 | VPP2 | {"decoder_first_pipeline_num_layers": 4}}),
    "a layout": (2, {"parallel": PP2 | VPP2 | {"pipeline_model_parallel_layout": "Et|tt|t|ttL"}}),
}


@functools.cache
def models(num_layers: int = 4):
    teacher = tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, hidden_size=48)
    return tiny_checkpoint("qwen3_tied", seed=2, num_hidden_layers=num_layers), teacher


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(num_layers: int):
        return gloo_world(1).run(train_steps, *models(num_layers), {})[0]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training(layout, gloo_world, one_process):
    world_size, changes = LAYOUTS[layout]
    assert_equal_runs(gloo_world(world_size).run(train_steps, *models(), changes)[0], one_process(4))


@pytest.mark.parametrize("layout", VIRTUAL)
def test_training_with_virtual_stages(layout, gloo_world, one_process):
    world_size, changes = VIRTUAL[layout]
    assert_equal_runs(gloo_world(world_size).run(train_steps, *models(6), changes)[0], one_process(6))


def test_a_mixture_of_experts(gloo_world):
    pair = tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=3), models()[1]
    expected = gloo_world(1).run(train_steps, *pair, {})[0]
    changes = {"parallel": PP2 | EP2 | {"decoder_first_pipeline_num_layers": 2}}
    assert_equal_runs(gloo_world(4).run(train_steps, *pair, changes)[0], expected)


def test_adapters(gloo_world):
    expected = gloo_world(1).run(lora_runs.train_steps, *models(), with_lora({}))[0]
    world_size, changes = LAYOUTS["3+1"]
    found = gloo_world(world_size).run(lora_runs.train_steps, *models(), with_lora(changes))[0]
    assert_equal_runs(found, expected)


def weights_and_completions(rank, world_size, changes):
    """Return what a new student exports and samples."""
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, _, _ = build(models()[0], None, changes | {"teacher": {"teacher_kind": "none", "teacher_model": None}})
    request = REQUESTS["greedy"]
    completions = MegatronEngine(student.model, [2]).generate(request.prompts, request.sampling, request.seeds)
    found = weights_of(student), [one.token_ids for one in completions]
    destroy_mesh()
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, PP2 | {"decoder_first_pipeline_num_layers": 3}), (4, FOUR)],
    ids=["3+1", "a layout"],
)
def test_exports_and_rollouts(world_size, parallel, gloo_world):
    weights, completions = gloo_world(1).run(weights_and_completions, {})[0]
    found, sampled = gloo_world(world_size).run(weights_and_completions, {"parallel": parallel})[0]
    assert sampled == completions and any(completions)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"parallel": PP2 | {"decoder_first_pipeline_num_layers": 4}},
            "parallel.decoder_first_pipeline_num_layers = 4: leaves 0 of 4 layers",
        ),
        (
            {"parallel": PP2, "teacher": {"teacher_decoder_last_pipeline_num_layers": 2}},
            "teacher.teacher_decoder_last_pipeline_num_layers = 2: leaves 0 of 2 layers",
        ),
    ],
    ids=["student", "teacher"],
)
def test_a_model_of_the_hub_is_refused_when_it_is_built(changes, problem, gloo_world):
    """Its number of layers is not known before."""
    from megatron_gkd.errors import UserError

    with pytest.raises(UserError, match=problem):
        gloo_world(2).run(train_steps, *models(), changes)
