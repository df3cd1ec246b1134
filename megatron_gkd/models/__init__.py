"""Hugging Face checkpoints as sharded Megatron models, and back."""
