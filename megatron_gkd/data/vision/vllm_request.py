"""vLLM's route that takes images, for teachers and rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gkd.data.vision.data_uri import as_data_uri
from megatron_gkd.data.vision.image import Image

GENERATE = "/inference/v1/generate"
"""vLLM's route for token ids and images (0.32, with --enable-scale-out). /v1/completions takes no images, and chat
completions no token ids."""


def build_generation_body(
    model: str, token_ids: Sequence[int], images: Sequence[Image], sampling_params: dict[str, Any]
) -> dict[str, Any]:
    """Return the JSON of a request to `GENERATE`; the response has the prompt's tokens, with those of images in place.

    Args:
        model: the name that the server serves it under.
        token_ids: of the prompt, with one placeholder for each image.
        images: of the prompt, in order.
        sampling_params: vLLM's.

    Raises:
        UserError: an image can't be read.
    """
    return {
        "model": model,
        "token_ids": list(token_ids),
        "content_parts": [{"type": "image_url", "url": as_data_uri(image)} for image in images],
        "return_token_ids": True,
        "sampling_params": sampling_params,
    }
