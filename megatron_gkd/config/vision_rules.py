"""Which parts of a multimodal student are trained."""

from __future__ import annotations

from typing import Literal

from megatron_gkd.config.schema import TrainSection

Part = Literal["vit", "aligner", "llm"]
PARTS: tuple[Part, ...] = ("vit", "aligner", "llm")


IMAGE_KEYS = (
    "freeze_vit",
    "freeze_aligner",
    "freeze_llm",
    "vit_lr",
    "aligner_lr",
    "vit_gradient_checkpointing",
)
"""The keys of `train` that mean something only with a student that reads images."""


def describe_image_keys(section: TrainSection) -> list[str]:
    """Return the `IMAGE_KEYS` that have another value than their default, as `train.key = value`."""
    values = {leaf: getattr(section, leaf) for leaf in IMAGE_KEYS}
    return [
        f"train.{leaf} = {str(value).lower() if isinstance(value, bool) else value}"
        for leaf, value in values.items()
        if value is not None and value != TrainSection.model_fields[leaf].default
    ]


def frozen_parts(section: TrainSection) -> frozenset[Part]:
    """Return the parts that are not trained; without a choice vision tower and aligner, as in ms-swift."""
    choices = {"vit": section.freeze_vit, "aligner": section.freeze_aligner, "llm": section.freeze_llm}
    return frozenset(part for part in PARTS if choices[part] is not False)
