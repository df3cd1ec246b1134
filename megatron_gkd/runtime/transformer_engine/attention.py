"""Core attention on torch's scaled_dot_product_attention: grouped queries, packed sequences, context parallelism.

Shapes: s tokens of this rank, b batch, h query heads, g key/value heads, d head size. Packed ("thd") input has no batch
dimension; its sequences are delimited by `cu_seqlens_q_padded` (or `cu_seqlens_q`) over the tokens of the whole
microbatch.

Under context parallelism each sequence is cut in 2·CP chunks and rank r holds chunks r and 2·CP−1−r (zigzag, so that
causal work is balanced). Keys and values are gathered over the group and put back in order; then each local chunk of
queries attends to a prefix of its sequence, which is a causal mask aligned to the last key.
"""

from __future__ import annotations

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
        """q [s,b,h,d], k and v [s,b,g,d] -> [s,b,h·d]; packed: q [s,h,d], k and v [s,g,d] -> [s,h·d]."""
        if attention_bias is not None:
            raise ValueError("an attention bias needs Transformer Engine")
        mask_type = attn_mask_type or self.attn_mask_type
        if packed_seq_params is not None:
            cu_seqlens = packed_seq_params.cu_seqlens_q_padded
            if cu_seqlens is None:
                cu_seqlens = packed_seq_params.cu_seqlens_q
            return self._packed(q, k, v, cu_seqlens).flatten(1)
        if self.cp_group.size() > 1:
            raise ValueError("context parallelism needs packed sequences here")
        heads_first = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        explicit = attention_mask if mask_type in (AttnMaskType.arbitrary, AttnMaskType.padding) else None
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        return self._attend(*heads_first, causal=causal, mask=explicit).permute(2, 0, 1, 3).flatten(2)

    def _packed(self, q, k, v, cu_seqlens):
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size > 1:
            k, v = (_gather_in_order(t, cu_seqlens, self.cp_group) for t in (k, v))
        outputs, boundaries, offset = [], cu_seqlens.tolist(), 0
        for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
            if end == start:
                continue
            length = (end - start) // size if size == 1 else (end - start) // (2 * size)
            for chunk in (0,) if size == 1 else (rank, 2 * size - 1 - rank):
                queries = q[offset : offset + length]
                offset += length
                visible = slice(start, start + (chunk + 1) * length)
                heads_first = (t.transpose(0, 1)[None] for t in (queries, k[visible], v[visible]))
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


def _gather_in_order(x: torch.Tensor, cu_seqlens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[s, g, d] of each rank -> [s·CP, g, d] of the whole microbatch, in sequence order."""
    gathered = _AllGather.apply(x, group)
    position = torch.cat([context_parallel_indices(cu_seqlens, r, group.size()) for r in range(group.size())])
    order = torch.argsort(position.to(x.device))
    return gathered.index_select(0, order)


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
