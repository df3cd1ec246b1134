"""Sampling by vLLM: in the training processes, or by servers."""
