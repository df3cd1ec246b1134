"""Run the real pipeline schedule of a step with chunks without layers, which allocate what was traced.

So the number of microbatches in flight, the peak of their activations, and the messages between stages are those of
Megatron's schedules, interleaved or not.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.models.pipeline import Pipeline
from megatron_gkd.models.vision.parts import language_model
from megatron_gkd.planning.microbatch import PlannedMicrobatch
from megatron_gkd.planning.trace import Trace, new_message
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.meter import Collective, Meter

_ROUNDS = 6
"""Microbatches that are run, as a multiple of the number of chunks of the whole pipeline; further ones repeat them."""


@dataclass(frozen=True)
class StepCosts:
    """What all microbatches of a step cost in a rank's chunks together.

    Attributes:
        peak: most bytes of activations at the same time.
        in_flight: most microbatches whose activations are kept at the same time, in whole models of this rank.
        messages: what is sent to other stages.
    """

    peak: int
    in_flight: float
    messages: Counter[Collective] = field(repr=False)


def run_schedule(
    model: MegatronModel, traces: Sequence[Trace], microbatch: PlannedMicrobatch, count: int, *, backward: bool
) -> StepCosts:
    """Run the schedule of a step.

    Args:
        model: whose chunks were traced.
        traces: of each chunk.
        microbatch: one of the step's.
        count: number of microbatches.
        backward: whether the step has backward passes.
    """
    stages = model.mesh.pp.size() * len(traces)
    run = min(count, _ROUNDS * stages)
    flight = _Flight(backward)
    chunks = [
        _StandIn(chunk, trace, index, flight)
        for index, (chunk, trace) in enumerate(zip(model.chunks, traces, strict=True))
    ]
    meter = Meter(portability.device().type)
    with meter, torch.set_grad_enabled(backward):
        _run(chunks, model.mesh, [microbatch] * run, backward)
    repeated = Counter({kind: number * count // run for kind, number in meter.collectives.items()})
    if model.config.variable_seq_lengths:
        repeated += _shapes_of(repeated)
    return StepCosts(meter.peak, flight.most / len(chunks), repeated)


def _shapes_of(messages: Counter[Collective]) -> Counter[Collective]:
    """Return the messages by which each tensor's shape, three integers, is sent before it."""
    shapes: Counter[Collective] = Counter()
    for kind, number in messages.items():
        shapes[kind._replace(num_bytes=24)] += number
    return shapes


def _run(chunks: Sequence[_StandIn], mesh: Mesh, microbatches: Sequence[PlannedMicrobatch], backward: bool) -> None:
    pipeline = Pipeline(chunks, mesh)
    if not backward:
        pipeline.forward_only(microbatches, _forward, lambda output, microbatch: None)
        return
    tokens = torch.zeros((), dtype=torch.int32, device=portability.device())
    pipeline.forward_backward(microbatches, _forward, lambda output, index: (output, tokens, None))


def _forward(chunk: nn.Module, microbatch: PlannedMicrobatch) -> Tensor:
    output: Tensor = chunk(microbatch)
    return output


class _Flight:
    """Counts how many forward passes wait for their backward passes."""

    def __init__(self, has_backward: bool) -> None:
        self.has_backward = has_backward
        self.now = self.most = 0

    def begin(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def end(self) -> None:
        self.now -= 1


class _StandIn(nn.Module):
    """A chunk without layers, with what the schedules read of one."""

    def __init__(self, chunk: Any, trace: Trace, index: int, flight: _Flight) -> None:
        super().__init__()
        language = language_model(chunk)
        self.config = copy.copy(chunk.config)
        for name in ("finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func"):
            setattr(self.config, name, None)
        self.config.param_sync_func = None
        self.config.variable_seq_lengths = False  # the exchange of shapes would read them
        self.model_type, self.vp_stage = language.model_type, index
        self.pre_process, self.post_process = language.pre_process, language.post_process
        self._trace, self._flight = trace, flight
        self._source: Tensor | None = None
        # What makes the first chunk's output depend on something that is trained.
        self._anchor = nn.Parameter(torch.empty(0, device=portability.device()))

    def set_input_tensor(self, tensors: Any) -> None:
        """Set what the chunk before this one has sent."""
        self._source = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, microbatch: PlannedMicrobatch) -> Tensor:
        """Return an output of the chunk's shape: with a backward pass, a loss after the last layer."""
        source = self._anchor if self._source is None else self._source
        output: Tensor = _Step.apply(source, self._trace, self._flight, lambda: self._new_output(microbatch))
        return output

    def _new_output(self, microbatch: PlannedMicrobatch) -> Tensor:
        is_loss = self.post_process and self._flight.has_backward
        return torch.empty((), device=portability.device()) if is_loss else new_message(self, microbatch)


class _Step(torch.autograd.Function):
    """Allocates what a chunk does in its passes, and keeps what it keeps."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, trace: Trace, flight: _Flight, make: Callable[[], Tensor]) -> Tensor:
        _allocate(trace.kept + trace.forward_transient)
        ctx.trace, ctx.flight, ctx.shape, ctx.dtype = trace, flight, source.shape, source.dtype
        if flight.has_backward:
            ctx.kept = _allocate(trace.kept - trace.output)
            flight.begin()
        return make()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _allocate(ctx.trace.backward_transient)
        ctx.kept = None
        ctx.flight.end()
        return torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device), None, None, None


def _allocate(num_bytes: int) -> Tensor:
    """Allocate so many bytes, which are free again where the caller drops the result."""
    return torch.empty(max(0, num_bytes), dtype=torch.uint8, device=portability.device())
