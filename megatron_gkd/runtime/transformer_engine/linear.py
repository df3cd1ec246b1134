"""Linear layers under Transformer Engine's names, on Megatron's own column- and row-parallel layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import nn

from megatron_gkd.runtime.transformer_engine.norm import Norm, normalize


def _tensor_parallel_size(is_expert: bool) -> int:
    if is_expert:
        return parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_world_size()


class _TELinearMeta(type(nn.Module)):
    """Transformer Engine's parallel linears are subclasses of TELinear; ours descend from Megatron's layers instead."""

    def __instancecheck__(cls, instance) -> bool:
        own = type.__instancecheck__(cls, instance)
        return own or (cls.__name__ == "TELinear" and getattr(instance, "is_te_linear", False))


class TELinear(nn.Module, metaclass=_TELinearMeta):
    """A replicated linear layer (`parallel_mode="duplicated"`)."""

    def __init__(self, input_size, output_size, *, config, init_method, bias, parallel_mode=None, is_expert=False, **_):
        super().__init__()
        self.config, self.in_features, self.out_features = config, input_size, output_size
        self.parallel_mode, self.use_bias, self.tp_size = parallel_mode, bias, 1
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.tensor_model_parallel = False
        self.weight.allreduce = not is_expert
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias = nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype)) if bias else None

    def forward(self, x: torch.Tensor):
        return F.linear(x, self.weight, self.bias), None


class _ParallelLinear:
    """What callers read from Transformer Engine's parallel linears, added to Megatron's."""

    is_te_linear = True

    def _describe(self, mode: str, bias: bool) -> None:
        self.parallel_mode, self.use_bias = mode, bias
        self.tp_size = _tensor_parallel_size(self.is_expert)
        self.out_features, self.in_features = self.weight.shape
        if mode == "column":  # readers take these for the sizes of one rank
            del self.input_size, self.output_size


class TEColumnParallelLinear(_ParallelLinear, ColumnParallelLinear):
    def __init__(self, input_size, output_size, *, config, bias, is_expert=False, stride=1, **kwargs):
        super().__init__(
            input_size, output_size, config=config, bias=bias, is_expert=is_expert, stride=stride, **kwargs
        )
        self._describe("column", bias)


class TERowParallelLinear(_ParallelLinear, RowParallelLinear):
    def __init__(self, input_size, output_size, *, config, bias, is_expert=False, **kwargs):
        super().__init__(input_size, output_size, config=config, bias=bias, is_expert=is_expert, **kwargs)
        self._describe("row", bias)


class TELayerNormColumnParallelLinear(_ParallelLinear, ColumnParallelLinear):
    """Norm and column-parallel linear in one module: `layer_norm_weight`, `weight`."""

    is_te_linear = False

    def __init__(self, input_size, output_size, *, config, bias, is_expert=False, stride=1, **kwargs):
        super().__init__(
            input_size, output_size, config=config, bias=bias, is_expert=is_expert, stride=stride, **kwargs
        )
        self._describe("column", bias)
        norm = Norm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight, self.layer_norm_bias = norm.weight, norm.bias
        self.eps, self.normalization, self.gamma_offset = norm.eps, norm.kind, norm.gamma_offset
        self.return_layernorm_output = False

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None, **kwargs):
        normed = normalize(
            x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.normalization, self.gamma_offset
        )
        out, bias = super().forward(normed, weight, **kwargs)
        return ((out, normed), bias) if self.return_layernorm_output else (out, bias)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class TEGroupedLinear(nn.Module):
    """The experts of one rank: `weight0 … weightN`, each applied to its own run of tokens."""

    def __init__(self, num_gemms, input_size, output_size, *, config, init_method, parallel_mode=None, bias=False, **_):
        super().__init__()
        tp_size = _tensor_parallel_size(is_expert=True)
        if parallel_mode == "column":
            output_size = divide(output_size, tp_size)
        elif parallel_mode == "row":
            input_size = divide(input_size, tp_size)
        self.config, self.num_gemms, self.use_bias = config, num_gemms, bias
        self.in_features, self.out_features = input_size, output_size
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self.is_expert, self.te_return_bias = True, False
        # The rule of Megatron's own class of this name; `models.moe` replaces it after building.
        allreduce = config.expert_model_parallel_size == 1
        for i in range(num_gemms):
            weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            if config.perform_initialization:
                init_method(weight)
            weight.allreduce = allreduce
            weight.tensor_model_parallel = parallel_mode is not None
            weight.partition_dim = {"column": 0, "row": 1}.get(parallel_mode, -1)
            weight.partition_stride = 1
            self.register_parameter(f"weight{i}", weight)
            if bias:
                expert_bias = nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype))
                expert_bias.allreduce = allreduce
                self.register_parameter(f"bias{i}", expert_bias)

    def forward(self, x: torch.Tensor, m_splits):
        """X [tokens, in], m_splits [num_gemms] tokens of each expert -> [tokens, out]."""
        runs = x.split(m_splits.tolist() if torch.is_tensor(m_splits) else list(m_splits))
        outputs = [
            F.linear(run, getattr(self, f"weight{i}"), getattr(self, f"bias{i}", None)) for i, run in enumerate(runs)
        ]
        return torch.cat(outputs), None

    def _sharded_state_dict(self, axes: dict[str, int], prefix: str, sharded_offsets: tuple, metadata: dict) -> dict:
        """Return the experts as slices of one tensor, as Megatron's class of this name does.

        axes: which axis of `weight` and `bias` tensor parallelism divides.
        """
        experts, state = parallel_state.get_expert_model_parallel_group(), {}
        for i in range(self.num_gemms):
            own = {name: getattr(self, f"{name}{i}") for name in ("weight", "bias")[: 1 + self.use_bias]}
            place = (len(sharded_offsets), experts.rank() * self.num_gemms + i, experts.size() * self.num_gemms)
            one = make_sharded_tensors_for_checkpoint(
                own,
                "",
                axes,
                (*sharded_offsets, place),
                tp_group=parallel_state.get_expert_tensor_parallel_group(),
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(one, "", prefix)
            state |= {f"{prefix}{name}{i}": tensor for name, tensor in one.items()}
        for tensor in state.values():  # an expert's replicas are the ranks of its expert-data-parallel group
            tensor.replica_id = (*tensor.replica_id[:2], parallel_state.get_expert_data_parallel_rank())
        return state


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    def __init__(self, num_gemms, input_size, output_size, **kwargs):
        super().__init__(num_gemms, input_size, output_size, parallel_mode="column", **kwargs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return self._sharded_state_dict({"weight": 0, "bias": 0}, prefix, sharded_offsets, metadata)


class TERowParallelGroupedLinear(TEGroupedLinear):
    def __init__(self, num_gemms, input_size, output_size, **kwargs):
        super().__init__(num_gemms, input_size, output_size, parallel_mode="row", **kwargs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return self._sharded_state_dict({"weight": 1}, prefix, sharded_offsets, metadata)
