import pytest

from megatron_gkd.errors import UserError
from megatron_gkd.launch import launcher
from megatron_gkd.launch.options import LaunchOptions


@pytest.mark.parametrize(("gpus", "nproc", "processes"), [(0, 3, 3), (4, 3, 3), (4, "gpu", 4)])
def test_the_number_of_processes(monkeypatch, gpus, nproc, processes):
    monkeypatch.setattr(launcher.portability, "num_gpus", lambda: gpus)
    assert launcher.processes(LaunchOptions(nproc)) == processes


@pytest.mark.parametrize(
    ("gpus", "nproc", "line"),
    [
        (0, "gpu", "--nproc = gpu: no GPU is visible; give a number"),
        (2, 3, "--nproc = 3: 2 GPUs are visible; must be at most that"),
    ],
)
def test_gpus_that_are_missing(monkeypatch, gpus, nproc, line):
    monkeypatch.setattr(launcher.portability, "num_gpus", lambda: gpus)
    with pytest.raises(UserError) as error:
        launcher.processes(LaunchOptions(nproc))
    assert str(error.value) == line
