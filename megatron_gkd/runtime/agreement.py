"""Agree between ranks: a failure of one rank is raised in all of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_gkd.errors import GkdError, UserError
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.lost_peers import is_of_lost_peer

T = TypeVar("T")
_ALL, _SOME = "all ranks", "some ranks"  # outcomes of a `FailureMeeting`


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

    The exit code is that of the first rank's `cause`, so that a mistake of the user stays one, and 1 where that is
    neither a GkdError nor an OSError.

    Args:
        problem: of this rank.
        kind: the exception to raise.
        cause: this rank's own exception behind its problem.
    """
    code = kind.exit_code
    if cause is not None and not isinstance(cause, OSError):
        code = cause.exit_code if isinstance(cause, GkdError) else GkdError.exit_code
    first = first_problem(None if problem is None else (problem, code))
    if first is not None:
        error = kind(first[0])
        error.exit_code = first[1]
        raise error from cause


def run_on_all(work: Callable[[], T], kind: type[GkdError] = UserError, *, os_error: str = "") -> T:
    """Run `work` on every rank and return each rank its own result. All ranks must call it.

    Args:
        work: raises an exception if it fails. It may only use collectives before it can fail.
        kind: the exception to raise in all ranks.
        os_error: begins the message for an OSError.

    Raises:
        kind: in all ranks, with the first failing rank's message and exit code; on that rank its own exception is the
            cause. A rank whose exception is neither a GkdError nor an OSError raises that one, with its traceback.
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
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if is_of_lost_peer(text):  # a rank that has ended takes no part in the agreement
            raise
        problem, cause = f"rank {dist.get_rank()} failed: {text}", error
    try:
        raise_together(problem, kind, cause=cause)
    except GkdError:
        if cause is None or isinstance(cause, GkdError | OSError):
            raise
    if cause is not None:  # not in the handler, so that it keeps what it was raised from
        raise cause
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
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def create(cls) -> FailureMeeting:
        """Return a meeting of all ranks of the world. All ranks must call it, while nothing is wrong yet."""
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, src=0)
        return cls(name[0])

    def join(self, failure: str, seconds: float) -> list[str] | None:
        """Post this rank's failure and wait for the others'.

        Args:
            failure: its text.
            seconds: how long the other ranks have to fail for the same reason.

        Returns:
            The failures of all ranks in rank order, or None if not every rank failed within `seconds`. All ranks that
            join get the same: one that fails later than that finds that others have left.
        """
        if dist.get_world_size() == 1:
            return [failure]
        keys = [f"failed/{self.name}/{rank}" for rank in range(dist.get_world_size())]
        store = _store()
        try:
            store.set(keys[dist.get_rank()], failure)
            have_all_failed = self._wait(store, seconds)
            outcome = store.compare_set(f"outcome/{self.name}", "", _ALL if have_all_failed else _SOME)
            return [store.get(key).decode() for key in keys] if outcome.decode() == _ALL else None
        except RuntimeError:  # the store's rank is gone
            return None

    def _wait(self, store: dist.Store, seconds: float) -> bool:
        """Count this rank as one that has failed, and return whether all have within `seconds`."""
        deadline, pause, mine = time.monotonic() + seconds, 0.01, 1
        while store.add(f"failed/{self.name}", mine) < dist.get_world_size():
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause, mine = min(0.25, 1.5 * pause), 0
        return True


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
