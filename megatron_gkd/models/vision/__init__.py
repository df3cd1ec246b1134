"""Multimodal models: the language model and the vision tower of a chunk, their parts, and their forward pass."""
