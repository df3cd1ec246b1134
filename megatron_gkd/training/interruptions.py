"""The end of a run before its last step, by a signal or by its time limit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_gkd.runtime import portability
from megatron_gkd.runtime.signals import STOP_SIGNALS, StopSignals
from megatron_gkd.runtime.time_limit import TimeLimit

_REASONS = ("", "time limit (train.max_runtime)", *(number.name for number in STOP_SIGNALS))


@dataclass(frozen=True)
class Interruptions:
    """The causes that may end a run between two steps. All ranks must make the same calls.

    Attributes:
        signals: signals to this process; None: there are no handlers.
        limit: the time limit; None: there is none.
    """

    signals: StopSignals | None = None
    limit: TimeLimit | None = None

    def begin(self) -> None:
        """Start with the first step: from now on signals wait for the end of a step."""
        if self.signals is not None:
            self.signals.defer()
        if self.limit is not None:
            self.limit.begin()

    def agree(self) -> str | None:
        """Return the reason to end the run after this step, the same on all ranks; None to continue."""
        found = torch.tensor([_REASONS.index(self._reason())], device=portability.device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return _REASONS[int(found)] or None

    def _reason(self) -> str:
        if self.signals is not None and self.signals.received is not None:
            return self.signals.received
        if self.limit is not None:
            self.limit.step_ended()
            if self.limit.is_near():
                return _REASONS[1]
        return ""
