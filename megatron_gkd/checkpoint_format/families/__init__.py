"""The table of supported families of models."""

from __future__ import annotations

from megatron_gkd.checkpoint_format.config_values import Config
from megatron_gkd.checkpoint_format.families.family import Family, PlainLayers
from megatron_gkd.checkpoint_format.families.text import DENSE
from megatron_gkd.checkpoint_format.families.text_experts import EXPERTS
from megatron_gkd.checkpoint_format.families.vision import VISION

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*DENSE, *EXPERTS, *VISION)}
"""The supported families by their model_type in config.json."""


def family_of(config: Config) -> Family:
    """Return the family of a supported model, from its config.json.

    Raises:
        KeyError: it is of no supported family; `config_file.read_config` refuses it.
    """
    return FAMILIES[config["model_type"]]


def families_of_architecture(name: str) -> list[Family]:
    """Return the families that have an architecture of this name."""
    return [family for family in FAMILIES.values() if name in family.architectures]


__all__ = ["FAMILIES", "Family", "PlainLayers", "families_of_architecture", "family_of"]
