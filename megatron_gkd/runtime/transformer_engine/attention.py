"""Core attention on torch's scaled_dot_product_attention: grouped queries, packed sequences, context parallelism.

Shapes: s tokens of this rank, b batch, h query heads, g key/value heads, d head size. Packed ("thd") input has no batch
dimension; its sequences are delimited by `cu_seqlens_q_padded` (or `cu_seqlens_q`) over the tokens of the whole
microbatch.

Under context parallelism each sequence is cut in 2·CP chunks and rank r holds chunks r and 2·CP−1−r (zigzag, so that
causal work is balanced). Keys and values are gathered over the group and put back in order; then each local chunk of
queries attends to a prefix of its sequence, which is a causal mask aligned to the last key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.bias import causal_lower_right

from megatron_gkd.data.context_parallel import context_parallel_indices


class TEDotProductAttention(MegatronModule):
    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        k_channels=None,
        v_channels=None,
        num_splits=None,
        cp_comm_type=None,
        pg_collection=None,
        **_,
    ):
        super().__init__(config)
        if getattr(config, "window_size", None) is not None:
            raise ValueError("sliding-window attention needs Transformer Engine")
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()

    def forward(
        self, q, k, v, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None, **_
    ):
        """Q [s,b,h,d], k and v [s,b,g,d] -> [s,b,h·d]; packed: q [s,h,d], k and v [s,g,d] -> [s,h·d]."""
        if attention_bias is not None:
            raise ValueError("an attention bias needs Transformer Engine")
        mask_type = attn_mask_type or self.attn_mask_type
        if packed_seq_params is not None:
            return self._packed(q, k, v, _Packing.of(packed_seq_params, self.cp_group)).flatten(1)
        if self.cp_group.size() > 1:
            raise ValueError("context parallelism needs packed sequences here")
        heads_first = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        explicit = attention_mask if mask_type in (AttnMaskType.arbitrary, AttnMaskType.padding) else None
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        return self._attend(*heads_first, causal=causal, mask=explicit).permute(2, 0, 1, 3).flatten(2)

    def _packed(self, q, k, v, packing: _Packing):
        lengths = [length for _, _, length in packing.chunks]
        if packing.sequence_order is None:  # whole sequences: cut all alike, which has the cheaper backward
            keys, values = k.split(lengths), v.split(lengths)
        else:
            k, v = (_AllGather.apply(x, self.cp_group).index_select(0, packing.sequence_order) for x in (k, v))
            keys, values = ([x[start:end] for start, end, _ in packing.chunks] for x in (k, v))
        outputs = []
        for chunk in zip(q.split(lengths), keys, values, strict=True):
            heads_first = (x.transpose(0, 1)[None] for x in chunk)
            outputs.append(self._attend(*heads_first, causal=True)[0].transpose(0, 1))
        return torch.cat(outputs)

    def _attend(self, q, k, v, *, causal: bool, mask=None):
        """[b,h,s,d] each. A causal mask is aligned to the last key, so that decoding with a cache is right too."""
        if causal and q.shape[2] != k.shape[2]:
            mask, causal = causal_lower_right(q.shape[2], k.shape[2]), False
        elif mask is not None:
            mask = ~mask  # Megatron masks where True, torch attends where True
        attention = dict(
            attn_mask=mask, is_causal=causal, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        if not self.training or self.dropout == 0.0:
            return F.scaled_dot_product_attention(q, k, v, **attention)
        with tensor_parallel.get_cuda_rng_tracker().fork():  # heads differ over TP ranks, and so must their dropout
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, **attention)


@dataclass(frozen=True)
class _Packing:
    """How a microbatch is packed, worked out once for all layers."""

    chunks: list[tuple[int, int, int]]
    """In the order of this rank's tokens: where a chunk's visible keys start and end, and the length of the chunk."""
    sequence_order: torch.Tensor | None
    """int64 [T]: rows of the keys gathered from all context-parallel ranks, in sequence order; None without them."""

    @classmethod
    def of(cls, packed_seq_params, cp_group: dist.ProcessGroup) -> _Packing:
        known = getattr(packed_seq_params, "torch_attention_packing", None)
        if known is None:
            boundaries = packed_seq_params.cu_seqlens_q_padded
            known = cls._of(packed_seq_params.cu_seqlens_q if boundaries is None else boundaries, cp_group)
            packed_seq_params.torch_attention_packing = known
        return known

    @classmethod
    def _of(cls, cu_seqlens: torch.Tensor, cp_group: dist.ProcessGroup) -> _Packing:
        size, rank = cp_group.size(), cp_group.rank()
        chunks, boundaries = [], cu_seqlens.tolist()
        for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
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
    """Concatenate over the group; the gradient is summed over the group and cut again."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None
