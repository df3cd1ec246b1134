"""Settings of vLLM with which it makes the same tokens of images as a student's processor."""

from __future__ import annotations

import json
from typing import Any

from megatron_gkd.data.vision.processing import ImageProcessing


def processor_options(processing: ImageProcessing) -> dict[str, Any]:
    """Return vLLM's `mm_processor_kwargs` for images of the same sizes; none where `processing` has no limits."""
    size = processing.settings["image_processor"].get("size") or {}
    return {"size": dict(size)} if "longest_edge" in size else {}


def describe_remedy(processing: ImageProcessing | None) -> str:
    """Return the end of a message about a server that makes other tokens of images: how to start it."""
    options = {} if processing is None else processor_options(processing)
    return f"; start it with --mm-processor-kwargs '{json.dumps(options, sort_keys=True)}'" if options else ""
