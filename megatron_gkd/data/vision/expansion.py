"""The tokens of images inside a tokenized row: where they are, and their replacement by others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_gkd.data.sample import IGNORED_LABEL, Sample
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.processing import ImageProcessing, placeholder_ids, placeholder_of


def find_image_tokens(input_ids: np.ndarray, images: Sequence[Image], processing: ImageProcessing) -> list[slice]:
    """Return where the tokens of each image are, in order.

    Args:
        input_ids: int64 [L], with the tokens of all images in place.
        images: those of the sequence, in order.
        processing: made the tokens.

    Raises:
        ValueError: the sequence does not have the tokens of an image.
    """
    spans: list[slice] = []
    start = 0
    for image in images:
        tokens = np.asarray(processing.tokens(image), dtype=np.int64)
        starts = start + np.flatnonzero(input_ids[start : len(input_ids) - len(tokens) + 1] == tokens[0])
        found = next((at for at in starts.tolist() if np.array_equal(input_ids[at : at + len(tokens)], tokens)), None)
        if found is None:
            raise ValueError(f"image {len(spans)} of {len(images)} has no tokens in the sequence")
        spans.append(slice(found, found + len(tokens)))
        start = found + len(tokens)
    return spans


def replace_tokens(ids: np.ndarray, spans: Sequence[slice], tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """Return `ids`, int64 [L], with `tokens` in place of each span."""
    parts, start = [], 0
    for span, inserted in zip(spans, tokens, strict=True):
        parts += [ids[start : span.start], np.asarray(inserted, dtype=np.int64)]
        start = span.stop
    return np.concatenate([*parts, ids[start:]])


def replace_labeled_tokens(
    ids_and_labels: tuple[np.ndarray, np.ndarray], spans: Sequence[slice], tokens: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and shifted labels, both int64 [L], with `tokens` in place of each span; none of them is trained on.

    What follows a span may be: the last of its tokens predicts it.
    """
    ids, labels = ids_and_labels
    of_tokens = [
        [IGNORED_LABEL] * (len(inserted) - 1) + [int(labels[span.stop - 1])]
        for span, inserted in zip(spans, tokens, strict=True)
    ]
    return replace_tokens(ids, spans, tokens), replace_tokens(labels, spans, of_tokens)


def contract_images(input_ids: np.ndarray, images: Sequence[Image], processing: ImageProcessing) -> np.ndarray:
    """Return the sequence with one placeholder for each image, as it was rendered.

    Raises:
        ValueError: see `find_image_tokens`; or the sequence has tokens of other images, too.
    """
    spans = find_image_tokens(input_ids, images, processing)
    rendered = replace_tokens(input_ids, spans, [[placeholder_of(image, processing)] for image in images])
    surplus = int(np.isin(rendered, placeholder_ids(processing)).sum()) - len(images)
    if surplus:
        raise ValueError(f"the sequence has {surplus} tokens of images beside those of its {len(images)} images")
    return rendered


def replace_image_tokens(sample: Sample, old: ImageProcessing, new: ImageProcessing) -> Sample:
    """Return the sample with another processor's tokens of its images, and the same labels without weights, in order.

    Args:
        sample: without a prompt of the teacher's own.
        old: made the tokens of its images.
        new: makes those that replace them.

    Raises:
        ValueError: see `find_image_tokens`.
    """
    if not sample.images:
        return sample
    spans = find_image_tokens(sample.input_ids, sample.images, old)
    tokens = [new.tokens(image) for image in sample.images]
    input_ids, labels = replace_labeled_tokens((sample.input_ids, sample.labels), spans, tokens)
    return replace(sample, input_ids=input_ids, labels=labels, label_weights=None, response_start=None)
