"""Agreement between ranks: whatever goes wrong in one of them is raised in all."""

from __future__ import annotations

import datetime
import secrets

import torch
import torch.distributed as dist

from megatron_gkd.errors import GkdError, UserError
from megatron_gkd.runtime import portability


def holds_everywhere(condition: bool) -> bool:
    """Return whether `condition` holds in every rank of the world. All ranks must call it."""
    flag = torch.tensor([int(condition)], device=portability.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def first_problem(problem: str | None) -> str | None:
    """Return the first rank's `problem` on every rank; None if no rank has one. All ranks must call it."""
    if holds_everywhere(problem is None):
        return None
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(found for found in problems if found is not None)


def raise_together(problem: str | None, kind: type[GkdError] = UserError) -> None:
    """Raise the first rank's `problem` in every rank; return if no rank has one. All ranks must call it."""
    problem = first_problem(problem)
    if problem is not None:
        raise kind(problem)


class FailureMeeting:
    """Find out, without a collective, whether every rank of a run has failed.

    After an exception a rank may only communicate if all others have left their step too. Ranks post their failures to
    the store of the process group, which needs no other rank to be in a collective.

    Args:
        name: the same in all ranks, and of no other run in these processes; see `create`.
        seconds: how long `join` waits for the other ranks.
    """

    def __init__(self, name: str, seconds: float = 30.0):
        self.name, self.seconds = name, seconds

    @classmethod
    def create(cls) -> FailureMeeting:
        """Return a meeting of all ranks of the world. All ranks must call it, while nothing is wrong yet."""
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, src=0)
        return cls(name[0])

    def join(self, failure: str) -> list[str] | None:
        """Post this rank's failure and wait for the others'.

        Returns:
            The failures of all ranks in rank order, or None if not every rank failed within `seconds`.
        """
        if dist.get_world_size() == 1:
            return [failure]
        keys = [f"failed/{self.name}/{rank}" for rank in range(dist.get_world_size())]
        store = _store()
        try:
            store.set(keys[dist.get_rank()], failure)
            store.wait(keys, datetime.timedelta(seconds=self.seconds))
            return [store.get(key).decode() for key in keys]
        except RuntimeError:  # time-out, or the store's rank is gone
            return None


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
