"""Images as data URIs, for servers that need no access to where the files lie."""

from __future__ import annotations

import base64
import io

from PIL import Image as PillowImage

from megatron_gkd.data.vision.files import load_image, read_encoded
from megatron_gkd.data.vision.image import Image

PNG_URI = "data:image/png;base64,"
_ORIENTATION = 0x0112  # the EXIF tag


def as_data_uri(image: Image) -> str:
    """Return an image as a data URI, so that a server needs no access to the file.

    The file's content is sent where any reader decodes it alike. An image that is to be turned, or to be converted to
    RGB, is sent as it was decoded here: servers treat these in other ways.

    Raises:
        UserError: it can't be read, or is not the image that was tokenized.
    """
    if image.location.startswith(PNG_URI):
        return image.location
    content = read_encoded(image)
    if not _is_plain(content):
        encoded = io.BytesIO()
        load_image(image).save(encoded, "PNG")
        content = encoded.getvalue()
    return PNG_URI + base64.b64encode(content).decode()


def _is_plain(content: bytes) -> bool:
    """Return whether an encoded image is upright and in RGB."""
    with PillowImage.open(io.BytesIO(content)) as image:
        return image.mode == "RGB" and image.getexif().get(_ORIENTATION, 1) == 1
