"""A teacher that is a Megatron model of this run, sharded like the student."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.models.offload import OffloadedWeights
from megatron_gkd.models.vocabulary import reshard_head
from megatron_gkd.teachers.base import Hidden
from megatron_gkd.teachers.label_states import ScoringOptions, compute_hidden
from megatron_gkd.teachers.model_inputs import ModelInputs


class LocalTeacher:
    """A frozen model in eval mode, without DDP, optimizer or autograd graph.

    Args:
        model: the teacher.
        head_rows: rows of the student's head shard (any value on earlier pipeline stages).
        inputs: what it reads of the student's rows; None where both are text models.
        offload: keep the weights in pinned host memory outside of `resident()`; the head shard stays on the device,
            since the student's loss needs it.
        options: how a step's states are computed; None: the defaults.
    """

    def __init__(
        self,
        model: MegatronModel,
        *,
        head_rows: int,
        inputs: ModelInputs | None = None,
        offload: bool = False,
        options: ScoringOptions | None = None,
    ) -> None:
        self.model, self._inputs, self._options = model, inputs or ModelInputs(), options
        for chunk in model.chunks:
            chunk.eval().requires_grad_(False)
        head = model.head
        self.head = None if head is None else reshard_head(head, head_rows, model.mesh.tp)
        self._weights: OffloadedWeights | None = None
        if offload:
            stays = () if head is None or head.weight.shape[0] != head_rows else (head.weight, head.bias)
            everything = (parameter for chunk in model.chunks for parameter in chunk.parameters())
            self._weights = OffloadedWeights(
                parameter for parameter in everything if all(parameter is not one for one in stays)
            )

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """See ``TeacherSource.resident``; offloaded weights are on the device inside the context."""
        return contextlib.nullcontext() if self._weights is None else self._weights.resident()

    def score(self, microbatches: Sequence[Microbatch]) -> list[Hidden | None]:
        """See ``TeacherSource.score``."""
        return compute_hidden(self.model, microbatches, self.head, self._inputs, self._options)
