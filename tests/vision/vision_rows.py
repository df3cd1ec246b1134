"""Rows with images as the model reads them: ids, positions and pixels, made without a processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from vision_checkpoints import END_ID, IMAGE_ID, START_ID, VIDEO_ID

Grid = tuple[int, ...]
Spec = Sequence[int | Grid]
"""What a row is made of: numbers of words, images by their height and width in patches, videos by groups of frames,
height and width."""
SPECS: list[Spec] = [
    [3, (4, 4), 4, (4, 8), 6], [9], [2, (8, 4), 7], [12],
    [10], [4, (4, 4), 5], [11], [2, (4, 8), (4, 4), 8],
    [3, (4, 8), 9], [8], [5, (8, 8), 6], [1, (4, 4), 3, (4, 4), 4],
]  # fmt: skip
VIDEO_SPECS: list[Spec] = [[3, (3, 4, 4), 4, (4, 4), 6], [9], [2, (2, 4, 8), 7], [12]]
TEXT_SPECS: list[Spec] = [[9], [12], [10], [7]] * 3


@dataclass(frozen=True)
class ImageRow:
    """A row for a multimodal model.

    Attributes:
        sample: the tokens; all words but the first two are trained on.
        positions: [3, L] with multimodal rotary embeddings, otherwise [1, L].
        pixels: keyword arguments of the model's forward; empty without images.
    """

    sample: object
    positions: Tensor
    pixels: dict[str, Tensor]


def image_rows(config, specs: Sequence[Spec] = SPECS, seed: int = 5) -> list[ImageRow]:
    """Return random rows for a model with the configuration `config` of transformers."""
    generator = torch.Generator().manual_seed(seed)
    return [_row(config, spec, index, generator) for index, spec in enumerate(specs)]


def _row(config, spec: Spec, index: int, generator: torch.Generator) -> ImageRow:
    from megatron_gkd.data.sample import Sample

    ids: list[int] = []
    images, grids, videos, video_grids = [], [], [], []
    for part in spec:
        if isinstance(part, int):
            ids += torch.randint(4, 280, (part,), generator=generator).tolist()
            continue
        if len(part) == 3:
            ids += _video_ids(config, part, generator)
            videos.append(torch.randn(math.prod(part), 3 * 2 * 4 * 4, generator=generator))
            video_grids.append(list(part))
            continue
        height, width = part if has_grids(config) else (4, 4)
        ids += [START_ID, *[IMAGE_ID] * (height * width // 4), END_ID]
        if has_grids(config):
            images.append(torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator))
            grids.append([1, height, width])
        else:
            side = 336 if config.model_type == "llama4" else 16
            images.append(torch.randn(1, 3, side, side, generator=generator))
    pixels = {"pixel_values": torch.cat(images)} if images else {}
    if grids:
        pixels["image_grid_thw"] = torch.tensor(grids)
    if videos:
        pixels |= {"pixel_values_videos": torch.cat(videos), "video_grid_thw": torch.tensor(video_grids)}
    input_ids = torch.tensor(ids)
    labels = torch.full_like(input_ids, -100)
    is_word = input_ids[1:] < IMAGE_ID
    is_word[:1] = False
    labels[:-1][is_word] = input_ids[1:][is_word]
    sample = Sample(input_ids.numpy(), labels.numpy(), "dataset", index)
    return ImageRow(sample, _positions(config, input_ids, pixels), pixels)


def _video_ids(config, part: Grid, generator: torch.Generator) -> list[int]:
    """Return the tokens of a video; Qwen3-VL has words before each group of frames, for the time."""
    groups, height, width = part
    frame = [VIDEO_ID] * (height * width // 4)
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        return [START_ID, *frame * groups, END_ID]
    times = torch.randint(4, 280, (groups, 2), generator=generator).tolist()
    return [START_ID, *(id_ for time in times for id_ in (*time, START_ID, *frame, END_ID)), END_ID]


def token_types(input_ids: Tensor) -> Tensor:
    """Return 1 for tokens of images, 2 for those of videos and 0 for all others."""
    return (input_ids == IMAGE_ID).int() + 2 * (input_ids == VIDEO_ID).int()


def has_grids(config) -> bool:
    """Return whether the model reads patches of images of any size, and has three positions for each token."""
    return config.model_type not in ("internvl", "llama4")


def _positions(config, input_ids: Tensor, pixels: dict[str, Tensor]) -> Tensor:
    if not has_grids(config):
        return torch.arange(len(input_ids))[None]
    if not pixels:
        return torch.arange(len(input_ids)).expand(3, -1)
    from transformers import AutoModel

    model_class = AutoModel._model_mapping[type(config)]
    model = object.__new__(model_class)  # positions depend on the configuration alone
    torch.nn.Module.__init__(model)
    model.config = config
    positions, _ = model.get_rope_index(
        input_ids=input_ids[None],
        mm_token_type_ids=token_types(input_ids[None]),
        **{name: grids for name, grids in pixels.items() if name.endswith("_grid_thw")},
    )
    return positions[-3:, 0]


def collate_rows(rows: Sequence[ImageRow], mesh, total_length: int | None = None):
    """Return this rank's microbatch of rows, padded to `total_length`, and the whole one before it was split."""
    from megatron_gkd.data.microbatch import VisionInputs, collate, pad_to, shard_context_parallel
    from megatron_gkd.runtime.context_parallel import context_parallel_indices

    whole = collate([row.sample for row in rows], pad_multiple=mesh.layout.pad_multiple)
    lengths = whole.cu_seqlens.diff().tolist()
    if total_length is not None:
        whole = pad_to(whole, total_length)
    positions = [_continued(row.positions, length) for row, length in zip(rows, lengths, strict=True)]
    missing = whole.total_length - sum(lengths)
    if missing:
        positions.append(torch.arange(missing).expand(len(positions[0]), -1))
    together = torch.cat(positions, dim=1)
    together = together[:, None] if len(together) == 3 else together
    rank, size = mesh.cp.rank(), mesh.cp.size()
    if size > 1:
        together = together[..., context_parallel_indices(whole.cu_seqlens, rank, size)]
    names = {name for row in rows for name in row.pixels}
    pixels = {name: torch.cat([row.pixels[name] for row in rows if name in row.pixels]) for name in sorted(names)}
    vision = VisionInputs(whole.input_ids, together, pixels if mesh.pp.rank() == 0 else {})
    return replace(shard_context_parallel(whole, rank, size), vision=vision), whole


def _continued(positions: Tensor, length: int) -> Tensor:
    """Return the positions with padding's, which count on."""
    more = torch.arange(1, length - positions.shape[1] + 1)
    return torch.cat([positions, positions[:, -1:] + more], dim=1)


def padded_length(rows: Sequence[ImageRow], mesh) -> int:
    multiple = mesh.layout.pad_multiple
    return sum(-(-len(np.asarray(row.sample.input_ids)) // multiple) * multiple for row in rows)
