"""The speed of rollouts: the embedded engine beside transformers and vLLM, and steps that are sampled ahead."""
