"""Keys and values of what was generated so far, and the attention that reads them.

Megatron-Core's own inference contexts do not serve here: the static one has one length for the whole batch, the dynamic
one asks for flash-attn, and neither goes with hidden states as the model's output. But training packs rows ("thd") and
gives every token its position, and so may decoding; all that has to change is the core attention. Inside `installed()`
those of all layers are torch's, over the cache: no token is sent around a context-parallel group.

Shapes: T tokens of a forward pass, h query heads, g key/value heads, d head size (of this tensor-parallel rank),
n started rows, p prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_gkd.rollout.megatron.lane import StepBatch


class KeyValueCache:
    """`lane_sizes[i]` rows of `capacity` tokens for lane i, in every layer; taken when they are first written to."""

    def __init__(self, lane_sizes: Sequence[int], capacity: int, softmax_scale: float | None = None):
        self.lane_sizes, self.capacity, self.softmax_scale = lane_sizes, capacity, softmax_scale
        self._memory: dict[tuple[int, nn.Module], tuple[Tensor, Tensor]] = {}
        self._step: _Step | None = None

    @contextlib.contextmanager
    def installed(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        """The layers of `chunks` attend over this cache inside; its memory is freed at the end."""
        cores = [layer.self_attention.core_attention for chunk in chunks for layer in chunk.decoder.layers]
        for core in cores:
            core.forward = partial(self._attend, core)  # hides the method of its class
        try:
            yield
        finally:
            for core in cores:
                del core.forward
            self._memory.clear()

    def begin(self, batch: StepBatch) -> None:
        """What the next forward pass computes."""
        self._step = _Step(batch)

    def move(self, lane: int, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` over row `target`, in all layers."""
        for (owner, _), memory in self._memory.items():
            if owner == lane:
                for rows in memory:
                    rows[target, :, :length] = rows[source, :, :length]

    def _attend(self, core: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_, **__) -> Tensor:
        """Q [T,h,d], k and v [T,g,d], rotated -> [T,h·d]; zeros where padding."""
        step = self._step
        out = q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
        if step.num_rows == 0:
            return out
        keys, values = self._rows(core, k, v)
        n, end = step.num_started, step.num_tokens
        if n:
            out[:n] = self._decode(step, q[:n], k[:n], v[:n], keys, values)
        if end > n:
            out[n:end] = self._prefill(step, q[n:end], k[n:end], v[n:end], keys, values)
        return out

    def _decode(self, step: _Step, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        n, heads, size = q.shape
        keys[step.started, :, step.positions] = k
        values[step.started, :, step.positions] = v
        # The query heads that share a key head stand where several queries of one head would: [n, g, h/g, d].
        attended = F.scaled_dot_product_attention(
            q.view(n, k.shape[1], heads // k.shape[1], size),
            keys[:n, :, : step.longest],
            values[:n, :, : step.longest],
            attn_mask=step.visible,
            scale=self.softmax_scale,
        )
        return attended.flatten(1)

    def _prefill(self, step: _Step, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (step.pad(x) for x in (q, k, v))
        rows = slice(step.num_started, step.num_rows)
        # What the padding leaves behind lies after the row's last token, where nothing looks before it is overwritten.
        keys[rows, :, : k.shape[2]] = k
        values[rows, :, : v.shape[2]] = v
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return step.unpad(attended)

    def _rows(self, core: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [size, g, capacity, d] each."""
        place = (self._step.lane, core)
        if place not in self._memory:
            size = self.lane_sizes[self._step.lane]
            # Zeros: a masked key's score is ignored, unless it is not a number.
            self._memory[place] = tuple(x.new_zeros(size, x.shape[1], self.capacity, x.shape[2]) for x in (k, v))
        return self._memory[place]


class _Step:
    """A batch as the attention sees it, worked out once for all layers."""

    def __init__(self, batch: StepBatch):
        device = batch.input_ids.device
        self.lane, self.num_rows = batch.lane, batch.num_rows
        self.positions, self.longest = batch.decoding, batch.longest
        self.num_started = len(batch.decoding)
        self.num_tokens = self.num_started + sum(batch.prompt_lengths)
        if self.num_started:
            self.started = torch.arange(self.num_started, device=device)
            self.visible = (torch.arange(self.longest, device=device) <= batch.decoding[:, None])[:, None, None]
        if batch.prompt_lengths:
            self.padded_shape = len(batch.prompt_lengths), max(batch.prompt_lengths)
            lengths = torch.tensor(batch.prompt_lengths, device=device)
            is_token = torch.arange(self.padded_shape[1], device=device) < lengths[:, None]
            self.places = is_token.flatten().nonzero().squeeze(1)

    def pad(self, x: Tensor) -> Tensor:
        """Prompts one after another, [tokens, heads, d] -> [p, heads, longest, d]."""
        padded = x.new_zeros(self.padded_shape[0] * self.padded_shape[1], *x.shape[1:])
        padded[self.places] = x
        return padded.unflatten(0, self.padded_shape).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[p, h, longest, d] -> [tokens, h·d]."""
        return x.transpose(1, 2).flatten(0, 1).flatten(1)[self.places]
