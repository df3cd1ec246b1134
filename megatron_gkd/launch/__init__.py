"""Start the ranks of a run (`megatron-gkd train recipe.yaml --nproc 8`), and report why a run fails exactly once.

Only `agent` and `launcher` import torch.
"""
