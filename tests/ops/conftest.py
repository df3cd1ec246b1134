"""Every test of the loss runs on a CPU and, unless it needs a process group or is marked `cpu`, on a GPU."""

import pytest
import torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    on_cpu_only = "gloo_world" in metafunc.fixturenames or metafunc.definition.get_closest_marker("cpu")
    if not on_cpu_only:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest):
    """Set the default device of new tensors."""
    name = getattr(request, "param", "cpu")
    with torch.device(name):
        yield name
