"""How a global batch is divided into microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.vision.processing import ImageProcessing

if TYPE_CHECKING:  # it imports Megatron-Core, which reading and packing rows does not need
    from megatron_gkd.runtime.mesh import Mesh


@dataclass(frozen=True)
class BatchConfig:
    """Batch sizes, and the place of one rank in them.

    Attributes:
        global_batch_size: rows of a step over all ranks, packed or not.
        micro_batch_size: rows of a microbatch where `packing` is false.
        packing: fill microbatches with whole rows, up to `max_length` tokens each.
        max_length: tokens of a packed microbatch; a single row may exceed it.
        dp_rank: data-parallel rank.
        dp_size: number of data-parallel ranks.
        cp_rank: context-parallel rank.
        cp_size: number of context-parallel ranks.
        pad_multiple: each sequence is padded to a multiple of this.
        pad_token_id: id of padding.
        total_multiple: each microbatch is padded to a multiple of this.
        microbatch_multiple: the number of microbatches of a rank is a multiple of this (interleaved pipelines need it).
        equal_lengths: pad all microbatches of a rank and step to the longest of them.
        images: what the student's processor makes of images; None for a text model.
        needs_pixels: whether this rank's model reads pixels: it has the first pipeline stage of a multimodal model.
        max_patches: most patches of the images in a packed microbatch; a single row may exceed it. None: any number.
    """

    global_batch_size: int
    micro_batch_size: int
    packing: bool
    max_length: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    pad_multiple: int
    pad_token_id: int
    total_multiple: int = 1
    microbatch_multiple: int = 1
    equal_lengths: bool = False
    images: ImageProcessing | None = None
    needs_pixels: bool = False
    max_patches: int | None = None

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, mesh: Mesh, pad_token_id: int, images: ImageProcessing | None = None
    ) -> BatchConfig:
        """Build what training and validation loaders share, for this rank of the student.

        Args:
            recipe: the recipe.
            mesh: the ranks.
            pad_token_id: id of padding.
            images: what the student's processor makes of images; None for a text model.
        """
        layout = mesh.layout
        return cls(
            global_batch_size=recipe.train.global_batch_size,
            micro_batch_size=recipe.train.micro_batch_size,
            packing=recipe.data.packing,
            max_length=recipe.data.max_length,
            dp_rank=mesh.dp.rank(),
            dp_size=mesh.dp.size(),
            cp_rank=mesh.cp.rank(),
            cp_size=mesh.cp.size(),
            pad_multiple=layout.pad_multiple,
            pad_token_id=pad_token_id,
            total_multiple=layout.total_multiple,
            # The interleaved schedule needs a multiple of the pipeline's length, and one shape for all.
            microbatch_multiple=layout.pipeline if layout.virtual_pipeline else 1,
            equal_lengths=layout.virtual_pipeline is not None,
            images=images,
            needs_pixels=images is not None and mesh.pp.rank() == 0,
            max_patches=recipe.data.max_patches,
        )
