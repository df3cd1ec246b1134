"""Slips of Megatron-Core (0.16 to 0.19) that do not depend on the device, put right."""

from __future__ import annotations

import functools
import inspect


def apply_corrections() -> None:
    """Idempotent. Before a model is built."""
    _define_missing_names()
    _weight_balancing_loss_by_labels()


def _define_missing_names() -> None:
    """The MoE code asks whether these are None, but only Transformer Engine's import defines them."""
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
    """
    from megatron.core.transformer.moe import router

    attach = router.TopKRouter.attach_and_log_load_balancing_loss
    if hasattr(attach, "__wrapped__"):
        return
    multiplies = "tp_cp_group.size()" in inspect.getsource(attach)

    @functools.wraps(attach)
    def attach_and_log_load_balancing_loss(self, *args, valid_token_count=None, **kwargs):
        num_labels = getattr(self, "num_labels", None)
        if num_labels is not None:
            valid_token_count = num_labels / self.tp_cp_group.size() if multiplies else num_labels
        return attach(self, *args, valid_token_count=valid_token_count, **kwargs)

    router.TopKRouter.attach_and_log_load_balancing_loss = attach_and_log_load_balancing_loss
