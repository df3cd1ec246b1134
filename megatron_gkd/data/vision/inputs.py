"""What a multimodal model reads beside a microbatch's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.data.sample import Sample
from megatron_gkd.data.vision.processing import ImageProcessing


@dataclass(frozen=True)
class VisionInputs:
    """What a multimodal model reads beside a microbatch's tokens; text alone has it, too, without pixels.

    Attributes:
        whole_input_ids: int64 [1, T * CP], tokens of all context-parallel ranks: images are put in before the split.
        position_ids: of this context-parallel rank, int64 [3, 1, T] with multimodal rotary embeddings, otherwise
            [1, T].
        pixels: keyword arguments of the model's forward, over all images of the microbatch; empty where it has none,
            and after the first pipeline stage. They stay in host memory until their microbatch is computed: those of
            a step would take gigabytes of a device's.
    """

    whole_input_ids: Tensor
    position_ids: Tensor
    pixels: dict[str, Tensor]

    @classmethod
    def from_samples(
        cls, samples: Sequence[Sample], padded_lengths: Sequence[int], whole_input_ids: Tensor, images: ImageProcessing
    ) -> VisionInputs:
        """Compute the positions of a whole microbatch, which count on in the padding; it has no pixels yet.

        Args:
            samples: the rows of the microbatch.
            padded_lengths: tokens of each with its padding.
            whole_input_ids: int64 [1, T], all of them.
            images: what the model's processor makes of images.
        """
        positions = [
            _pad_positions(images.positions(sample.input_ids, sample.images), length)
            for sample, length in zip(samples, padded_lengths, strict=True)
        ]
        whole = torch.from_numpy(np.concatenate(positions, axis=1))
        return cls(whole_input_ids, whole.unsqueeze(1) if len(whole) > 1 else whole, {})

    @classmethod
    def concatenate(cls, parts: Sequence[VisionInputs]) -> VisionInputs:
        """Join the inputs of several microbatches, whose tokens and images come one after the other."""
        pixels: dict[str, list[Tensor]] = {}
        for name, value in ((name, value) for one in parts for name, value in one.pixels.items()):
            pixels.setdefault(name, []).append(value)
        return cls(
            torch.cat([one.whole_input_ids for one in parts], dim=1),
            torch.cat([one.position_ids for one in parts], dim=-1),
            {name: torch.cat(values) for name, values in pixels.items()},
        )

    def append_padding(self, ids: Tensor) -> VisionInputs:
        """Return the inputs with a sequence of padding alone, int64 [1, P], at the end of a whole microbatch."""
        positions = torch.arange(ids.shape[1]).expand(*self.position_ids.shape[:-1], -1)
        return replace(
            self,
            whole_input_ids=torch.cat([self.whole_input_ids, ids], dim=1),
            position_ids=torch.cat([self.position_ids, positions], dim=-1),
        )

    def select_positions(self, indices: Tensor) -> VisionInputs:
        """Return the inputs of the context-parallel rank that has these tokens of a whole microbatch."""
        return replace(self, position_ids=self.position_ids[..., indices])

    def to(self, device: torch.device | str) -> VisionInputs:
        """Return the inputs with tokens and positions on `device`."""
        return replace(self, whole_input_ids=self.whole_input_ids.to(device), position_ids=self.position_ids.to(device))

    def to_arrays(self) -> dict[str, Any]:
        """Return the fields by name, with NumPy arrays in place of tensors (which must be on the CPU)."""
        pixels = {name: value.numpy() for name, value in self.pixels.items()}
        return dict(whole_input_ids=self.whole_input_ids.numpy(), position_ids=self.position_ids.numpy(), pixels=pixels)

    @classmethod
    def from_arrays(cls, fields: dict[str, Any]) -> VisionInputs:
        """Build the inputs from what `to_arrays` returns; the tensors share the arrays' memory."""
        pixels = {name: torch.from_numpy(value) for name, value in fields["pixels"].items()}
        ids, positions = torch.from_numpy(fields["whole_input_ids"]), torch.from_numpy(fields["position_ids"])
        return cls(ids, positions, pixels)


def count_patches(sample: Sample, images: ImageProcessing | None) -> int:
    """Return the number of patches of a sample's images, for the student or the teacher, whichever reads more."""
    if images is None:
        return 0
    return max(sum(map(images.num_patches, some)) for some in (sample.images, sample.teacher_images or ()))


def _pad_positions(positions: np.ndarray, length: int) -> np.ndarray:
    """Return positions [R, L] continued to [R, length], counting on from the last."""
    missing = np.arange(1, length - positions.shape[1] + 1)
    return np.concatenate([positions, positions[:, -1:] + missing], axis=1)
