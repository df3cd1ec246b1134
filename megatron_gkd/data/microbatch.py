"""Microbatches of several sequences in one row of tokens (the packed "thd" layout)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.data.sample import FROM_STUDENT, IGNORED_LABEL, PAD_TOKEN_ID, Sample
from megatron_gkd.data.vision.inputs import VisionInputs
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.runtime.context_parallel import context_parallel_indices


@dataclass(frozen=True)
class Microbatch:
    """Concatenated sequences, each padded at its end, with causal attention inside each and none between them.

    Attributes:
        input_ids: int64 [1, T], the tokens of this context-parallel rank (T is the whole length / number of ranks).
        labels: int64 [1, T], already shifted; -100 where a position is not trained on.
        position_ids: int64 [1, T], position inside its own sequence.
        padding_mask: bool [1, T], true where padding.
        from_dataset: bool [1, T], true where the token belongs to a row that the student did not generate.
        cu_seqlens: int32 [S + 1], boundaries of the padded sequences of the whole microbatch, before the
            context-parallel split.
        max_seqlen: longest padded sequence of the whole microbatch.
        num_rows: number of sequences, S.
        samples: the rows behind the sequences, in order and whole on every context-parallel rank; sequences of padding
            alone, at the end, have none.
        vision: what a multimodal model reads beside the tokens; None for a text model.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    padding_mask: Tensor
    from_dataset: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_rows: int
    samples: tuple[Sample, ...]
    vision: VisionInputs | None = field(default=None, kw_only=True)

    @property
    def label_positions(self) -> Tensor:
        """Positions of this context-parallel rank that are trained on: int64 [N], rising, on the device of `labels`."""
        return (self.labels.squeeze(0) != IGNORED_LABEL).nonzero().squeeze(1)

    @property
    def num_labels(self) -> int:
        """Number of positions of the whole microbatch that are trained on, over all context-parallel ranks."""
        return sum(sample.num_labels for sample in self.samples)

    @property
    def total_length(self) -> int:
        """Padded tokens of the whole microbatch, over all context-parallel ranks."""
        return int(self.cu_seqlens[-1])

    def to(self, device: torch.device | str) -> Self:
        """Return the microbatch with its tensors on `device`."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **tensors, vision=None if self.vision is None else self.vision.to(device))

    def to_arrays(self) -> dict[str, Any]:
        """Return the fields by name, with NumPy arrays in place of tensors (which must be on the CPU)."""
        fields = {name: value.numpy() if torch.is_tensor(value) else value for name, value in vars(self).items()}
        return fields | {"vision": None if self.vision is None else self.vision.to_arrays()}

    @classmethod
    def from_arrays(cls, fields: dict[str, Any]) -> Microbatch:
        """Build a microbatch from what `to_arrays` returns; the tensors share the arrays' memory."""
        values: dict[str, Any] = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in fields.items()
        }
        vision = fields["vision"]
        return cls(**values | {"vision": None if vision is None else VisionInputs.from_arrays(vision)})


def collate(
    samples: Sequence[Sample],
    *,
    pad_multiple: int,
    pad_token_id: int = PAD_TOKEN_ID,
    images: ImageProcessing | None = None,
) -> Microbatch:
    """Concatenate samples, each padded at its end to a multiple of `pad_multiple`, into a whole microbatch.

    Padding has the id `pad_token_id` and the label -100, and continues the positions of its sequence. With `images`,
    the processing of a multimodal model, it has `vision`, without pixels (``add_pixels``).

    Raises:
        ValueError: there is no sample, or one without tokens.
    """
    if not samples or any(len(sample.input_ids) == 0 for sample in samples):
        raise ValueError("a microbatch needs at least one sample, and every sample at least one token")
    lengths = [len(sample.input_ids) for sample in samples]
    padded = [padded_length(length, pad_multiple) for length in lengths]
    starts = np.concatenate(([0], np.cumsum(padded)))
    input_ids = np.full(starts[-1], pad_token_id, dtype=np.int64)
    labels = np.full(starts[-1], IGNORED_LABEL, dtype=np.int64)
    padding_mask = np.ones(starts[-1], dtype=bool)
    for sample, start, length in zip(samples, starts, lengths, strict=False):
        input_ids[start : start + length] = sample.input_ids
        labels[start : start + length] = sample.labels
        padding_mask[start : start + length] = False
    from_dataset = np.repeat([sample.source != FROM_STUDENT for sample in samples], padded)
    position_ids = np.concatenate([np.arange(length, dtype=np.int64) for length in padded])
    whole_ids = _row(input_ids)
    return Microbatch(
        input_ids=whole_ids,
        labels=_row(labels),
        position_ids=_row(position_ids),
        padding_mask=_row(padding_mask),
        from_dataset=_row(from_dataset),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=max(padded),
        num_rows=len(samples),
        samples=tuple(samples),
        vision=None if images is None else VisionInputs.from_samples(samples, padded, whole_ids, images),
    )


def add_pixels(microbatch: Microbatch, images: ImageProcessing) -> Microbatch:
    """Decode the images of a microbatch that has `vision`, for the first pipeline stage of a multimodal model.

    Raises:
        UserError: an image cannot be read, or is not the one that was tokenized.
    """
    if microbatch.vision is None:
        raise ValueError("the microbatch was collated for a text model")
    pixels = images.pixels([image for sample in microbatch.samples for image in sample.images])
    return replace(microbatch, vision=replace(microbatch.vision, pixels=pixels))


def pad_to(microbatch: Microbatch, total_length: int, pad_token_id: int = PAD_TOKEN_ID) -> Microbatch:
    """Append one sequence of padding alone, so that a whole microbatch has `total_length` tokens."""
    missing = total_length - microbatch.total_length
    if missing == 0:
        return microbatch
    padding = {
        "input_ids": torch.full((1, missing), pad_token_id),
        "labels": torch.full((1, missing), IGNORED_LABEL),
        "position_ids": torch.arange(missing).unsqueeze(0),
        "padding_mask": torch.ones(1, missing, dtype=torch.bool),
        "from_dataset": torch.ones(1, missing, dtype=torch.bool),
    }
    end = torch.tensor([total_length], dtype=torch.int32)
    columns: dict[str, Any] = {
        name: torch.cat([getattr(microbatch, name), column], dim=1) for name, column in padding.items()
    }
    return replace(
        microbatch,
        **columns,
        vision=None if microbatch.vision is None else microbatch.vision.append_padding(padding["input_ids"]),
        cu_seqlens=torch.cat([microbatch.cu_seqlens, end]),
        max_seqlen=max(microbatch.max_seqlen, missing),
    )


def shard_context_parallel(microbatch: Microbatch, rank: int, size: int) -> Microbatch:
    """Return the part of a whole microbatch that a context-parallel rank holds; see `context_parallel_indices`.

    `cu_seqlens`, `max_seqlen`, `num_rows`, `samples` and the pixels stay those of the whole.
    """
    if size == 1:
        return microbatch
    indices = context_parallel_indices(microbatch.cu_seqlens, rank, size)
    by_token = ("input_ids", "labels", "position_ids", "padding_mask", "from_dataset")
    shards: dict[str, Any] = {name: getattr(microbatch, name)[:, indices] for name in by_token}
    vision = None if microbatch.vision is None else microbatch.vision.select_positions(indices)
    return replace(microbatch, **shards, vision=vision)


def padded_length(length: int, pad_multiple: int) -> int:
    """Return the next multiple of `pad_multiple`."""
    return -(-length // pad_multiple) * pad_multiple


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).unsqueeze(0)
