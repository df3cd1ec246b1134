"""Configuration classes of families that transformers knows only as remote code."""

from __future__ import annotations

from transformers import AutoConfig, DeepseekV3Config


class KimiK2Config(DeepseekV3Config):
    """The configuration of Kimi K2: DeepSeek-V3's under another name."""

    model_type = "kimi_k2"


def register_own_configurations() -> None:
    """Let `AutoConfig` open the families of this file without code from their folders. Idempotent."""
    AutoConfig.register(KimiK2Config.model_type, KimiK2Config, exist_ok=True)
