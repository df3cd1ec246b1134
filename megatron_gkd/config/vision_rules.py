"""Which parts of a multimodal student are trained."""

from __future__ import annotations

from typing import Literal

from megatron_gkd.config.schema import TrainSection

Part = Literal["vit", "aligner", "llm"]
PARTS: tuple[Part, ...] = ("vit", "aligner", "llm")


def frozen_parts(section: TrainSection) -> frozenset[Part]:
    """Return the parts that are not trained; without a choice vision tower and aligner, as in ms-swift."""
    choices = {"vit": section.freeze_vit, "aligner": section.freeze_aligner, "llm": section.freeze_llm}
    return frozenset(part for part in PARTS if choices[part] is not False)
