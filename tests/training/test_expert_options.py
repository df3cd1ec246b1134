"""Options of mixtures of experts: gradients under every layout equal those of one process without them."""

from __future__ import annotations

import functools

import pytest
import torch
from checkpoints import tiny_checkpoint
from families.text import tiny_family
from layouts import MOE
from training_layouts import assert_equal_runs, build, named_gradients, train_steps, weights_of

NO_TEACHER = {"teacher": {"teacher_kind": "none", "teacher_model": None}}
ALL_GATHER = {"moe_token_dispatcher_type": "allgather"}
ONE_BY_ONE = {"moe_grouped_gemm": False}
OPTIONS = {
    "a wider router": {"moe_router_dtype": "fp64"},
    "fused SwiGLU": {"bias_swiglu_fusion": "on"},
    "experts one by one": ONE_BY_ONE,
    "experts one by one, all-gather": ONE_BY_ONE | ALL_GATHER,
}


@functools.cache
def models():
    teacher = tiny_checkpoint("qwen3_moe", seed=1, num_hidden_layers=2)
    return tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2), teacher


@pytest.fixture(scope="module")
def one_process(gloo_world):
    return gloo_world(1).run(train_steps, *models(), {})[0]


@pytest.mark.parametrize("layout", MOE)
def test_the_all_gather_dispatcher(layout, gloo_world, one_process):
    """Data-parallel ranks have different numbers of tokens."""
    world_size, changes = MOE[layout]
    found = gloo_world(world_size).run(train_steps, *models(), changes | {"megatron": ALL_GATHER})[0]
    assert_equal_runs(found, one_process)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["", "TP2+SPxETP2xEP2"])
def test_other_options(layout, name, gloo_world, one_process):
    world_size, changes = MOE[layout] if layout else (1, {})
    found = gloo_world(world_size).run(train_steps, *models(), changes | {"megatron": OPTIONS[name]})[0]
    assert_equal_runs(found, one_process)


def rollouts(rank, world_size, changes):
    """Return the completions of a student, of which the ranks have prompts of different lengths."""
    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh

    mesh, student, _, _ = build(models()[0], None, changes | NO_TEACHER)
    prompts = [[5 + length] * length for length in (1, 9, 4, 2)]
    own = prompts[mesh.dp.rank() :: mesh.dp.size()]
    sampling = Sampling(max_completion_length=5, temperature=0.0, ignore_eos=True)
    found = MegatronEngine(student.model, [2]).generate(own, sampling, range(len(own)))
    destroy_mesh()
    return dict(zip(map(tuple, own), (one.token_ids for one in found), strict=True))


@pytest.mark.parametrize("layout", ["EP2", "CP2xEP2"])
def test_rollouts_with_the_all_gather_dispatcher(layout, gloo_world):
    world_size, changes = MOE[layout]
    found = gloo_world(world_size).run(rollouts, changes | {"megatron": ALL_GATHER})
    expected = gloo_world(1).run(rollouts, {})[0]
    assert {prompt: tokens for one in found for prompt, tokens in one.items()} == expected


def gradients_of_family(rank, world_size, path, changes):
    """Return the gradients of one step of a family's checkpoint."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, _, batches = build(path, None, changes | NO_TEACHER)
    microbatches = next(iter(batches))
    student.compute_gradients(microbatches, [None] * len(microbatches), force_all_reduce=True)
    found = named_gradients(student)
    destroy_mesh()
    return found


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("layout", ["", "EP2"])
def test_the_shared_expert_is_computed_while_tokens_are_sent(layout, gloo_world):
    path = tiny_family("deepseek_v3")
    world_size, changes = MOE[layout] if layout else (1, {})
    overlapped = changes | {"megatron": {"moe_shared_expert_overlap": True}}
    expected = gloo_world(1).run(gradients_of_family, path, {})[0]
    assert_equal_gradients(gloo_world(world_size).run(gradients_of_family, path, overlapped)[0], expected)


def frozen_run(rank, world_size, path, changes):
    """Return the weights before and after two steps, and the number of routers' parameters with optimizer state."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, _, batches = build(path, None, changes | NO_TEACHER)
    before, names = weights_of(student), [name for chunk in student.chunks for name, _ in _trained(chunk)]
    for _, microbatches in zip(range(2), batches, strict=False):
        student.compute_gradients(microbatches, [None] * len(microbatches))
        student.update()
    found = before, weights_of(student), sum(".router." in name for name in names)
    destroy_mesh()
    return found


def _trained(chunk):
    return [(name, parameter) for name, parameter in chunk.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("layout", ["", "TP2+SPxEP2", "PP2xEP2"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_frozen_routers_keep_their_bits(family, layout, gloo_world):
    """Also the correction biases of balancing without a loss, which are no parameters."""
    path = tiny_family(family)
    world_size, changes = MOE[layout] if layout else (1, {})
    changes = changes | {"megatron": {"freeze_moe_router": True}, "train": {"moe_aux_loss_coeff": 0.1}}
    before, after, trained_routers = gloo_world(world_size).run(frozen_run, path, changes)[0]
    assert trained_routers == 0
    routers = [name for name in before if ".gate." in name and "proj" not in name]
    assert len(routers) >= 3
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name in routers), name
