"""Trace one microbatch through a chunk of a model, of which one or two layers are run and the others are the same.

Memory, FLOPs and collectives are linear in the number of layers of a kind. So the chunk is run with its first layer
alone, and once more with one further layer of each kind; what the further layer adds is counted for all of its kind.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_gkd.models.megatron_model import hidden_states
from megatron_gkd.models.vision.parts import language_model
from megatron_gkd.planning.layer_kinds import Layers, Unit, layers_of
from megatron_gkd.planning.microbatch import PlannedMicrobatch
from megatron_gkd.planning.transfers import Links, Transfer, by_link
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.meter import Meter

Finish = Callable[[Tensor], Tensor]
"""Of the last hidden states: the loss, or what is kept of a teacher's."""


@dataclass(frozen=True)
class Trace:
    """What one microbatch costs in a chunk.

    Attributes:
        kept: bytes that the forward pass leaves, its output and what follows on it among them.
        output: bytes of what it returns.
        forward_transient: most bytes beside `kept`, during the forward pass and what follows on it.
        backward_transient: most bytes beside `kept`, during the backward pass.
        loss: most bytes of what follows on the last hidden states, beside what the layers left; 0 before the last.
        forward_flops: of the layers.
        backward_flops: of all.
        loss_flops: of what follows on the last hidden states.
        collectives: of all passes.
    """

    kept: int
    output: int
    forward_transient: int
    backward_transient: int
    loss: int
    forward_flops: float
    backward_flops: float
    loss_flops: float
    collectives: Counter[Transfer] = field(repr=False)


@dataclass(frozen=True)
class Passes:
    """How a chunk is run.

    Attributes:
        microbatch: its input.
        finish: called on the output of the last chunk; None for other chunks.
        has_backward: whether there is a backward pass.
        links: of the process groups.
        resident: tensors that exist anyway, beside the chunk's own.
    """

    microbatch: PlannedMicrobatch
    finish: Finish | None
    has_backward: bool
    links: Links
    resident: Sequence[Any] = ()


def trace_chunk(chunk: Any, passes: Passes) -> Trace:
    """Return the costs of a microbatch in all layers of a chunk, from runs with one or two of them."""
    layers = layers_of(chunk, is_trained=passes.has_backward)
    with _text_alone(chunk):
        units = layers.units
        _run(chunk, layers, units[:1], passes)  # fills caches, such as those of rotary embeddings
        first = _run(chunk, layers, units[:1], passes)
        pairs = {}
        for unit in reversed(units[1:]):
            if unit.kind not in pairs:
                pairs[unit.kind] = _run(chunk, layers, (units[0], unit), passes)
    return _combine(first, [pairs[unit.kind] for unit in units[1:]], [unit.kind == units[0].kind for unit in units[1:]])


@dataclass(frozen=True)
class _Run:
    """A run of a chunk with some of its layers. All bytes are beside those before it.

    Attributes:
        kept: after the layers.
        finished: after what follows on them.
        left: after the backward pass; Megatron's experts refer to tensors of their newest microbatch.
        forward_peak: of the layers.
        loss_peak: of what follows on them.
        backward_peak: of the backward pass.
        output: of what it returns.
        flops: of the layers, of what follows on them, and of the backward pass.
        collectives: of all.
    """

    kept: int
    finished: int
    left: int
    forward_peak: int
    loss_peak: int
    backward_peak: int
    output: int
    flops: tuple[float, float, float]
    collectives: Counter[Transfer] = field(repr=False)


