"""Prompts as vLLM takes them: one placeholder for each image, which vLLM replaces by the tokens of its own processor.

Its processor may have other limits than the student's, so the tokens that it makes are compared with ours. Prompts with
all tokens in place would be wrong without an error: vLLM 0.32 replaces the first of an image's tokens and leaves the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gkd.data.vision.expansion import contract_images
from megatron_gkd.data.vision.image import Image, Video
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.vllm_settings import describe_remedy
from megatron_gkd.errors import UserError
from megatron_gkd.rollout.base import Images


@dataclass(frozen=True)
class VllmPrompt:
    """One prompt.

    Attributes:
        token_ids: with the tokens of all images in place: what vLLM must make of `rendered_ids`.
        rendered_ids: with one placeholder for each image.
        images: of the prompt, in order.
    """

    token_ids: Sequence[int]
    rendered_ids: Sequence[int]
    images: tuple[Image, ...] = ()


def build_prompts(
    prompts: Sequence[Sequence[int]], images: Images | None, processing: ImageProcessing | None
) -> list[VllmPrompt]:
    """Return the prompts of `RolloutEngine.generate` for vLLM, which get images alone.

    Args:
        prompts: token ids, with the tokens of all images in place.
        images: of each prompt; None where no prompt has any.
        processing: made the tokens of the images.

    Raises:
        ValueError: a prompt does not have the tokens of its images, or there is no processing for them.
        UserError: a prompt has a video.
    """
    for image in (image for some in images or () for image in some):
        if isinstance(image, Video):
            raise UserError(f"{image.location}: vLLM is sent no videos; rows with videos need rollout.engine: megatron")
    return [
        _build_prompt(index, prompt, () if images is None else images[index], processing)
        for index, prompt in enumerate(prompts)
    ]


def _build_prompt(
    index: int, prompt: Sequence[int], images: tuple[Image, ...], processing: ImageProcessing | None
) -> VllmPrompt:
    if processing is None:
        if images:
            raise ValueError(f"prompt {index} has images, and the model is one of text")
        return VllmPrompt(prompt, prompt)
    try:
        rendered = contract_images(np.asarray(prompt, dtype=np.int64), images, processing)
    except ValueError as error:
        raise ValueError(f"prompt {index}: {error}") from error
    return VllmPrompt(prompt, rendered.tolist(), images)


def require_same_tokens(
    prompt: VllmPrompt, found: Sequence[int] | None, processing: ImageProcessing | None, where: str
) -> None:
    """Check the tokens that vLLM made of a prompt with images.

    Args:
        prompt: what it got.
        found: the tokens that it returned.
        processing: made the tokens of the images.
        where: begins the message.

    Raises:
        UserError: they are not those of the prompt.
    """
    if not prompt.images or found == list(prompt.token_ids):
        return
    raise UserError(
        f"{where}: vLLM's image processor makes {len(found or [])} tokens of a prompt with "
        f"{prompt.images[0].location}, and that of student.model {len(prompt.token_ids)}; both need the same "
        f"settings{describe_remedy(processing)}"
    )
