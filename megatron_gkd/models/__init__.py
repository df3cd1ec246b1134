"""Load Hugging Face checkpoints as sharded Megatron models, and export them back."""

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
