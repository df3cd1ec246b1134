"""What a teacher is to the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.errors import ServiceFailed


class TeacherFailed(ServiceFailed):
    """No scores are to be had. All ranks raise it together, and the student is as it was before."""


@dataclass(frozen=True)
class Hidden:
    """A teacher's last hidden states for one microbatch, from which the loss makes logits chunk by chunk."""

    states: torch.Tensor
    """[N, H_T] after the final norm, one row for every label of the microbatch (in order)."""
    head_weight: torch.Tensor
    """[ceil(V/TP), H_T]: the teacher's LM head over the same ids as the student's shard; shared by all microbatches."""


TeacherSignal = Hidden


class TeacherSource(Protocol):
    """`with teacher.resident(): signals = teacher.score(microbatches)`."""

    def resident(self) -> AbstractContextManager[None]:
        """What scoring needs is in place inside (weights on the device, a server reachable)."""
        ...

    def score(self, microbatches: Sequence[Microbatch]) -> list[TeacherSignal | None]:
        """One signal a microbatch on the last pipeline stage, None elsewhere. Model-parallel ranks call it together."""
        ...
