"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import vllm_server
from checkpoints import tiny_checkpoint
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


@pytest.fixture(scope="session")
def vllm_process(tmp_path_factory) -> Iterator[vllm_server.VllmServer]:
    """The session's one vLLM server, of a model with weights of its own that no test trains; not started yet."""
    if not vllm_server.is_installed():
        pytest.skip(vllm_server.WHY_ABSENT)
    model = tiny_checkpoint("qwen3", seed=6, head_dim=32)
    server = vllm_server.VllmServer(model, tmp_path_factory.mktemp("vllm") / "server.log")
    yield server
    server.kill()


@pytest.fixture
def student_server(vllm_process) -> vllm_server.VllmServer:
    """It runs."""
    vllm_process.ensure_running()
    return vllm_process
