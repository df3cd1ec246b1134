"""Options of a model's adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megatron_gkd.checkpoint_format.lora_layers import LayerRules

Initialization = Literal["kaiming", "gaussian"]


@dataclass(frozen=True)
class LoraOptions:
    """The recipe's section `lora`.

    Attributes:
        rules: which layers are adapted, with which ranks and scales.
        dropout: probability of dropout of the adapters' input in training.
        initialization: distribution of the initial factors A; B is initialized with zeros.
        dtype: dtype of the factors; None for the base's.
        seed: seed of the initialization.
        adapters: folder of PEFT adapters to start from, whose ranks and scales `rules` must have.
        b_std: half width of a uniform distribution to initialize B from. For tests: with B = 0, A has no gradient.
    """

    rules: LayerRules = field(default_factory=LayerRules)
    dropout: float = 0.0
    initialization: Initialization = "kaiming"
    dtype: torch.dtype | None = None
    seed: int = 0
    adapters: Path | None = None
    b_std: float = 0.0
