"""The session's one vLLM server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import vllm_server
from checkpoints import tiny_checkpoint


@pytest.fixture(scope="session")
def vllm_process(tmp_path_factory) -> Iterator[vllm_server.VllmServer]:
    """Of a model with the contract's architecture and weights of its own; not started yet."""
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