def _combine(first: _Run, pairs: Sequence[_Run], is_first_kind: Sequence[bool]) -> Trace:
    """Return the costs of a chunk.

    Args:
        first: the run with its first unit of layers alone.
        pairs: for each other unit of layers, the run with the first one and this one.
        is_first_kind: for each other unit, whether it is of the first one's kind.
    """
    forward, loss, backward = first.flops
    kept, finished, left = first.kept, first.finished, first.left
    collectives = Counter(first.collectives)
    forward_peak, backward_peak = first.forward_peak, first.backward_peak
    for pair, is_same in zip(pairs, is_first_kind, strict=True):
        added, stays = pair.kept - first.kept, pair.left - first.left
        kept, finished, left = kept + added, finished + added, left + stays
        # Passes run through the layers in order and back: in this unit of layers there is what those before it keep,
        # and in the backward pass what those after it have left.
        alone = first if is_same else pair
        forward_peak = max(forward_peak, kept + alone.forward_peak - alone.kept)
        backward_peak = max(backward_peak + stays, finished + alone.backward_peak - alone.finished)
        forward += pair.flops[0] - first.flops[0]
        backward += pair.flops[2] - first.flops[2]
        for kind in {*pair.collectives, *first.collectives}:
            collectives[kind] += pair.collectives[kind] - first.collectives[kind]
    return Trace(
        kept=finished,
        output=first.output,
        forward_transient=max(forward_peak, kept + first.loss_peak - first.kept) - finished,
        backward_transient=max(0, backward_peak - finished),
        loss=first.loss_peak - first.kept,
        forward_flops=forward,
        backward_flops=backward,
        loss_flops=loss,
        collectives=+collectives,
    )


def _run(chunk: Any, layers: Layers, units: Sequence[Unit], passes: Passes) -> _Run:
    """Run the chunk with some units of its layers."""
    meter = Meter(portability.device().type)
    meter.track(list(chunk.parameters()), list(chunk.buffers()), passes.resident, vars(passes.microbatch))
    meter.track([getattr(parameter, "main_grad", None) for parameter in chunk.parameters()])
    language = language_model(chunk)
    source = None if language.pre_process else new_message(language, passes.microbatch).requires_grad_()
    gradient = new_message(language, passes.microbatch) if passes.has_backward and passes.finish is None else None
    meter.track(source, gradient)
    chunk.set_input_tensor(source)
    with layers.only(units), torch.set_grad_enabled(passes.has_backward), meter:
        run = _measure(meter, chunk, gradient, passes)
    chunk.set_input_tensor(None)
    return run


def _measure(meter: Meter, chunk: Any, gradient: Tensor | None, passes: Passes) -> _Run:
    base = meter.live
    meter.reset_peak()
    output = hidden_states(chunk, passes.microbatch)
    kept, forward_peak, forward_flops = meter.live, meter.peak, meter.flops
    meter.reset_peak()
    if passes.finish is not None:
        output = passes.finish(output)
    finished, loss_peak, loss_flops = meter.live, meter.peak, meter.flops - forward_flops
    before, num_bytes = meter.flops, output.nbytes
    meter.reset_peak()
    if passes.has_backward and output.requires_grad:
        output.backward(gradient)
    backward_peak = meter.peak
    del output
    return _Run(
        kept=kept - base,
        finished=finished - base,
        left=meter.live - base,
        forward_peak=forward_peak - base,
        loss_peak=loss_peak - base,
        backward_peak=backward_peak - base,
        output=num_bytes,
        flops=(forward_flops, loss_flops, meter.flops - before),
        collectives=by_link(meter.collectives, passes.links),
    )


def new_message(language: Any, microbatch: PlannedMicrobatch) -> Tensor:
    """Return a tensor of the shape that chunks send to each other, [T/TP, 1, H]."""
    config = language.config
    rows = microbatch.input_ids.shape[1]
    if config.sequence_parallel:
        rows //= config.tensor_model_parallel_size
    return torch.empty(rows, 1, config.hidden_size, dtype=config.params_dtype, device=portability.device())


@contextlib.contextmanager
def _text_alone(chunk: nn.Module) -> Iterator[None]:
    """Leave out the vision tower of a multimodal chunk inside."""
    if language_model(chunk) is chunk:
        yield
        return
    config: Any = chunk.config
    before, config.language_model_only = config.language_model_only, True
    try:
        yield
    finally:
        config.language_model_only = before
