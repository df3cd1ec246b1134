"""Work around bugs of Megatron-Core that do not depend on the device.

Each function names the upstream code and the releases that were read, and when it can be deleted. See
`docs/upstream_defects.md`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.runtime.token_gathering import gather_tokens_of_different_numbers


def apply_megatron_workarounds() -> None:
    """Apply all workarounds, before a model is built. Idempotent."""
    _define_missing_names()
    _weight_balancing_loss_by_labels()
    _weight_z_loss_by_labels()
    _recompute_without_fp8()
    gather_tokens_of_different_numbers()
    _measure_bf16_gradients_in_fp32()


def _define_missing_names() -> None:
    """Define names of Transformer Engine that the MoE code compares with None.

    Upstream: `megatron/core/transformer/moe/moe_utils.py`, 0.16.1 to 0.19.2: the names are assigned only where
    Transformer Engine can be imported, so that without it they raise NameError. Delete this once every release that
    pyproject.toml allows assigns None there.
    """
    from megatron.core.transformer.moe import moe_utils

    for name in (
        "te_general_gemm",
        "fused_permute",
        "fused_permute_with_probs",
        "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs",
        "fused_unpermute",
        "fused_topk_with_score_function",
        "fused_compute_score_for_moe_aux_loss",
        "fused_moe_aux_loss",
    ):
        if not hasattr(moe_utils, name):
            setattr(moe_utils, name, None)


def _weight_balancing_loss_by_labels() -> None:
    """Weight a microbatch's load-balancing loss by its share of the global batch's labels, under every layout.

    Under `calculate_per_token_loss` all gradients are divided by the number of labels in the global batch. Megatron
    multiplies the balancing loss by a count of the microbatch's tokens, so that long prompts raise its coefficient. The
    count is also the rank's own, which differs between ranks where padding does, and which an in-place reduction
    overwrites with the whole count where there is a padding mask; later releases multiply by the number of ranks on
    top. Here it is `num_labels` of the router (see `models.moe`), the same on every rank; None leaves Megatron's.

    Upstream: `megatron/core/transformer/moe/router.py`, `TopKRouter.attach_and_log_load_balancing_loss`, 0.16.1 to
    0.19.2. Delete this once Megatron takes the count from the caller under `calculate_per_token_loss`.
    """
    from megatron.core.transformer.moe import router

    attach = router.TopKRouter.attach_and_log_load_balancing_loss
    if hasattr(attach, "__wrapped__"):
        return
    multiplies = "tp_cp_group.size()" in inspect.getsource(attach)

    @functools.wraps(attach)
    def attach_and_log_load_balancing_loss(
        self: router.TopKRouter, *args: Any, valid_token_count: float | Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        num_labels = getattr(self, "num_labels", None)
        if num_labels is not None:
            valid_token_count = num_labels / self.tp_cp_group.size() if multiplies else num_labels
        return attach(self, *args, valid_token_count=valid_token_count, **kwargs)

    router.TopKRouter.attach_and_log_load_balancing_loss = attach_and_log_load_balancing_loss


def _weight_z_loss_by_labels() -> None:
    """Weight a microbatch's z-loss by its share of the global batch's labels, under every layout.

    The defect is that of the balancing loss, above. Megatron also divides by the number of tensor- and context-parallel
    ranks, each of which has tokens of its own that are summed up: the coefficient shrinks with them. Here the mean of
    the squared logarithms is over the microbatch's tokens on all of them.

    Upstream: `megatron/core/transformer/moe/router.py`, `TopKRouter.apply_z_loss`, 0.16.1. Delete this once Megatron
    takes the count from the caller under `calculate_per_token_loss`.
    """
    from megatron.core.transformer.moe import router
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    apply = router.TopKRouter.apply_z_loss
    if hasattr(apply, "__wrapped__"):
        return

    @functools.wraps(apply)
    def apply_z_loss(
        self: router.TopKRouter, logits: Tensor, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        coefficient, num_labels = self.config.moe_z_loss_coeff, getattr(self, "num_labels", None)
        if coefficient is None or num_labels is None:
            return apply(self, logits, padding_mask=padding_mask, **kwargs)
        if not self.training or not torch.is_grad_enabled():
            return logits
        squares = torch.logsumexp(logits, dim=-1).square()
        valid = torch.ones_like(squares) if padding_mask is None else (~padding_mask).to(squares.dtype)
        count = valid.sum()
        dist.all_reduce(count, group=self.tp_cp_group)
        loss = coefficient * num_labels * (squares * valid).sum() / count.clamp(min=1)
        return MoEAuxLossAutoScaler.apply(logits, loss)

    router.TopKRouter.apply_z_loss = apply_z_loss


def _recompute_without_fp8() -> None:
    """Let modules whose outputs are recomputed run without Transformer Engine.

    `CheckpointWithoutOutput` takes its default, False, for FP8, since it is not None, and then calls Transformer
    Engine: NameError without it.

    Upstream: `megatron/core/tensor_parallel/random.py`, 0.16.1. Delete this once `fp8=False` means no FP8 there.
    """
    from megatron.core.tensor_parallel import random

    initialize = random.CheckpointWithoutOutput.__init__
    if hasattr(initialize, "__wrapped__"):
        return

    @functools.wraps(initialize)
    def __init__(self: random.CheckpointWithoutOutput, fp8: Any = None, **kwargs: Any) -> None:  # noqa: N807
        initialize(self, fp8 or None, **kwargs)

    random.CheckpointWithoutOutput.__init__ = __init__


def _measure_bf16_gradients_in_fp32() -> None:
    """Compute the norm of bf16 gradients in fp32: without Transformer Engine and apex each tensor's is rounded to bf16.

    Upstream: `megatron/core/utils.py`, `local_multi_tensor_l2_norm`, 0.16.1. Delete this once it names a dtype.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list, per_tensor: bool, *args: Any) -> tuple:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensors in tensor_lists for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None
