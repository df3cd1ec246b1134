"""Trace all chunks of a model, and equal chunks of several pipeline stages once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.models.vision.parts import language_model
from megatron_gkd.planning.layer_kinds import layers_of
from megatron_gkd.planning.trace import Passes, Trace, trace_chunk

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class TraceCache:
    """Traces of one recipe's models."""

    def __init__(self) -> None:
        self._traces: dict[Hashable, Trace] = {}

    def trace(self, role: str, model: MegatronModel, passes: Passes, contexts: Sequence[Context] = ()) -> list[Trace]:
        """Return the trace of each chunk.

        Args:
            role: of the model in the recipe.
            model: the model.
            passes: how chunks are run; what follows on the last hidden states is left out of others than the last.
            contexts: in which each chunk runs.
        """
        return [
            self._trace(role, chunk, passes, contexts[index] if contexts else contextlib.nullcontext)
            for index, chunk in enumerate(model.chunks)
        ]

    def _trace(self, role: str, chunk: Any, passes: Passes, context: Context) -> Trace:
        language = language_model(chunk)
        units = layers_of(chunk, is_trained=passes.has_backward).units
        key = (role, language.pre_process, language.post_process, tuple(unit.kind for unit in units))
        if key not in self._traces:
            own = passes if language.post_process else replace(passes, finish=None)
            with context():
                self._traces[key] = trace_chunk(chunk, own)
        return self._traces[key]
