"""Work around bugs of Megatron-Core that do not depend on the device.

Each function names the upstream code and the releases that were read, and when it can be deleted. See
`docs/upstream_defects.md`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor


def apply_megatron_workarounds() -> None:
    """Apply all workarounds, before a model is built. Idempotent."""
    _define_missing_names()
    _weight_balancing_loss_by_labels()


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
