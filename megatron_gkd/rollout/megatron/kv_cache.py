"""Keys and values of what was generated so far, and the attention that reads them.

Megatron-Core's own inference contexts do not fit: the static one has one length for the whole batch, the dynamic one
requires flash-attn, and neither supports hidden states as the model's output. But training packs sequences ("thd") and
gives every token its position, and decoding can do the same; only the core attention has to change. Inside
`installed()` the core attention of every layer is torch's, over the cache, with the scale, window and sinks of the
layer's own: no token is sent around a context-parallel group.

Shapes: T tokens of a forward pass, h query heads, g key/value heads, d head size (of this tensor-parallel rank),
n started sequences, p prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import megatron_gkd.runtime.preload  # noqa: F401
from megatron_gkd.rollout.megatron.decode_batch import DecodeInputs
from megatron_gkd.runtime.transformer_engine.attention import causal_attention_of
from megatron_gkd.runtime.transformer_engine.causal_attention import CausalAttention


class KeyValueCache:
    """Keys and values of every layer; memory is allocated when it is first written to.

    Args:
        capacity: most tokens of a sequence.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._shapes: dict[int, tuple[int, int]] = {}
        self._memory: dict[tuple[int, nn.Module], tuple[Tensor, Tensor]] = {}
        self._plan: _AttentionPlan | None = None

    @contextlib.contextmanager
    def installed(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        """Let the layers of `chunks` attend over this cache inside the context; free its memory at the end."""
        cores: list[Any] = [layer.self_attention.core_attention for layer in _layers(chunks)]
        for core in cores:
            core.forward = partial(self._attend, core)  # hides the method of its class
        try:
            yield
        finally:
            for core in cores:
                del core.forward
            self._memory.clear()

    def begin(self, inputs: DecodeInputs) -> None:
        """Prepare for the forward pass of these inputs."""
        self._plan = _AttentionPlan(inputs)

    def reshape(self, batch: int, shape: tuple[int, int], lengths: Sequence[int]) -> None:
        """Give a batch so many rows of so many tokens.

        Args:
            batch: number of the `DecodeBatch`.
            shape: rows, and tokens of a row.
            lengths: tokens to keep of the first rows.
        """
        if self._shapes.get(batch) == shape:
            return
        self._shapes[batch] = shape
        for place, (keys, values) in self._memory.items():
            if place[0] == batch:
                self._memory[place] = _reshape(keys, shape, lengths), _reshape(values, shape, lengths)

    def move(self, batch: int, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` over row `target`, in all layers."""
        for (owner, _), memory in self._memory.items():
            if owner == batch:
                for rows in memory:
                    rows[target, :, :length] = rows[source, :, :length]

    def _attend(self, core: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend with q [T,h,d], k and v [T,g,d], rotated. Returns [T,h·d]; zeros for padding."""
        plan = self._plan
        if plan is None:
            raise RuntimeError("KeyValueCache.begin must be called before a forward pass")
        out = q.new_zeros(q.shape[0], q.shape[1] * v.shape[2])
        if plan.num_rows == 0:
            return out
        rows, attention = self._rows(plan.batch, core, k, v), causal_attention_of(core)
        n, end = plan.num_started, plan.num_tokens
        if n:
            out[:n] = self._decode(plan, attention, (q[:n], k[:n], v[:n]), rows)
        if end > n:
            out[n:end] = self._prefill(plan, attention, (q[n:end], k[n:end], v[n:end]), rows)
        return out

    def _decode(
        self,
        plan: _AttentionPlan,
        attention: CausalAttention,
        qkv: tuple[Tensor, Tensor, Tensor],
        rows: tuple[Tensor, Tensor],
    ) -> Tensor:
        (q, k, v), (keys, values) = qkv, rows
        n, heads, size = q.shape
        keys[plan.started, :, plan.positions] = k
        values[plan.started, :, plan.positions] = v
        # Query heads that share a key head take the place of several queries of one head: [n, g, h/g, d].
        per_group = (k.shape[1], heads // k.shape[1])
        if attention.sinks is not None:
            attention = replace(attention, sinks=attention.sinks.view(per_group))
        return attention.attend(
            q.view(n, *per_group, size),
            keys[:n, :, : plan.max_length],
            values[:n, :, : plan.max_length],
            plan.visible(attention.window),
        ).flatten(1)

    def _prefill(
        self,
        plan: _AttentionPlan,
        attention: CausalAttention,
        qkv: tuple[Tensor, Tensor, Tensor],
        rows: tuple[Tensor, Tensor],
    ) -> Tensor:
        q, k, v = (plan.pad(x) for x in qkv)
        keys, values = rows
        places = slice(plan.num_started, plan.num_rows)
        # Padding is written behind a row's last token; attention does not read there before it is overwritten.
        keys[places, :, : k.shape[2]] = k
        values[places, :, : v.shape[2]] = v
        return plan.unpad(attention(q, k, v))

    def _rows(self, batch: int, core: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, [rows, g, tokens, d] each."""
        place = (batch, core)
        if place not in self._memory:
            # Zeros: a masked key's score is ignored, unless it is not a number.
            num_rows, length = self._shapes[batch]
            keys, values = (x.new_zeros(num_rows, x.shape[1], length, x.shape[2]) for x in (k, v))
            self._memory[place] = keys, values
        return self._memory[place]


def _reshape(rows: Tensor, shape: tuple[int, int], lengths: Sequence[int]) -> Tensor:
    reshaped = rows.new_zeros(shape[0], rows.shape[1], shape[1], rows.shape[3])
    longest = max(lengths, default=0)
    reshaped[: len(lengths), :, :longest] = rows[: len(lengths), :, :longest]
    return reshaped


def _layers(chunks: Sequence[Any]) -> list[Any]:
    return [layer for chunk in chunks for layer in getattr(chunk, "language_model", chunk).decoder.layers]


class _AttentionPlan:
    """The places and masks of one forward pass, computed once for all layers."""

    def __init__(self, inputs: DecodeInputs) -> None:
        device = inputs.input_ids.device
        self.batch, self.num_rows = inputs.batch, inputs.num_rows
        self.positions, self.max_length = inputs.decode_positions, inputs.max_decode_length
        self.num_started = len(inputs.decode_positions)
        self.num_tokens = self.num_started + sum(inputs.prompt_lengths)
        self._visible: dict[int | None, Tensor] = {}
        self.started = torch.arange(self.num_started, device=device)
        if inputs.prompt_lengths:
            self.padded_shape = len(inputs.prompt_lengths), max(inputs.prompt_lengths)
            lengths = torch.tensor(inputs.prompt_lengths, device=device)
            is_token = torch.arange(self.padded_shape[1], device=device) < lengths[:, None]
            self.places = is_token.flatten().nonzero().squeeze(1)

    def visible(self, window: int | None) -> Tensor:
        """Return bool [n, 1, 1, max_length]: the keys that started sequences see, at most `window` newest ones."""
        if window not in self._visible:
            ages = self.positions[:, None] - torch.arange(self.max_length, device=self.positions.device)
            is_visible = ages >= 0 if window is None else (ages >= 0) & (ages < window)
            self._visible[window] = is_visible[:, None, None]
        return self._visible[window]

    def pad(self, x: Tensor) -> Tensor:
        """Pad prompts that follow each other, [tokens, heads, d] -> [p, heads, longest, d]."""
        padded = x.new_zeros(self.padded_shape[0] * self.padded_shape[1], *x.shape[1:])
        padded[self.places] = x
        return padded.unflatten(0, self.padded_shape).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """Remove the padding, [p, h, longest, d] -> [tokens, h·d]."""
        return x.transpose(1, 2).flatten(0, 1).flatten(1)[self.places]
