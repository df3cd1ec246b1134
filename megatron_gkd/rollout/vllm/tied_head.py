"""vLLM's packed copy of a tied head. Needs torch alone, so that a server can import it."""

from __future__ import annotations

from typing import Any


def repack_tied_head(model: Any) -> None:
    """Renew the packed copy of a tied head, by which vLLM multiplies on CPUs, from the embedding's new weights."""
    language = getattr(model, "language_model", model)  # of a multimodal model
    head, embedding = getattr(language, "lm_head", None), getattr(language.model, "embed_tokens", None)
    if head is not None and embedding is not None and head.weight is embedding.weight:
        head.quant_method.process_weights_after_loading(head)
