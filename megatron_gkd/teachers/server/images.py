"""Images in requests to a server, and the request by which a server shows that it reads them."""

from __future__ import annotations

import base64
import hashlib
import io

import numpy as np
from PIL import Image as PillowImage

from megatron_gkd.data.vision.data_uri import PNG_URI
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.teachers.server.response import ScoreRequest

_PROBE_SIDE = 64  # pixels


def image_probe(known_ids: np.ndarray, processing: ImageProcessing) -> ScoreRequest:
    """Build a request with a gray image between known tokens, int64 [n], at least three."""
    image = _gray_image()
    before, after = known_ids[:1], known_ids[1:]
    rendered_ids = np.concatenate([before, [processing.placeholder_id], after])
    token_ids = np.concatenate([before, processing.tokens(image), after])
    positions = np.arange(len(token_ids) - len(after), len(token_ids) - 1)
    return ScoreRequest(token_ids, positions, (image,), rendered_ids)


def _gray_image() -> Image:
    encoded = io.BytesIO()
    PillowImage.new("RGB", (_PROBE_SIDE, _PROBE_SIDE), (127, 127, 127)).save(encoded, "PNG")
    content = encoded.getvalue()
    location = PNG_URI + base64.b64encode(content).decode()
    return Image(location, _PROBE_SIDE, _PROBE_SIDE, hashlib.sha256(content).hexdigest())
