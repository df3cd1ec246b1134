"""Microbatches of several sequences in one row of tokens (the packed "thd" layout)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.data.sample import FROM_STUDENT, IGNORED_LABEL, PAD_TOKEN_ID, Sample
from megatron_gkd.data.vision.inputs import VisionInputs
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.runtime.context_parallel import context_parallel_indices

_BY_TOKEN = ("input_ids", "labels", "position_ids", "padding_mask", "from_dataset")


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
        label_weights: float32 [1, T], the factor of each label's loss; 1 where there is no label. None where all are 1.
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
    label_weights: Tensor | None = field(default=None, kw_only=True)

    @cached_property
    def label_positions(self) -> Tensor:
        """Positions of this context-parallel rank that are trained on: int64 [N], rising, on the device of `labels`."""
        return (self.labels.squeeze(0) != IGNORED_LABEL).nonzero().squeeze(1)

    @property
    def num_labels(self) -> int:
        """Number of positions of the whole microbatch that are trained on, over all context-parallel ranks."""
        return sum(sample.num_labels for sample in self.samples)

    @cached_property
    def total_length(self) -> int:
        """Padded tokens of the whole microbatch, over all context-parallel ranks."""
        return int(self.cu_seqlens[-1])

    def to(self, device: torch.device | str) -> Self:
        """Return the microbatch with its tensors on `device`."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in self._fields().items() if torch.is_tensor(value)
        }
        moved = replace(self, **tensors, vision=None if self.vision is None else self.vision.to(device))
        # The number of labels and the length depend on values: the host would wait for a device to compute them.
        vars(moved).update(label_positions=self.label_positions.to(device), total_length=self.total_length)
        return moved

    def without_vision(self) -> Self:
        """Return the microbatch as a text model reads it."""
        if self.vision is None:
            return self
        text = replace(self, vision=None)
        vars(text).update(label_positions=self.label_positions, total_length=self.total_length)
        return text

    def to_arrays(self) -> dict[str, Any]:
        """Return the fields by name, with NumPy arrays in place of tensors (which must be on the CPU)."""
        values = {name: value.numpy() if torch.is_tensor(value) else value for name, value in self._fields().items()}
        return values | {"vision": None if self.vision is None else self.vision.to_arrays()}

    def _fields(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> Microbatch:
        """Build a microbatch from what `to_arrays` returns; the tensors share the arrays' memory."""
        values: dict[str, Any] = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in arrays.items()
        }
        vision = arrays["vision"]
        return cls(**values | {"vision": None if vision is None else VisionInputs.from_arrays(vision)})


def collate(
    samples: Sequence[Sample],
    *,
    pad_multiple: int,
    total_multiple: int = 1,
    pad_token_id: int = PAD_TOKEN_ID,
    images: ImageProcessing | None = None,
) -> Microbatch:
    """Concatenate samples, each padded at its end to a multiple of `pad_multiple`, into a whole microbatch.

    One more sequence, of padding alone, makes the whole length a multiple of `total_multiple` where it is none.
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
    microbatch = Microbatch(
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
        label_weights=_collate_weights(samples, starts),
    )
    return pad_to(microbatch, padded_length(microbatch.total_length, total_multiple), pad_token_id)


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
    if microbatch.label_weights is not None:
        padding["label_weights"] = torch.ones(1, missing)
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


def concatenate(microbatches: Sequence[Microbatch]) -> Microbatch:
    """Join microbatches of one context-parallel rank into one of all their sequences, in order.

    Each sequence is sharded by itself, so that every rank has the same tokens of it as before.
    """
    if len(microbatches) == 1:
        return microbatches[0]
    first, *others = microbatches
    boundaries = [first.cu_seqlens]
    for one in others:
        boundaries.append(one.cu_seqlens[1:] + boundaries[-1][-1])
    columns: dict[str, Any] = {
        name: torch.cat([getattr(one, name) for one in microbatches], dim=1) for name in _BY_TOKEN
    }
    if any(one.label_weights is not None for one in microbatches):
        columns["label_weights"] = torch.cat([_weights_of(one) for one in microbatches], dim=1)
    vision = [one.vision for one in microbatches if one.vision is not None]
    return replace(
        first,
        **columns,
        cu_seqlens=torch.cat(boundaries),
        max_seqlen=max(one.max_seqlen for one in microbatches),
        num_rows=sum(one.num_rows for one in microbatches),
        samples=tuple(sample for one in microbatches for sample in one.samples),
        vision=VisionInputs.concatenate(vision) if vision else None,
    )


def shard_context_parallel(microbatch: Microbatch, rank: int, size: int) -> Microbatch:
    """Return the part of a whole microbatch that a context-parallel rank holds; see `context_parallel_indices`.

    `cu_seqlens`, `max_seqlen`, `num_rows`, `samples` and the pixels stay those of the whole.
    """
    if size == 1:
        return microbatch
    indices = context_parallel_indices(microbatch.cu_seqlens, rank, size)
    shards: dict[str, Any] = {name: getattr(microbatch, name)[:, indices] for name in _BY_TOKEN}
    if microbatch.label_weights is not None:
        shards["label_weights"] = microbatch.label_weights[:, indices]
    vision = None if microbatch.vision is None else microbatch.vision.select_positions(indices)
    return replace(microbatch, **shards, vision=vision)


def padded_length(length: int, pad_multiple: int) -> int:
    """Return the next multiple of `pad_multiple`."""
    return -(-length // pad_multiple) * pad_multiple


def _collate_weights(samples: Sequence[Sample], starts: np.ndarray) -> Tensor | None:
    """Return `Microbatch.label_weights` of samples that begin at `starts`, behind which is the total length."""
    if all(sample.label_weights is None for sample in samples):
        return None
    weights = np.ones(starts[-1], dtype=np.float32)
    for sample, start in zip(samples, starts, strict=False):
        if sample.label_weights is not None:
            weights[start : start + len(sample.label_weights)] = sample.label_weights
    return _row(weights)


def _weights_of(microbatch: Microbatch) -> Tensor:
    if microbatch.label_weights is not None:
        return microbatch.label_weights
    return torch.ones_like(microbatch.labels, dtype=torch.float32)


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).unsqueeze(0)
