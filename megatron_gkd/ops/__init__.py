"""The distillation loss: divergences between vocabulary-sharded distributions, with closed-form gradients."""

from megatron_gkd.ops.divergence import vocab_parallel_divergence
from megatron_gkd.ops.fused_linear import PerToken, fused_linear_divergence

__all__ = ["PerToken", "fused_linear_divergence", "vocab_parallel_divergence"]
