"""Fused kernels in training, in the place of those that need a GPU: functions that compute the same."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import lora_runs
import pytest
from checkpoints import tiny_checkpoint
from layouts import CP2, PP2, RECOMPUTE, SP, TP2
from lora_runs import with_lora
from training_layouts import assert_equal_runs, build, train_steps

GRADIENTS = {"megatron": {"gradient_accumulation_fusion": "on"}}
ROPE = {"megatron": {"apply_rope_fusion": "on"}}
LAYOUTS = {
    "tied": ("qwen3_tied", 1, {}),
    "untied": ("llama", 1, {}),
    "recomputed": ("qwen3_tied", 1, {"parallel": RECOMPUTE}),
    "overlapped": ("qwen3_tied", 2, {"parallel": {"overlap_grad_reduce": True, "distributed_optimizer": False}}),
    "TP2+SPxPP2": ("qwen3_tied", 4, {"parallel": TP2 | SP | PP2}),
}


class Kernel:
    """What Apex' kernel for the gradients of linear layers computes, and how often it did."""

    def __init__(self) -> None:
        self.calls = 0

    def wgrad_gemm_accum_fp32(self, x, output_gradient, main_grad):
        self.calls += 1
        main_grad += output_gradient.flatten(0, -2).t() @ x.flatten(0, -2)


@contextlib.contextmanager
def gradient_kernel():
    """Put the kernel in the place of Apex', and yield it."""
    from megatron_gkd.models import fusions

    from megatron.core.tensor_parallel import layers

    kernel = Kernel()
    with (
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(fusions, "_missing_gradient_accumulation", return_value=None),
    ):
        yield kernel


def with_gradient_kernel(rank, world_size, train, *arguments):
    """Return what `train` does, which must have called the kernel."""
    with gradient_kernel() as kernel:
        found = train(rank, world_size, *arguments)
    assert kernel.calls > 0
    return found


def models(family: str):
    return tiny_checkpoint(family, seed=2), tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, hidden_size=48)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_that_are_added_in_the_kernel(layout, gloo_world):
    """Beside those of the head, which the loss adds itself, and of an embedding with the same weight."""
    family, world_size, changes = LAYOUTS[layout]
    expected = gloo_world(world_size).run(train_steps, *models(family), changes)[0]
    arguments = train_steps, *models(family), changes | GRADIENTS
    assert_equal_runs(gloo_world(world_size).run(with_gradient_kernel, *arguments)[0], expected)


def test_gradients_of_adapters_that_are_added_in_the_kernel(gloo_world):
    expected = gloo_world(1).run(lora_runs.train_steps, *models("qwen3_tied"), with_lora({}))[0]
    arguments = lora_runs.train_steps, *models("qwen3_tied"), with_lora(GRADIENTS)
    assert_equal_runs(gloo_world(1).run(with_gradient_kernel, *arguments)[0], expected)


def build_without_apex(rank, world_size, student):
    """Build a student that accumulates gradients in Transformer Engine's kernels, as far as Megatron knows."""
    from megatron_gkd.models import fusions
    from megatron_gkd.runtime.mesh import destroy_mesh

    from megatron.core.tensor_parallel import layers

    with mock.patch.object(fusions, "_missing_gradient_accumulation", return_value=None):
        _, built, _, _ = build(student, None, GRADIENTS | {"teacher": {"teacher_kind": "none", "teacher_model": None}})
    destroy_mesh()
    return built.model.config.gradient_accumulation_fusion, layers._grad_accum_fusion_available


def test_the_head_is_built_without_apex(gloo_world):
    """Megatron refuses it although the loss, and not the layer, computes its gradient."""
    assert gloo_world(1).run(build_without_apex, models("qwen3_tied")[0]) == [(True, False)]


def rope_kernel(t, cu_seqlens, freqs, cp_size=1, cp_rank=0):
    """Rotate packed rows [T, heads, D] as Transformer Engine does: positions count from each row's start."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    group = SimpleNamespace(size=lambda: cp_size, rank=lambda: cp_rank)
    return _apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=group)


@contextlib.contextmanager
def rope_kernel_installed():
    from megatron_gkd.models import fusions

    from megatron.core.models.common.embeddings import rope_utils

    kernel = mock.Mock(side_effect=rope_kernel)
    with (
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb_thd", kernel),
        mock.patch.object(fusions, "_missing_rope", return_value=None),
    ):
        yield kernel


def train_with_rope_kernel(rank, world_size, *arguments):
    with rope_kernel_installed() as kernel:
        found = train_steps(rank, world_size, *arguments)
    assert kernel.call_count > 0
    return found


@pytest.mark.parametrize(("world_size", "changes"), [(1, {}), (2, {"parallel": CP2}), (1, {"data": {"packing": True}})])
def test_rotary_embeddings_of_packed_rows(world_size, changes, gloo_world):
    pair = models("qwen3_tied")
    expected = gloo_world(world_size).run(train_steps, *pair, changes)[0]
    found = gloo_world(world_size).run(train_with_rope_kernel, *pair, changes | ROPE)[0]
    assert_equal_runs(found, expected)


def sample(rank, world_size, student, changes):
    """Return completions, and whether the model is fused again afterwards."""
    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh

    with rope_kernel_installed() as kernel:
        _, built, _, _ = build(student, None, changes | {"teacher": {"teacher_kind": "none", "teacher_model": None}})
        sampling = Sampling(max_completion_length=6, temperature=0.0, ignore_eos=True)
        found = MegatronEngine(built.model, [2]).generate([[5, 6, 7], [8], [9, 10]], sampling, range(3))
        assert kernel.call_count == 0
    is_fused = built.model.config.apply_rope_fusion
    destroy_mesh()
    return [one.token_ids for one in found], is_fused


def test_rollouts_rotate_by_the_positions(gloo_world):
    """The kernel would give every decoded token the first position."""
    student = models("qwen3_tied")[0]
    expected, _ = gloo_world(1).run(sample, student, {})[0]
    assert gloo_world(1).run(sample, student, ROPE)[0] == (expected, True)
