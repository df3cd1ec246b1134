"""Gather the updated parameters once in a step, where Megatron-Core's distributed optimizer would do it twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.training.optimizer_state import optimizer_parts

from megatron.core.optimizer import MegatronOptimizer


@contextlib.contextmanager
def parameters_gathered_once(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let each chunk of the model gather its parameters after the last optimizer that updates some of them.

    A mixture of experts has one optimizer for its dense parameters and one for its experts. Both name the same chunks,
    and a chunk gathers all of its parameters (`DistributedOptimizer.step_with_ready_grads`, Megatron-Core 0.16.1).
    """
    parts = [part for part in optimizer_parts(optimizer) if hasattr(part, "model_chunks")]
    before = [part.model_chunks for part in parts]
    for index, part in enumerate(parts):
        later = [chunk for chunks in before[index + 1 :] for chunk in chunks]
        part.model_chunks = [chunk for chunk in before[index] if all(chunk is not other for other in later)]
    try:
        yield
    finally:
        for part, chunks in zip(parts, before, strict=True):
            part.model_chunks = chunks
