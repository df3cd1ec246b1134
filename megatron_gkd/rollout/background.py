"""Work in threads of its own, which never keeps the process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Begin `work`. Unlike an executor's, its thread is not waited for at exit, however long it hangs."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="rollout").start()
    return future


def each(work: Callable[[S], T], items: Iterable[S], limit: int | None = None) -> list[T]:
    """`work` of every item, in order, `limit` of them at a time. The first error ends it, once what runs is done."""
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


def together(futures: Sequence[Future], timeout: float) -> None:
    """Wait for parts that need each other: raises the error of the first that fails, whatever the others wait for.

    TimeoutError after `timeout` seconds.
    """
    done, pending = wait(futures, timeout, FIRST_EXCEPTION)
    for future in done:
        future.result()
    if pending:
        raise TimeoutError(f"no end after {timeout:g} s")
