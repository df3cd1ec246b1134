"""Core attention for Megatron-Core: packed sequences, context parallelism, windows and sinks of single layers.

Shapes: s tokens of this rank, t tokens of all context-parallel ranks, b batch, h query heads, g key/value heads, d head
size. Packed ("thd") input has no batch dimension; its sequences are delimited by `cu_seqlens_q_padded` (or
`cu_seqlens_q`) over the tokens of the whole microbatch.

Under context parallelism each sequence is cut in 2 * CP chunks and rank r holds chunks r and 2 * CP - 1 - r (zigzag, so
that causal work is balanced). Keys and values are gathered over the group and put back in order; then each local chunk
of queries attends to a prefix of its sequence, which is a causal mask aligned to the last key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_gkd.runtime.context_parallel import context_parallel_indices
from megatron_gkd.runtime.transformer_engine.causal_attention import CausalAttention
from megatron_gkd.runtime.transformer_engine.norm import new_parameter

from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide


class TEDotProductAttention(MegatronModule):
    """Causal or masked attention under Transformer Engine's name, with the signature that Megatron-Core calls.

    Attributes:
        window: number of newest keys that a query of this layer sees, its own included; None for all.
        softmax_offset: [h / TP], the sinks, under Transformer Engine's name; None without.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        attn_mask_type: AttnMaskType,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()
        self.window = window_of_layer(config, layer_number)
        self.softmax_offset = _new_sinks(config)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **options: Any,
    ) -> Tensor:
        """Return [s,b,h*d] for q [s,b,h,d], k and v [s,b,g,d]; packed: [s,h*d] for q [s,h,d], k and v [s,g,d]."""
        if options.get("attention_bias") is not None:
            raise ValueError("an attention bias needs Transformer Engine")
        if options.get("packed_seq_params") is not None:
            return self._packed(q, k, v, _Packing.from_params(options["packed_seq_params"], self.cp_group)).flatten(1)
        if self.cp_group.size() > 1:
            raise ValueError("context parallelism needs packed sequences without Transformer Engine")
        mask_type = attn_mask_type or self.attn_mask_type
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        if mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right):
            out = self._attend_causally(q, k, v)
        else:
            out = self._attend_with_mask(q, k, v, None if mask_type == AttnMaskType.no_mask else attention_mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the sinks for a distributed checkpoint."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, packing: _Packing) -> Tensor:
        lengths = [length for _, _, length in packing.chunks]
        if packing.sequence_order is None:  # whole sequences: split all alike, which has the cheaper backward
            keys, values = k.split(lengths), v.split(lengths)
        else:
            k, v = (_AllGather.apply(x, self.cp_group).index_select(0, packing.sequence_order) for x in (k, v))
            keys, values = (tuple(x[start:end] for start, end, _ in packing.chunks) for x in (k, v))
        outputs = []
        for chunk in zip(q.split(lengths), keys, values, strict=True):
            q_chunk, k_chunk, v_chunk = (x.transpose(0, 1)[None] for x in chunk)
            outputs.append(self._attend_causally(q_chunk, k_chunk, v_chunk)[0].transpose(0, 1))
        return torch.cat(outputs)

    def _attend_causally(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with self._dropout() as dropout_p:
            return causal_attention_of(self)(q, k, v, dropout_p)

    def _attend_with_mask(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend, [b,h,s,d] each; the mask is true where masked, as Megatron's, and None masks nothing."""
        if self.window is not None or self.softmax_offset is not None:
            raise ValueError("windows and sinks need causal attention without Transformer Engine")
        with self._dropout() as dropout_p:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                None if mask is None else ~mask,
                dropout_p,
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )

    @contextlib.contextmanager
    def _dropout(self) -> Iterator[float]:
        """Yield the probability at which weights are dropped."""
        if not self.training or self.dropout == 0.0:
            yield 0.0
            return
        with tensor_parallel.get_cuda_rng_tracker().fork():  # heads differ over TP ranks, and so must their dropout
            yield self.dropout


def window_of_layer(config: TransformerConfig, layer_number: int) -> int | None:
    """Return how many newest keys a query of this layer (counted from 1) sees, its own included; None for all."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    before = config.window_size[0]  # -1 for all
    return None if before < 0 else before + 1


def causal_attention_of(core: Any) -> CausalAttention:
    """Return what a causal core attention computes, of this module or of Transformer Engine."""
    is_own = isinstance(core, TEDotProductAttention)
    window = core.window if is_own else window_of_layer(core.config, core.layer_number)
    return CausalAttention(core.softmax_scale, window, getattr(core, "softmax_offset", None))


def _new_sinks(config: TransformerConfig) -> nn.Parameter | None:
    """Return this rank's sinks [h / TP] as a tensor-parallel parameter; None where the configuration has none."""
    if config.softmax_type == "vanilla":
        return None
    if config.softmax_type != "learnable":
        raise ValueError(f"softmax_type = {config.softmax_type}: needs Transformer Engine")
    num_heads = divide(config.num_attention_heads, config.tensor_model_parallel_size)
    return new_parameter(
        torch.zeros(num_heads, dtype=config.params_dtype),
        tensor_model_parallel=True,
        partition_dim=0,
        partition_stride=1,
    )


@dataclass(frozen=True)
class _Packing:
    """How a microbatch is packed, computed once for all layers.

    Attributes:
        chunks: in the order of this rank's tokens, where the keys that a chunk sees start and end, and its length.
        sequence_order: int64 [t], rows of the keys gathered from all context-parallel ranks in sequence order; None
            without context parallelism.
    """

    chunks: list[tuple[int, int, int]]
    sequence_order: Tensor | None

    @classmethod
    def from_params(cls, params: PackedSeqParams, cp_group: dist.ProcessGroup) -> _Packing:
        """Return the packing of `params`, which keeps it for the next layer."""
        packing = getattr(params, "torch_attention_packing", None)
        if packing is None:
            boundaries = params.cu_seqlens_q_padded
            packing = cls._from_boundaries(params.cu_seqlens_q if boundaries is None else boundaries, cp_group)
            params.torch_attention_packing = packing
        return packing

    @classmethod
    def _from_boundaries(cls, cu_seqlens: Tensor, cp_group: dist.ProcessGroup) -> _Packing:
        size, rank = cp_group.size(), cp_group.rank()
        chunks: list[tuple[int, int, int]] = []
        for start, end in pairwise(cu_seqlens.tolist()):
            if size == 1:
                chunks.append((start, end, end - start))
                continue
            length = (end - start) // (2 * size)
            chunks += [(start, start + (chunk + 1) * length, length) for chunk in (rank, 2 * size - 1 - rank)]
        if size == 1:
            return cls(chunks, None)
        places = torch.cat([context_parallel_indices(cu_seqlens, other, size) for other in range(size)])
        return cls(chunks, places.argsort())


class _AllGather(torch.autograd.Function):
    """Concatenate over the group; the gradient is summed over the group and split again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None
