"""The layers with adapters, from the keys of the section `lora`."""

from megatron_gkd.checkpoint_format.lora_layers import LayerRules
from megatron_gkd.config.schema import LoraSection, TrainSection
from megatron_gkd.config.vision_rules import PARTS, frozen_parts

RULES = (
    "lora_rank",
    "lora_alpha",
    "target_modules",
    "target_regex",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "freeze_vit",
    "freeze_aligner",
    "freeze_llm",
)
"""The keys that `layer_rules` reads."""


def layer_rules(section: LoraSection, train: TrainSection) -> LayerRules:
    """Return the choice of layers, ranks and scales; `all-linear` leaves out the frozen parts of a multimodal model."""
    return LayerRules(
        rank=section.lora_rank,
        alpha=section.lora_alpha,
        target_modules=section.target_modules,
        target_regex=section.target_regex,
        use_rslora=section.use_rslora,
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
        parts=frozenset(PARTS) - frozen_parts(train),
    )
