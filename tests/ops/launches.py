"""How many kernels a GPU would launch for a call of the fused head, counted on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops.oracle import random_logits
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gkd.ops import add_product, passes
from megatron_gkd.ops.fused_linear import FusedLinearOptions, LinearHead, TokenTargets, fused_linear_divergence
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.spec import DivergenceSpec, TopKSpec

# Both are two kernels: the first one with labels only.
_SECOND_KERNELS = {"token_statistics": "label_logits", "top_k_gradient": "top_k_prepare"}


class _Launches(TorchDispatchMode):
    """Counts operators of torch other than views and allocations, casts included, and calls of kernels."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        for name in passes._FUNCTIONS:
            patch.setattr(passes._kernels, name, self._counting(name, getattr(passes._kernels, name)))
        # A GPU has one kernel for products that are added to fp32; a CPU casts the operands.
        patch.setattr(add_product, "_method", lambda *_: lambda *_: self.names.append("add_product"))

    def _counting(self, name: str, kernel: Callable) -> Callable:
        def call(*args):
            self.names.append(name)
            if name in _SECOND_KERNELS and (name != "token_statistics" or args[3] is not None):
                self.names.append(_SECOND_KERNELS[name])
            return kernel(*args)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach", "set_")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def count_launches(
    dtype: torch.dtype, beta: float, topk: TopKSpec, *, teacher: bool = True
) -> tuple[list[str], list[str], float]:
    """Return what one chunk and four chunks with a cross-entropy launch, and how many each chunk adds."""
    one, four = (_launches_of(chunks, dtype, beta, topk, teacher) for chunks in (1, 4))
    return one, four, (len(four) - len(one)) / 3


def _launches_of(chunks: int, dtype: torch.dtype, beta: float, topk: TopKSpec, teacher: bool) -> list[str]:
    hidden, teacher_hidden = (random_logits(12, 8, seed=seed, dtype=dtype) for seed in (0, 1))
    weight, teacher_weight = (random_logits(32, 8, seed=seed, dtype=dtype).requires_grad_() for seed in (2, 3))
    weight.main_grad = torch.zeros(32, 8)
    tokens = TokenTargets(torch.ones(12), torch.arange(12), torch.ones(12))
    student = LinearHead(hidden.requires_grad_(), OutputHead(weight))
    other = LinearHead(teacher_hidden, OutputHead(teacher_weight)) if teacher else None
    options = FusedLinearOptions(12 // chunks, upstream=1.0)
    with pytest.MonkeyPatch.context() as patch, _Launches(patch) as seen:
        fused_linear_divergence(student, other, tokens, DivergenceSpec(beta), topk, options)
    return seen.names
