"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from world import World


@pytest.fixture(scope="session")
def gloo_world() -> Iterator[Callable[[int], World]]:
    """``gloo_world(size)`` is the session's one world of that size; see ``world.World.run``."""
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        return worlds.setdefault(size, World(size))

    yield of_size
    for world in worlds.values():
        world.close()
