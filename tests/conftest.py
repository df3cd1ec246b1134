"""Fixtures for all tests."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_server
from checkpoints import tiny_checkpoint
from command_line import write_workspace
from world import World

_num_gpu_tests = pytest.StashKey[int]()


def pytest_configure() -> None:
    """Reset signals that background jobs and nohup ignore: the processes of the tests would inherit it."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked gpu where there is no GPU."""
    if torch.cuda.is_available():
        return
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu_tests)
    config.stash[_num_gpu_tests] = len(gpu_tests)


def pytest_collection_finish() -> None:
    """Leave all that is imported and collected out of garbage collections: some tests make many."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist, whose terminal nobody reads
        session.config.workeroutput["num_gpu_tests"] = session.config.stash.get(_num_gpu_tests, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_num_gpu_tests] = getattr(node, "workeroutput", {}).get("num_gpu_tests", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if num_gpu_tests := config.stash.get(_num_gpu_tests, 0):
        terminalreporter.write_line(f"{num_gpu_tests} GPU tests are left out: no CUDA device")


@pytest.fixture(scope="session")
def gloo_world() -> Iterator[Callable[[int], World]]:
    """Return a function: ``gloo_world(size)`` is the session's one world of that size; see ``world.World.run``."""
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        return worlds.setdefault(size, World(size))

    yield of_size
    for world in worlds.values():
        world.close()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Return a folder with a small recipe and its data; see ``command_line``."""
    write_workspace(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def vllm_process(tmp_path_factory) -> Iterator[vllm_server.VllmServer]:
    """Return the session's one vLLM server, of a model with weights of its own that no test trains; not started yet."""
    if not vllm_server.is_installed():
        pytest.skip(vllm_server.WHY_ABSENT)
    model = tiny_checkpoint("qwen3", seed=6, head_dim=32)
    server = vllm_server.VllmServer(model, tmp_path_factory.mktemp("vllm") / "server.log")
    yield server
    server.kill()


@pytest.fixture
def student_server(vllm_process) -> vllm_server.VllmServer:
    """Return that server, which runs."""
    vllm_process.ensure_running()
    return vllm_process


@pytest.fixture(scope="session")
def vision_server(tmp_path_factory) -> Iterator[vllm_server.VllmServer]:
    """Return a vLLM server of a model that reads images, with weights that no test trains; see `vision_contract`."""
    from rollout.vision_contract import LIMITS, VISION_CHECKPOINT

    from megatron_gkd.data.vision.processor import open_processing
    from megatron_gkd.data.vision.vllm_settings import processor_options

    if not vllm_server.is_installed():
        pytest.skip(vllm_server.WHY_ABSENT)
    model = VISION_CHECKPOINT(8)
    server = vllm_server.VllmServer(model, tmp_path_factory.mktemp("vllm") / "server.log", max_model_len=128)
    server.flags.append("--enable-scale-out")
    server.arguments["--mm-processor-kwargs"] = json.dumps(processor_options(open_processing(model, LIMITS)))
    server.ensure_running()
    yield server
    server.kill()
