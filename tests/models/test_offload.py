from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_gkd.models.offload import OffloadedWeights


@pytest.fixture(scope="module", autouse=True)
def portable():
    import megatron_gkd.runtime.preload  # noqa: F401


def module() -> nn.Module:
    torch.manual_seed(0)
    tied = nn.Linear(3, 5)
    model = nn.Sequential(nn.Linear(5, 3), tied, nn.LayerNorm(5, dtype=torch.bfloat16))
    model.register_parameter("again", tied.weight)
    return model


def device_bytes(model: nn.Module) -> int:
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def test_weights_take_memory_only_while_resident_and_come_back_unchanged():
    model = module()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    offloaded = OffloadedWeights(model.parameters())
    hosts = [buffer.host.data_ptr() for buffer in offloaded._buffers]
    assert device_bytes(model) == 0
    for _ in range(3):
        with offloaded.resident():
            assert device_bytes(model) == offloaded.num_bytes == sum(t.nbytes for t in before.values())
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name]), name
            assert model[0](torch.ones(2, 5)).isfinite().all()
        assert device_bytes(model) == 0
    assert hosts == [buffer.host.data_ptr() for buffer in offloaded._buffers]


def test_weights_that_come_back_wrong_are_noticed():
    offloaded = OffloadedWeights(module().parameters())
    offloaded._buffers[0].host[3] += 1
    with pytest.raises(RuntimeError, match="came back wrong"):
        with offloaded.resident():
            pass


def test_memory_is_freed_after_an_error():
    model = module()
    offloaded = OffloadedWeights(model.parameters())
    with pytest.raises(KeyError), offloaded.resident():
        raise KeyError
    assert device_bytes(model) == 0
