"""Linear layers under Transformer Engine's names, on Megatron's own column- and row-parallel layers.

The signatures are those that Megatron-Core and mcore-bridge call. Under tensor parallelism a column-parallel weight is
split along its outputs, a row-parallel one along its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_gkd.runtime.transformer_engine.norm import Norm, new_parameter, normalize

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide

Offsets = tuple[tuple[int, int, int], ...]
"""Of a sharded tensor, by Megatron's convention: (axis, this rank's number, number of ranks)."""


def _tensor_parallel_size(is_expert: bool) -> int:
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
        self.tp_size = _tensor_parallel_size(self.is_expert)
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
        self.eps, self.normalization, self.gamma_offset = norm.eps, norm.kind, norm.gamma_offset
        self.return_layernorm_output = False

    def forward(self, x: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Any, Tensor | None]:
        """Return (output, bias); the output is (output, normalized x) where `return_layernorm_output` is set."""
        normed = normalize(
            x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.normalization, self.gamma_offset
        )
        out, bias = super().forward(normed, weight, **options)
        return ((out, normed), bias) if self.return_layernorm_output else (out, bias)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the parameters for a distributed checkpoint; the norm's are replicated."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class TEGroupedLinear(nn.Module):
    """The linear layers of one rank's experts, `weight0` to `weightN`, each applied to its own run of tokens.

    Attributes:
        parallel_mode: "column", "row", or None for layers that are replicated over expert-tensor-parallel ranks.
        sharded_axes: the axis of `weight` and `bias` that expert tensor parallelism splits.
    """

    parallel_mode: str | None = None
    sharded_axes: ClassVar[dict[str, int]] = {}

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        **options: Any,
    ) -> None:
        super().__init__()
        bias, mode = options.get("bias", False), self.parallel_mode
        if options.get("parallel_mode", mode) != mode:
            raise ValueError(f"parallel_mode = {options['parallel_mode']}: {type(self).__name__} has {mode}")
        self.tp_size = _tensor_parallel_size(is_expert=True)
        if mode == "column":
            output_size = divide(output_size, self.tp_size)
        elif mode == "row":
            input_size = divide(input_size, self.tp_size)
        self.config, self.num_gemms, self.use_bias = config, num_gemms, bias
        self.in_features, self.out_features = input_size, output_size
        self.is_expert, self.te_return_bias = True, False
        # The rule of Megatron's own class of this name; `models.moe` replaces it after building.
        allreduce = config.expert_model_parallel_size == 1
        for i in range(num_gemms):
            weight = new_parameter(
                torch.empty(output_size, input_size, dtype=config.params_dtype),
                allreduce=allreduce,
                tensor_model_parallel=mode is not None,
                partition_dim=self.sharded_axes.get("weight", -1),
                partition_stride=1,
            )
            if config.perform_initialization:
                init_method(weight)
            self.register_parameter(f"weight{i}", weight)
            if bias:
                zeros = torch.zeros(output_size, dtype=config.params_dtype)
                self.register_parameter(f"bias{i}", new_parameter(zeros, allreduce=allreduce))

    def forward(self, x: Tensor, m_splits: Tensor | Sequence[int]) -> tuple[Tensor, None]:
        """Return ([tokens, output_size], None).

        Args:
            x: [tokens, input_size], sorted by expert.
            m_splits: [num_gemms], tokens of each expert.
        """
        runs = x.split(m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits))
        outputs = [
            F.linear(run, getattr(self, f"weight{i}"), getattr(self, f"bias{i}", None)) for i, run in enumerate(runs)
        ]
        return torch.cat(outputs), None


class _ShardedGroupedLinear(TEGroupedLinear):
    """A grouped linear with a sharded state dict.

    A class of its own, since mcore-bridge replaces that of `TEGroupedLinear` (see `docs/upstream_defects.md`).
    """

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the experts as slices of one tensor, as Megatron's class of this name does."""
        experts = parallel_state.get_expert_model_parallel_group()
        state: ShardedStateDict = {}
        for i in range(self.num_gemms):
            own = {name: getattr(self, f"{name}{i}") for name in ("weight", "bias")[: 1 + self.use_bias]}
            place = (len(sharded_offsets), experts.rank() * self.num_gemms + i, experts.size() * self.num_gemms)
            one = make_sharded_tensors_for_checkpoint(
                own,
                "",
                self.sharded_axes,
                (*sharded_offsets, place),
                tp_group=parallel_state.get_expert_tensor_parallel_group(),
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
            replace_prefix_for_sharding(one, "", prefix)
            state |= {f"{prefix}{name}{i}": tensor for name, tensor in one.items()}
        for tensor in state.values():  # an expert's replicas are the ranks of its expert-data-parallel group
            tensor.replica_id = (*tensor.replica_id[:2], parallel_state.get_expert_data_parallel_rank())
        return state


class TEColumnParallelGroupedLinear(_ShardedGroupedLinear):
    """Experts whose outputs are split over expert-tensor-parallel ranks."""

    parallel_mode = "column"
    sharded_axes: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}


class TERowParallelGroupedLinear(_ShardedGroupedLinear):
    """Experts whose inputs are split over expert-tensor-parallel ranks."""

    parallel_mode = "row"
    sharded_axes: ClassVar[dict[str, int]] = {"weight": 1}
