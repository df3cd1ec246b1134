"""Slips of Megatron-Core (0.16 to 0.19) that do not depend on the device, put right."""

from __future__ import annotations

import inspect


def apply_corrections() -> None:
    """Idempotent. Before a model is built."""
    _define_missing_names()
    _scale_aux_loss_by_all_tokens()


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


def _scale_aux_loss_by_all_tokens() -> None:
    """Give the load-balancing loss the same gradient under every layout.

    Under `calculate_per_token_loss` each rank multiplies its share of the loss by a token count that must be the whole
    microbatch's, whatever its tokens are divided over. Megatron passes the rank's own count, which differs between
    ranks where padding does, and which an in-place reduction overwrites with the whole count where there is a padding
    mask; later releases multiply by the number of ranks on top.
    """
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
    from megatron.core.transformer.moe import router

    multiplies = "tp_cp_group.size()" in inspect.getsource(router.TopKRouter.attach_and_log_load_balancing_loss)

    def get_tokens_per_expert_and_token_count(routing_map, reduce_group, topk=None, with_padding_mask=False):
        tokens_per_expert = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), reduce_group)
        if with_padding_mask:
            tokens = tokens_per_expert.sum() / topk
        else:
            tokens = routing_map.shape[0] * reduce_group.size()
        return tokens_per_expert, tokens / reduce_group.size() if multiplies else tokens, tokens

    router.get_tokens_per_expert_and_token_count = get_tokens_per_expert_and_token_count
