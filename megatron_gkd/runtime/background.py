"""Run work in daemon threads, which never keep the process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a daemon thread; unlike an executor's thread, it is not waited for at exit."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="background").start()
    return future


def parallel_map(work: Callable[[S], T], items: Iterable[S], limit: int | None = None) -> list[T]:
    """Call `work` on every item, at most `limit` at a time, and return the results in the order of the items.

    The first error is raised when the calls that run already have returned; no further call starts.
    """
    items = list(items)
    results: list[Any] = [None] * len(items)
    waiting = list(reversed(range(len(items))))

    def run() -> None:
        while waiting:
            try:
                index = waiting.pop()
            except IndexError:  # another thread was faster
                return
            try:
                results[index] = work(items[index])
            except BaseException:
                waiting.clear()
                raise

    futures = [in_background(run) for _ in range(min(len(items), limit or len(items)))]
    wait(futures)
    for future in futures:
        future.result()
    return results


def wait_all(futures: Sequence[Future], timeout: float) -> None:
    """Wait for calls that depend on each other; raise the error of the first that fails without waiting for the rest.

    Raises:
        TimeoutError: not all of them have returned within `timeout` seconds.
    """
    done, pending = wait(futures, timeout, FIRST_EXCEPTION)
    for future in done:
        future.result()
    if pending:
        raise TimeoutError(f"no end after {timeout:g} s")
