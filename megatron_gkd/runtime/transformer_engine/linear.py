"""Linear layers under Transformer Engine's names, on Megatron's own column- and row-parallel layers.

The signatures are those that Megatron-Core and mcore-bridge call. Under tensor parallelism a column-parallel weight is
split along its outputs, a row-parallel one along its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_gkd.runtime.transformer_engine.norm import Norm, new_parameter, normalize

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

Offsets = tuple[tuple[int, int, int], ...]
"""Of a sharded tensor, by Megatron's convention: (axis, this rank's number, number of ranks)."""


def tensor_parallel_size(is_expert: bool) -> int:
    """Return the number of ranks that share a layer, of an expert or not."""
    if is_expert:
        return parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_world_size()


class _TELinearMeta(type):
    """Makes parallel linears instances of TELinear, as in Transformer Engine; these derive from Megatron's layers."""

    def __instancecheck__(cls, instance: object) -> bool:
        is_own = type.__instancecheck__(cls, instance)
        return is_own or (cls.__name__ == "TELinear" and getattr(instance, "is_te_linear", False))


class TELinear(nn.Module, metaclass=_TELinearMeta):
    """A linear layer that is replicated over tensor-parallel ranks."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config, self.in_features, self.out_features = config, input_size, output_size
        self.parallel_mode, self.use_bias, self.tp_size = options.get("parallel_mode"), bias, 1
        self.weight = new_parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype),
            tensor_model_parallel=False,
            allreduce=not options.get("is_expert", False),
            sequence_parallel=config.sequence_parallel,
        )
        if config.perform_initialization:
            init_method(self.weight)
        self.bias = nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return ([..., output_size], None), since the bias is added already."""
        return F.linear(x, self.weight, self.bias), None


class _ParallelLinear(nn.Module):
    """The attributes that callers read from Transformer Engine's parallel linears, added to Megatron's."""

    is_te_linear = True
    weight: nn.Parameter
    is_expert: bool

    def _describe(self, mode: str, bias: bool) -> None:
        self.parallel_mode, self.use_bias = mode, bias
        self.tp_size = tensor_parallel_size(self.is_expert)
        self.out_features, self.in_features = self.weight.shape
        if mode == "column":  # readers take these for the sizes of one rank
            for name in ("input_size", "output_size"):
                delattr(self, name)


class TEColumnParallelLinear(_ParallelLinear, ColumnParallelLinear):
    """A linear layer whose outputs are split over tensor-parallel ranks."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **options: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, bias=bias, **options)
        self._describe("column", bias)


class TERowParallelLinear(_ParallelLinear, RowParallelLinear):
    """A linear layer whose inputs are split over tensor-parallel ranks."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **options: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, bias=bias, **options)
        self._describe("row", bias)


class TELayerNormColumnParallelLinear(_ParallelLinear, ColumnParallelLinear):
    """Norm and column-parallel linear in one module: `layer_norm_weight`, `weight`."""

    is_te_linear = False

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **options: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, bias=bias, **options)
        self._describe("column", bias)
        norm = Norm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight, self.layer_norm_bias = norm.weight, norm.bias
        self.eps, self.normalization, self.zero_centered_gamma = norm.eps, norm.kind, norm.zero_centered_gamma
        self.return_layernorm_output = False

    def forward(self, x: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Any, Tensor | None]:
        """Return (output, bias); the output is (output, normalized x) where `return_layernorm_output` is set."""
        normed = normalize(
            x,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            self.normalization,
            zero_centered_gamma=self.zero_centered_gamma,
        )
        out, bias = super().forward(normed, weight, **options)
        return ((out, normed), bias) if self.return_layernorm_output else (out, bias)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the parameters for a distributed checkpoint; the norm's are replicated."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)
