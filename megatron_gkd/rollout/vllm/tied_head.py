"""vLLM's packed copy of a tied head. Needs torch alone, so that a server can import it."""

from __future__ import annotations

from torch import nn


def repack_tied_head(model: nn.Module) -> None:
    """On CPUs vLLM multiplies by a packed copy of the head, which a new embedding that it is tied to does not reach."""
    head, embedding = getattr(model, "lm_head", None), getattr(model.model, "embed_tokens", None)
    if head is not None and head.weight is embedding.weight:
        head.quant_method.process_weights_after_loading(head)
