"""Placeholders of images in the tokens of a row, and the tokens that replace them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.vision.expansion import find_image_tokens, replace_labeled_tokens
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.parts import WRONG_COUNT
from megatron_gkd.data.vision.processing import ImageProcessing, placeholder_ids, placeholder_of

LITERAL = "placeholder in a text"  # why a row is bad


def expand_placeholders(
    input_ids: np.ndarray, labels: np.ndarray, images: Sequence[Image], processing: ImageProcessing
) -> tuple[np.ndarray, np.ndarray]:
    """Replace each placeholder of a rendered row by the tokens of its image, which are not trained on.

    Args:
        input_ids: int64 [L], with one placeholder for each image.
        labels: shifted labels, int64 [L].
        images: those of the row, in order.
        processing: of the student.

    Returns:
        Token ids and shifted labels, int64 [L'].

    Raises:
        BadRow: "chat template": it renders other than one placeholder for each image, or one in a response.
    """
    places = np.flatnonzero(np.isin(input_ids, placeholder_ids(processing)))
    if len(places) != len(images):
        detail = f"it writes {len(places)} placeholders of images for a row that has {len(images)} images"
        raise BadRow("chat template", detail)
    if any(input_ids[place] != placeholder_of(image, processing) for place, image in zip(places, images, strict=True)):
        raise BadRow("chat template", "it writes images and videos in another order than the row has them")
    if processing.position_rows > 1 and (np.diff(places) == 1).any():
        # Positions are computed from runs of image tokens: two images without a token between them would be one.
        raise BadRow("chat template", "it writes nothing between two images")
    if np.isin(labels, placeholder_ids(processing)).any():
        raise BadRow("chat template", "it puts an image into a turn that is trained on")
    spans = [slice(place, place + 1) for place in places.tolist()]
    return replace_labeled_tokens((input_ids, labels), spans, [processing.tokens(image) for image in images])


def require_tokens(input_ids: Sequence[int], images: Sequence[Image], processing: ImageProcessing) -> None:
    """Check that token ids as they were written have the tokens of their images, in order, and no others.

    Raises:
        BadRow: "number of images": they have others.
    """
    ids = np.array(input_ids, dtype=np.int64)
    is_rest = np.ones(len(ids), dtype=bool)
    try:
        spans = find_image_tokens(ids, images, processing)
    except ValueError as error:
        raise BadRow(WRONG_COUNT, f"the token ids have no place for an image: {error}") from error
    of_images = set(placeholder_ids(processing) if images else processing.reserved_ids)
    for span in spans:
        is_rest[span] = False
        of_images |= set(ids[span].tolist())
    if np.isin(ids[is_rest], list(of_images)).any():
        raise BadRow(WRONG_COUNT, f"the token ids have tokens of more images than the {len(images)} of the row")


def refuse_literals(row: Any, processing: ImageProcessing, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that no text of a row has a token that stands for an image, video or audio.

    Args:
        row: texts, lists and dictionaries.
        processing: of the student.
        tokenizer: of the student.

    Raises:
        BadRow: "placeholder in a text".
    """
    names = [tokenizer.convert_ids_to_tokens(id_) for id_ in processing.reserved_ids]
    for text in _texts(row):
        for name in names:
            if isinstance(name, str) and name in text:
                raise BadRow(LITERAL, f"{name!r} stands for an image, and no text of a row may have it")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in value.values() for text in _texts(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _texts(item))
