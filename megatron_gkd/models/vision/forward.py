"""The forward pass of a multimodal chunk, and what it needs beside mcore-bridge's model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.vision.parts import language_model, towers, visual_of

PADDING_MASK = "padding_mask"


def prepare_forward(chunk: Any) -> None:
    """Let a multimodal chunk hand the padding mask on to its experts' routers. Does nothing to other chunks.

    `MultimodalGPTModel.forward` drops all keywords but those that its language model names.
    """
    language = language_model(chunk)
    if language is not chunk and chunk.config.num_moe_experts is not None:
        language.extra_forward_keys = [*language.extra_forward_keys, PADDING_MASK]


def require_layers_of_features(checkpoint: Checkpoint, layers: Sequence[int]) -> None:
    """Raise a UserError if the first pipeline stage has fewer layers than there are features of images for layers.

    mcore-bridge adds these features in the first stage alone, where it asserts that; other stages would wait for ever.

    Args:
        checkpoint: the model's.
        layers: number of decoder layers of each stage.
    """
    tower = getattr(checkpoint.config, "vision_config", None)
    features = len(getattr(tower, "deepstack_visual_indexes", None) or ())
    if layers[0] < features:
        raise UserError(
            f"{checkpoint.path}: the first of {len(layers)} pipeline stages has {layers[0]} layers; the model adds "
            f"features of images to {features}, which it must have. Use fewer stages"
        )


def recompute_tower(chunk: nn.Module) -> None:
    """Recompute the activations of the vision tower's layers in the backward pass. Does nothing without a tower.

    Megatron's own recomputing covers the language model alone.
    """
    visual = visual_of(chunk)
    found: Iterable[Any] = () if visual is None else towers(visual)
    for tower in found:
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def vision_forward(chunk: Any, microbatch: Microbatch, **options: Any) -> Tensor:
    """Call a multimodal chunk, DDP-wrapped or not, with the microbatch's tokens, positions and pixels.

    The model embeds the tokens of all context-parallel ranks, puts the images in and takes this rank's part. Without
    images it computes a blank one, whose gradients are zero, so that the tower's parameters have gradients everywhere;
    where no gradients are computed, it leaves the tower out.

    Args:
        chunk: the chunk.
        microbatch: with `vision`.
        options: keywords of the forward pass.
    """
    vision = microbatch.vision
    if vision is None:
        raise ValueError("a multimodal model needs the microbatch's positions: collate it with the model's processing")
    pixels = {}
    if visual_of(chunk) is not None:
        device, dtype = vision.position_ids.device, chunk.config.params_dtype
        pixels = {name: _as_model_type(value.to(device), dtype) for name, value in vision.pixels.items()}
    with contextlib.nullcontext() if pixels or torch.is_grad_enabled() else _without_tower(chunk.config):
        output: Tensor = chunk(vision.whole_input_ids, vision.position_ids, None, **options, **pixels)
    return output


@contextlib.contextmanager
def _without_tower(config: Any) -> Iterator[None]:
    """Let the model embed text alone inside."""
    before, config.language_model_only = config.language_model_only, True
    try:
        yield
    finally:
        config.language_model_only = before


def _as_model_type(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
