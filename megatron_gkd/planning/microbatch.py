"""Microbatches without memory, of the size that a recipe makes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_gkd.data.microbatch import Microbatch, padded_length
from megatron_gkd.data.vision.inputs import VisionInputs
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Layout


@dataclass(frozen=True)
class MicrobatchSize:
    """How many tokens a microbatch has.

    Attributes:
        sequences: number of sequences of one length.
        length: tokens of each, a multiple of what the layout needs.
        labels: tokens that are trained on, over all context-parallel ranks.
    """

    sequences: int
    length: int
    labels: int

    @classmethod
    def from_tokens(cls, tokens: int, longest: int, label_fraction: float, layout: Layout) -> MicrobatchSize:
        """Return the size of a microbatch of sequences no longer than `longest`.

        Args:
            tokens: of the microbatch, before padding.
            longest: tokens of the longest sequence.
            label_fraction: share of the tokens that are trained on.
            layout: of the model.
        """
        sequences = -(-tokens // longest)
        length = padded_length(-(-tokens // sequences), layout.pad_multiple)
        labels = max(layout.context, round(sequences * length * label_fraction))
        return cls(sequences, length, labels)

    @property
    def tokens(self) -> int:
        """Tokens over all context-parallel ranks."""
        return self.sequences * self.length


@dataclass(frozen=True)
class PlannedMicrobatch(Microbatch):
    """A microbatch on the meta device, whose boundaries alone have values.

    Attributes:
        size: its size.
        local_labels: number of labels of this context-parallel rank.
    """

    size: MicrobatchSize = field(kw_only=True)
    local_labels: int = field(kw_only=True)

    @classmethod
    def from_size(cls, size: MicrobatchSize, layout: Layout, axes_of_images: int = 0) -> PlannedMicrobatch:
        """Build one.

        Args:
            size: its size.
            layout: of the model.
            axes_of_images: of a model that reads images, numbers in a token's position: 1, or 3 with multimodal rotary
                embeddings; 0 of a text model. The microbatch has text alone.
        """
        device, local = portability.device(), size.tokens // layout.context
        ids, flags = (torch.empty(1, local, dtype=dtype, device=device) for dtype in (torch.int64, torch.bool))
        vision = None
        if axes_of_images:
            whole = torch.empty(1, size.tokens, dtype=torch.int64, device=device)
            shape = (3, 1, local) if axes_of_images == 3 else (1, local)
            vision = VisionInputs(whole, torch.empty(shape, dtype=torch.int64, device=device), {})
        return cls(
            input_ids=ids,
            labels=ids,
            position_ids=ids,
            padding_mask=flags,
            from_dataset=flags,
            cu_seqlens=torch.arange(size.sequences + 1, dtype=torch.int32, device="cpu") * size.length,
            max_seqlen=size.length,
            num_rows=size.sequences,
            samples=(),
            vision=vision,
            size=size,
            local_labels=-(-size.labels // layout.context),
        )

    @property
    def label_positions(self) -> Tensor:
        """See `Microbatch.label_positions`."""
        return torch.arange(self.local_labels, device=self.labels.device)

    @property
    def num_labels(self) -> int:
        """See `Microbatch.num_labels`."""
        return self.size.labels
