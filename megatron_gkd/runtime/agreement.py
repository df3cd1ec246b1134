"""Agree between ranks: a failure of one rank is raised in all of them."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_gkd.errors import GkdError, UserError
from megatron_gkd.runtime import portability

T = TypeVar("T")


def holds_everywhere(condition: bool) -> bool:
    """Return whether `condition` holds in every rank of the world. All ranks must call it."""
    flag = torch.tensor([int(condition)], device=portability.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def first_problem(problem: T | None) -> T | None:
    """Return the first rank's `problem` on every rank; None if no rank has one. All ranks must call it."""
    if holds_everywhere(problem is None):
        return None
    problems: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(found for found in problems if found is not None)


def raise_together(
    problem: str | None, kind: type[GkdError] = UserError, *, cause: BaseException | None = None
) -> None:
    """Raise the first rank's `problem` in every rank; return if no rank has one. All ranks must call it.

    The exit code is that of the first rank's `cause`, so that a mistake of the user stays one.

    Args:
        problem: of this rank.
        kind: the exception to raise.
        cause: this rank's own exception behind its problem.
    """
    code = cause.exit_code if isinstance(cause, GkdError) else kind.exit_code
    first = first_problem(None if problem is None else (problem, code))
    if first is not None:
        error = kind(first[0])
        error.exit_code = first[1]
        raise error from cause


def run_on_all(work: Callable[[], T], kind: type[GkdError] = UserError, *, os_error: str = "") -> T:
    """Run `work` on every rank and return each rank its own result. All ranks must call it.

    Args:
        work: raises GkdError or OSError if it fails. It may only use collectives before it can fail.
        kind: the exception to raise in all ranks.
        os_error: begins the message for an OSError.

    Raises:
        kind: in all ranks, with the first failing rank's message and exit code; on that rank its own exception is the
            cause.
    """
    result: T | None = None
    problem: str | None = None
    cause: Exception | None = None
    try:
        result = work()
    except OSError as error:
        problem, cause = f"{os_error} ({error})" if os_error else str(error), error
    except GkdError as error:
        problem, cause = str(error), error
    raise_together(problem, kind, cause=cause)
    return cast(T, result)


def run_on_main(work: Callable[[], T], kind: type[GkdError] = UserError, *, os_error: str = "") -> T:
    """Run `work` on rank 0 and return its result, which must be picklable, on every rank; see `run_on_all`.

    The ranks wait in a collective, which has a time limit. For work that may take longer see `runtime.nodes`.
    """
    result = [run_on_all(lambda: work() if dist.get_rank() == 0 else None, kind, os_error=os_error)]
    dist.broadcast_object_list(result, src=0)
    return cast(T, result[0])


class FailureMeeting:
    """Find out, without a collective, whether every rank of a run has failed.

    After an exception a rank may only communicate if all others have left their step too. Ranks post their failures to
    the store of the process group, which needs no other rank to be in a collective.

    Args:
        name: the same in all ranks, and of no other run in these processes; see `create`.
        seconds: how long `join` waits for the other ranks.
    """

    def __init__(self, name: str, seconds: float = 30.0) -> None:
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
