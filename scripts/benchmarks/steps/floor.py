"""The floor of a step: the matrix products and the attention that it can't do without, and nothing else.

Student: each linear layer's product forward, and both of its backward (of the input, of the weight); attention forward
and backward. Teacher: forward alone. Heads, over the positions with labels, in chunks: both models' logits, the
gradient of the hidden states and of the weight. With adapters there are no gradients of the other weights. Experts get
equal shares of the tokens. Not included: the divergence, norms, activations, rotations, embeddings, residuals, routing,
clipping, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.steps.cases import LORA, Case, Sizes, groups, prompt_length
from benchmarks.steps.turns import Turns

CHUNK_TOKENS = 1024  # of one product of the heads, at most


class Contestant:
    """The process of the products."""

    def __init__(self, rank: int, processes: int, root: Path) -> None:
        pass

    def run(self, case: Case, folder: Path, turns: Turns) -> None:
        """Multiply until the last turn."""
        buffers = _Buffers()
        student = Layers(case.student, buffers, is_trained=True, has_lora=case.has_lora)
        teacher = Layers(case.teacher, buffers, is_trained=False)
        heads = Heads(case)
        while turns.begin():
            with torch.no_grad():
                for lengths in groups(case.lengths, case.microbatch_rows):
                    with turns.clock.phase("teacher"):
                        teacher.multiply(lengths)
                    with turns.clock.phase("student"):
                        student.multiply(lengths)
                    with turns.clock.phase("head and loss"):
                        heads.multiply(sum(length - prompt_length(length) for length in lengths))
            turns.end(None)


class _Buffers:
    """Activations, of which products of one size share one."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], Tensor] = {}

    def get(self, name: str, rows: int, columns: int) -> Tensor:
        found = self._found.get((name, columns))
        if found is None or len(found) < rows:
            found = self._found[name, columns] = torch.randn(rows, columns)
        return found[:rows]


class Linear:
    """The products of one linear layer.

    Args:
        inputs: columns of the input.
        outputs: columns of the output.
        buffers: of activations.
        is_trained: whether the gradient of the input is needed.
        has_gradient: whether that of the weight is.
    """

    def __init__(self, inputs: int, outputs: int, buffers: _Buffers, *, is_trained: bool, has_gradient: bool) -> None:
        self._weight, self._buffers, self._is_trained = torch.randn(outputs, inputs), buffers, is_trained
        self._gradient = torch.zeros(outputs, inputs) if has_gradient else None

    def multiply(self, tokens: int) -> None:
        """Multiply forward and, where it is trained, backward."""
        outputs, inputs = self._weight.shape
        x, y = (self._buffers.get("x", tokens, inputs), self._buffers.get("y", tokens, outputs))
        torch.mm(x, self._weight.t(), out=y)
        if self._is_trained:
            torch.mm(y, self._weight, out=self._buffers.get("dx", tokens, inputs))
        if self._gradient is not None:
            self._gradient.addmm_(y.t(), x)


class Layers:
    """The products of a model's layers."""

    def __init__(self, sizes: Sizes, buffers: _Buffers, *, is_trained: bool, has_lora: bool = False) -> None:
        self._sizes, self._buffers, self._is_trained = sizes, buffers, is_trained
        self._heads, self._kv_heads = sizes.hidden // 32, sizes.hidden // 64
        self._linears: list[tuple[Linear, float]] = []  # and the share of tokens that each has
        has_gradient = is_trained and not has_lora
        for _ in range(sizes.layers):
            for inputs, outputs, share in self._shapes():
                kind = dict(is_trained=is_trained, has_gradient=has_gradient)
                self._linears.append((Linear(inputs, outputs, buffers, **kind), share))
                if has_lora:
                    for shape in ((inputs, LORA["rank"]), (LORA["rank"], outputs)):
                        adapter = Linear(*shape, buffers, is_trained=True, has_gradient=True)
                        self._linears.append((adapter, share))

    def _shapes(self) -> list[tuple[int, int, float]]:
        hidden, width = self._sizes.hidden, self._sizes.intermediate
        qkv = 32 * (self._heads + 2 * self._kv_heads)
        attention = [(hidden, qkv, 1.0), (hidden, hidden, 1.0)]
        experts = self._sizes.experts
        if experts is None:
            return [*attention, (hidden, 2 * width, 1.0), (width, hidden, 1.0)]
        expert = [(hidden, width, 2 / experts), (width // 2, hidden, 2 / experts)]
        return [*attention, (hidden, experts, 1.0), *(expert * experts)]

    def multiply(self, lengths: Sequence[int]) -> None:
        """Multiply for a microbatch of rows of `lengths`."""
        for linear, share in self._linears:
            linear.multiply(round(share * sum(lengths)))
        for _ in range(self._sizes.layers):
            for length in lengths:
                self._attend(length)

    def _attend(self, length: int) -> None:
        with torch.set_grad_enabled(self._is_trained):
            queries, keys, values = (
                self._buffers.get(name, length, 32 * heads)
                .view(1, length, heads, 32)
                .transpose(1, 2)
                .detach()
                .requires_grad_(self._is_trained)
                for name, heads in (("q", self._heads), ("k", self._kv_heads), ("v", self._kv_heads))
            )
            result = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        if self._is_trained:
            torch.autograd.grad(result, (queries, keys, values), result.detach())


class Heads:
    """The four products of the heads."""

    def __init__(self, case: Case) -> None:
        rows = min(case.labels, CHUNK_TOKENS)
        self._hidden, self._teacher_hidden = (torch.randn(rows, sizes.hidden) for sizes in (case.student, case.teacher))
        self._weight, self._teacher_weight = (
            torch.randn(case.vocab, sizes.hidden) for sizes in (case.student, case.teacher)
        )
        self._logits, self._teacher_logits = (torch.empty(rows, case.vocab) for _ in range(2))
        self._gradient = None if case.has_lora else torch.zeros_like(self._weight)
        self._hidden_gradient = torch.empty_like(self._hidden)

    def multiply(self, labels: int) -> None:
        """Multiply for a microbatch with so many labels, in chunks."""
        chunks = -(-labels // CHUNK_TOKENS)
        for index in range(chunks):
            rows = labels * (index + 1) // chunks - labels * index // chunks
            logits = self._logits[:rows]
            torch.mm(self._hidden[:rows], self._weight.t(), out=logits)
            torch.mm(self._teacher_hidden[:rows], self._teacher_weight.t(), out=self._teacher_logits[:rows])
            torch.mm(logits, self._weight, out=self._hidden_gradient[:rows])
            if self._gradient is not None:
                self._gradient.addmm_(logits.t(), self._hidden[:rows])
