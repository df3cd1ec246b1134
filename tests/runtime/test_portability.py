"""Megatron-Core's calls of CUDA run on the CPU, and only one module looks for a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import megatron_gkd

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is answered for it")


@pytest.fixture(scope="module", autouse=True)
def portable():
    import megatron_gkd.runtime.preload  # noqa: F401


def test_only_one_module_looks_for_a_gpu():
    root = Path(megatron_gkd.__file__).parent
    asking = re.compile(r"cuda\.is_available|\.is_cuda|device\.type|_has_cuda|device_count")
    # The loss and the planner's meter go by where their tensors are, and doctor lists all GPUs: other questions.
    others = {"runtime/meter.py", "doctor/torch_facts.py"}
    files = [path for path in root.rglob("*.py") if path.parent.name != "ops"]
    found = {str(path.relative_to(root)) for path in files if asking.search(path.read_text())}
    assert found == {"runtime/portability.py"} | others


def test_tensors_for_cuda_are_on_the_cpu():
    tensors = [
        torch.zeros(2, device="cuda"),
        torch.zeros(2, device="cuda:1"),
        torch.zeros(2, device=torch.device("cuda", 0)),
        torch.zeros(2, device=torch.cuda.current_device()),
        torch.zeros(2, device=0),
        torch.zeros(2, pin_memory=True),
        torch.empty_like(torch.zeros(2), device="cuda"),
        torch.zeros(2).new_zeros(3, device="cuda"),
        torch.zeros(2).cuda(),
        torch.zeros(2).to("cuda"),
        torch.zeros(2).pin_memory(),
    ]
    assert {str(tensor.device) for tensor in tensors} == {"cpu"}
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"


def test_no_mode_runs_in_each_operation_and_contexts_of_devices_hold():
    assert torch._C._len_torch_function_stack() == 0
    with torch.device("meta"):
        assert torch.zeros(2).is_meta and torch.zeros(2, device="cuda").device.type == "cpu"


def test_streams_and_events_are_always_done():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        event = torch.cuda.Event()
        event.record()
    torch.cuda.current_stream().wait_stream(stream)
    assert event.query() and stream.query()
    torch.cuda.synchronize()


def test_a_forked_random_state_advances_without_the_outer_one():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def three():
        with tracker.fork("inner"):
            return torch.rand(3)

    tracker = CudaRNGStatesTracker()
    tracker.add("inner", 5)
    torch.manual_seed(1)
    outside = torch.rand(6)
    torch.manual_seed(1)
    before, first, second, after = torch.rand(3), three(), three(), torch.rand(3)
    assert torch.equal(torch.cat([before, after]), outside)
    assert not torch.equal(first, second)
    tracker.reset()
    tracker.add("inner", 5)
    assert torch.equal(three(), first)
    with pytest.raises(KeyError, match="'other' is not added"), tracker.fork("other"):
        pass


def gather_and_reduce_unevenly(rank, world_size):
    import megatron_gkd.runtime.preload  # noqa: F401  isort: skip
    import torch.distributed as dist

    lengths = [3, 0, 2]
    mine = torch.full((lengths[rank], 2), float(rank))
    parts = [torch.empty(length, 2) for length in lengths]
    dist.all_gather(parts, mine)
    summed = torch.empty(lengths[rank], 2)
    dist.reduce_scatter(summed, [torch.full((length, 2), float(10**rank)) for length in lengths])
    return [part.unique().tolist() for part in parts], summed


def test_gloo_gathers_and_reduces_tensors_of_different_lengths(gloo_world):
    for rank, (parts, summed) in enumerate(gloo_world(3).run(gather_and_reduce_unevenly)):
        assert parts == [[0.0], [], [2.0]]
        assert torch.equal(summed, torch.full(([3, 0, 2][rank], 2), 111.0))
