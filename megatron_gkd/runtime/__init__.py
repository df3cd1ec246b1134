"""Adapt to the machine: devices, Transformer Engine or its PyTorch fallback, process groups, files and signals."""
