"""The distillation loss: divergences between vocabulary-sharded distributions, with closed-form gradients."""

from megatron_gkd.ops.chunk_loss import PerToken
from megatron_gkd.ops.divergence import vocab_parallel_divergence
from megatron_gkd.ops.fused_linear import fused_linear_divergence
from megatron_gkd.ops.normalizers import TokenStatistics
from megatron_gkd.ops.passes import implementation
from megatron_gkd.ops.topk import TopK, vocab_parallel_topk
from megatron_gkd.ops.topk_divergence import topk_divergence

__all__ = [
    "PerToken",
    "TokenStatistics",
    "TopK",
    "fused_linear_divergence",
    "implementation",
    "topk_divergence",
    "vocab_parallel_divergence",
    "vocab_parallel_topk",
]
