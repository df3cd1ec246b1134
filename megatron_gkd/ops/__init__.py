"""The distillation loss: divergences between vocabulary-sharded distributions, with closed-form gradients.

``vocab_parallel_divergence`` compares logits, which both exist as a whole on their ranks. ``fused_linear_divergence``
takes last hidden states and heads, and holds the logits of one chunk of tokens at a time, of this rank's vocabulary
shard; no logits are gathered over the ranks. ``topk_divergence`` compares only the teacher's most likely
tokens.

A new divergence needs a declaration in four files, and a value computed by hand in one test:

    config/divergences.py      its name in the recipe, and what beta may be
    ops/reference.py           value and slope, the oracle of the tests
    ops/pointwise.py           value and slope for low precision, in plain torch
    csrc/divergences.h         value and slope for the kernels, and its entry in GKD_DIVERGENCES
    tests/ops/test_reference.py

The recipe's schema, the numbering of the kernels, their dispatch and the tables of the tests follow from these;
``tests/ops/test_declarations.py`` checks that they agree.
"""

from megatron_gkd.ops.divergence import vocab_parallel_divergence, vocab_parallel_divergence_with_statistics
from megatron_gkd.ops.fused_linear import FusedLinearOptions, LinearHead, TokenTargets, fused_linear_divergence
from megatron_gkd.ops.normalizers import TokenStatistics
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.params import PerToken
from megatron_gkd.ops.passes import implementation
from megatron_gkd.ops.spec import DivergenceSpec, TopKSpec
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_choice import vocab_parallel_topk
from megatron_gkd.ops.topk_divergence import topk_divergence

__all__ = [
    "DivergenceSpec",
    "FusedLinearOptions",
    "LinearHead",
    "OutputHead",
    "PerToken",
    "TokenStatistics",
    "TokenTargets",
    "TopK",
    "TopKSpec",
    "fused_linear_divergence",
    "implementation",
    "topk_divergence",
    "vocab_parallel_divergence",
    "vocab_parallel_divergence_with_statistics",
    "vocab_parallel_topk",
]
