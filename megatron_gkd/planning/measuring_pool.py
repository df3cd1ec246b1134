"""Measure many recipes in a few processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType

from megatron_gkd.config.schema import Recipe
from megatron_gkd.errors import GkdError
from megatron_gkd.planning.costs import MeasureOptions, RankCosts

PROCESSES = 2


class MeasuringPool:
    """Processes of their own, since measuring patches libraries for its process. A context manager.

    Args:
        options: of the measurements.
        processes: how many at most.
    """

    def __init__(self, options: MeasureOptions, processes: int = PROCESSES) -> None:
        self.options = options
        count = max(1, min(processes, os.cpu_count() or 1))
        self._executor = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_print_to_stderr)

    def __enter__(self) -> MeasuringPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def measure(self, recipes: Sequence[Recipe], world_size: int) -> Iterator[list[RankCosts] | None]:
        """Yield the costs of each recipe, in order; None where it can't be measured."""
        futures = [self._executor.submit(_measure, recipe, world_size, self.options) for recipe in recipes]
        for future in futures:
            yield future.result()


def _print_to_stderr() -> None:
    os.dup2(2, 1)  # stdout is the plan's alone


def _measure(recipe: Recipe, world_size: int, options: MeasureOptions) -> list[RankCosts] | None:
    from megatron_gkd.planning.measurement import measure

    try:
        return list(measure(recipe, world_size, options))
    except GkdError:
        return None
    except (RuntimeError, NotImplementedError) as error:  # one layout must not end the search
        print(f"a layout can't be measured: {type(error).__name__}: {error}", file=sys.stderr)
        return None
