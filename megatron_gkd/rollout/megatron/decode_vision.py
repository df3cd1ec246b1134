"""What a multimodal model reads in a forward pass of decoding: positions, and the pixels of new prompts.

The positions of a prompt depend on its images, and its completion counts on from that of its last token: a decoded
token's position is not its place in the sequence. The tower runs once for each image, when its prompt does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_gkd.data.vision.expansion import contract_images
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.inputs import VisionInputs
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.video_files import require_readable
from megatron_gkd.rollout.base import Images
from megatron_gkd.rollout.megatron.decode_batch import DecodeInputs, DecodeSequence, PromptImages
from megatron_gkd.runtime.agreement import run_on_all
from megatron_gkd.runtime.context_parallel import context_parallel_indices
from megatron_gkd.runtime.mesh import Mesh


class DecodeVision:
    """Make the vision inputs of forward passes of decoding.

    Args:
        processing: what the model's processor makes of images.
        mesh: pixels are decoded on its first pipeline stage.
    """

    def __init__(self, processing: ImageProcessing, mesh: Mesh) -> None:
        self.processing, self.cp = processing, mesh.cp
        self.needs_pixels = mesh.pp.rank() == 0

    @property
    def length_multiple(self) -> int:
        """A forward pass has a multiple of so many tokens on each rank: the model divides those of all in this way."""
        return 1 if self.cp.size() == 1 else 2

    def require_readable(self, images: Images) -> None:
        """Read the images of all prompts once, before forward passes in which other ranks wait for those that do.

        All ranks must call it together.

        Raises:
            UserError: in all ranks; an image can't be read, or is not the one that was tokenized.
        """
        needed = [image for of_prompt in images for image in of_prompt] if self.needs_pixels else []

        def read() -> None:
            for image in needed:
                require_readable(image)

        run_on_all(read)

    def read_prompt(self, prompt: Sequence[int], images: tuple[Image, ...]) -> PromptImages:
        """Return a prompt's images and positions.

        Raises:
            ValueError: it does not have the tokens of its images, or has others.
        """
        ids = np.asarray(prompt, dtype=np.int64)
        contract_images(ids, images, self.processing)
        return PromptImages(images, self.processing.positions(ids, images))

    def build(self, inputs: DecodeInputs, sequences: Sequence[DecodeSequence]) -> VisionInputs:
        """Return the vision inputs of a forward pass.

        Args:
            inputs: its tokens, on the CPU.
            sequences: all in progress, in their order in `inputs`.

        Raises:
            UserError: an image can't be read, or is not the one that was tokenized.
        """
        positions = [_next_positions(sequence, self.processing.position_rows) for sequence in sequences]
        missing = inputs.input_ids.shape[1] - sum(part.shape[1] for part in positions)
        positions.append(np.zeros((self.processing.position_rows, missing), dtype=np.int64))
        whole = torch.from_numpy(np.concatenate(positions, axis=1))
        pixels = {}
        if self.needs_pixels:
            new = [sequence.vision for sequence in sequences if sequence.vision and not sequence.token_ids]
            pixels = self.processing.pixels([image for one in new for image in one.images])
        return VisionInputs(self._whole_ids(inputs), whole.unsqueeze(1) if len(whole) > 1 else whole, pixels)

    def _whole_ids(self, inputs: DecodeInputs) -> torch.Tensor:
        """Return the ids that the model divides so that this context-parallel rank gets its own.

        Other ranks have sequences of their own, whose tokens this one need not embed.
        """
        if self.cp.size() == 1:
            return inputs.input_ids
        whole = torch.zeros(1, inputs.total_length, dtype=torch.int64)
        whole[:, context_parallel_indices(inputs.cu_seqlens, self.cp.rank(), self.cp.size())] = inputs.input_ids
        return whole


def _next_positions(sequence: DecodeSequence, num_rows: int) -> np.ndarray:
    """Return the positions of the tokens that a forward pass takes of a sequence, int64 [num_rows, tokens]."""
    vision = sequence.vision
    if vision is None:
        raise ValueError("a multimodal model's sequences have positions: see `DecodeVision.read_prompt`")
    if not sequence.token_ids:
        return vision.positions
    return np.full((num_rows, 1), vision.first_position + len(sequence.token_ids) - 1)
