"""Linear layers of several experts under Transformer Engine's names.

The signatures are those that Megatron-Core and mcore-bridge call. Under expert tensor parallelism a column-parallel
weight is split along its outputs, a row-parallel one along its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_gkd.runtime.transformer_engine.linear import Offsets, tensor_parallel_size
from megatron_gkd.runtime.transformer_engine.norm import new_parameter

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide


class TEGroupedLinear(nn.Module):
    """The linear layers of one rank's experts, `weight0` to `weightN`, each applied to its own run of tokens.

    Attributes:
        parallel_mode: "column", "row", or None for layers that are replicated over expert-tensor-parallel ranks.
        sharded_axes: the axis of `weight` and `bias` that expert tensor parallelism splits.
        te_return_bias: whether the biases are returned instead of added, as Megatron's name has it.
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
        self.tp_size = tensor_parallel_size(is_expert=True)
        if mode == "column":
            output_size = divide(output_size, self.tp_size)
        elif mode == "row":
            input_size = divide(input_size, self.tp_size)
        self.config, self.num_gemms, self.use_bias = config, num_gemms, bias
        self.in_features, self.out_features = input_size, output_size
        self.is_expert, self.te_return_bias = True, bias and options.get("skip_bias_add", False)
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

    def forward(self, x: Tensor, m_splits: Tensor | Sequence[int]) -> tuple[Tensor, list[Tensor] | None]:
        """Return ([tokens, output_size], the biases that the caller is to add, one an expert).

        Args:
            x: [tokens, input_size], sorted by expert.
            m_splits: [num_gemms], tokens of each expert.
        """
        runs = x.split(m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits))
        weights, biases = self._of_experts("weight"), self._of_experts("bias") if self.use_bias else None
        if biases is None or self.te_return_bias:
            outputs = [F.linear(*each) for each in zip(runs, weights, strict=True)]
        else:
            outputs = [F.linear(*each) for each in zip(runs, weights, biases, strict=True)]
        return torch.cat(outputs), biases if self.te_return_bias else None

    def _of_experts(self, name: str) -> list[Tensor]:
        return [getattr(self, f"{name}{i}") for i in range(self.num_gemms)]


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
