"""Core attention on torch's scaled_dot_product_attention: grouped queries, packed sequences, context parallelism.

Shapes: s tokens of this rank, t tokens of all context-parallel ranks, b batch, h query heads, g key/value heads, d head
size. Packed ("thd") input has no batch dimension; its sequences are delimited by `cu_seqlens_q_padded` (or
`cu_seqlens_q`) over the tokens of the whole microbatch.

Under context parallelism each sequence is cut in 2 * CP chunks and rank r holds chunks r and 2 * CP - 1 - r (zigzag, so
that causal work is balanced). Keys and values are gathered over the group and put back in order; then each local chunk
of queries attends to a prefix of its sequence, which is a causal mask aligned to the last key.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right

from megatron_gkd.runtime.context_parallel import context_parallel_indices

from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class TEDotProductAttention(MegatronModule):
    """Causal or masked attention under Transformer Engine's name, with the signature that Megatron-Core calls."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attn_mask_type: AttnMaskType,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        if getattr(config, "window_size", None) is not None:
            raise ValueError("sliding-window attention needs Transformer Engine")
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()

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
        mask = attention_mask if mask_type in (AttnMaskType.arbitrary, AttnMaskType.padding) else None
        is_causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        return self._attend(q, k, v, is_causal=is_causal, mask=mask).permute(2, 0, 1, 3).flatten(2)

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
            outputs.append(self._attend(q_chunk, k_chunk, v_chunk, is_causal=True)[0].transpose(0, 1))
        return torch.cat(outputs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, mask: Tensor | None = None) -> Tensor:
        """Attend, [b,h,s,d] each. A causal mask is aligned to the last key, as decoding with a cache needs."""
        allowed: Tensor | CausalBias | None = None if mask is None else ~mask  # Megatron's mask is true where masked
        if is_causal and q.shape[2] != k.shape[2]:
            allowed, is_causal = causal_lower_right(q.shape[2], k.shape[2]), False
        options: dict[str, Any] = dict(
            attn_mask=allowed, is_causal=is_causal, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        if not self.training or self.dropout == 0.0:
            return F.scaled_dot_product_attention(q, k, v, **options)
        with tensor_parallel.get_cuda_rng_tracker().fork():  # heads differ over TP ranks, and so must their dropout
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, **options)


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
