"""Measures recipes in a process of its own, as measuring takes its process's device away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from megatron_gkd.planning.costs import RankCosts
from megatron_gkd.planning.measurement import measure


@pytest.fixture(scope="session")
def measured() -> Iterator[Callable[..., list[RankCosts]]]:
    """Return `measure`, which runs in one process for all tests."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda *args: pool.submit(measure, *args).result()
