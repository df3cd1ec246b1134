"""Weights to several servers at once, through real gloo groups, to fake servers that fail on demand."""

from __future__ import annotations

import httpx
import pytest
import torch
from fake_vllm import FakeVllm, transport

from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.rollout.vllm import weight_transfer
from megatron_gkd.rollout.vllm.client import StudentServer
from megatron_gkd.rollout.vllm.handshake import ServerRequirements
from megatron_gkd.rollout.vllm.weight_transfer import HealthMonitor, WeightTransfer, pack_buffers, wait_for_main_rank

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2), "lm_head.weight": (3, 5)}


def weights_of(value: float, names=("a", "b", "c")):
    return {name: torch.full(SHAPES[name], value) for name in names}


def same(found, expected):
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


@pytest.fixture(autouse=True)
def small_buffers_and_pauses(monkeypatch):
    """Every tensor comes in a buffer of its own."""
    monkeypatch.setattr(weight_transfer, "_BUFFER_BYTES", 1)
    monkeypatch.setattr(pack_buffers, "__defaults__", (1,))
    monkeypatch.setattr("megatron_gkd.runtime.servers._FIRST_PAUSE", 1e-3)


@pytest.fixture
def fakes():
    return {"127.0.0.1": FakeVllm(world_size=2), "localhost": FakeVllm()}


@pytest.fixture
def http(fakes):
    return httpx.Client(transport=transport(fakes))


@pytest.fixture
def transfer():
    transfer = WeightTransfer("gloo", SHAPES, ("lm_head.weight",), timeout=10)
    yield transfer
    transfer.close()


@pytest.fixture
def servers(fakes, http, transfer):
    return [StudentServer(f"http://{host}:8000", http, 2.0, transfer.send_to) for host in fakes]


def times(fake, path):
    return fake.calls.count(path)


def test_buffers_hold_tensors_of_one_dtype_up_to_their_size():
    named = {
        "a": torch.randn(4),
        "b": torch.randn(2, 3),
        "c": torch.randn(3).bfloat16(),
        "d": torch.randn(40).bfloat16(),
    }
    found = list(pack_buffers(named.items(), max_bytes=40))
    assert [buffer.names for buffer in found] == [["a", "b"], ["c"], ["d"]]
    assert found[0].update_info() == {"names": ["a", "b"], "dtype_names": ["float32"] * 2, "shapes": [[4], [2, 3]]}
    for buffer in found:
        expected = torch.cat([named[name].reshape(-1) for name in buffer.names])
        assert buffer.data.view(buffer.dtype).equal(expected)


def test_all_workers_of_all_servers_get_all_tensors(servers, fakes, transfer):
    for version in (1, 2):
        weights = transfer.load(weights_of(version).items(), version, servers)
        for server, fake in zip(servers, fakes.values(), strict=True):
            assert same(fake.weights, weights_of(version))
            assert server.label == fake.label and fake.label.startswith(weights.label + ".")
            assert times(fake, "/init_weight_transfer_engine") == 1 and times(fake, "/update_weights") == 3 * version
            assert times(fake, "/reset_prefix_cache") == version


def test_only_a_restarted_server_is_sent_the_weights_again(servers, fakes, transfer):
    transfer.load(weights_of(1).items(), 1, servers)
    first, second = fakes.values()
    second.restart()
    assert servers[1].ensure_current() == second.label
    assert same(second.weights, weights_of(1))
    assert times(first, "/update_weights") == 3 and times(first, "/init_weight_transfer_engine") == 1


def test_a_restart_between_two_versions_is_noticed(servers, fakes, transfer):
    transfer.load(weights_of(1).items(), 1, servers)
    fakes["localhost"].restart()
    transfer.load(weights_of(2).items(), 2, servers)
    assert all(same(fake.weights, weights_of(2)) for fake in fakes.values())


@pytest.mark.parametrize("path", ["/pause", "/init_weight_transfer_engine", "/update_weights", "/finish_weight_update"])
def test_a_server_that_goes_down_meanwhile_delays_only_itself(path, servers, fakes, transfer):
    """And is back a little later."""
    states = iter([True] * (path == "/update_weights") + [False] * 3)  # whether it is up; it may get the first tensor
    victim = fakes["localhost"]

    def die(requested):
        if requested in (path, "/health") and not next(states, True):
            victim.restart()
            raise httpx.ReadError("reset")

    victim.before = die
    taken = []
    named_tensors = ((name, taken.append(name) or tensor) for name, tensor in weights_of(3).items())
    transfer.load(named_tensors, 3, servers)
    assert taken == ["a", "b", "c"], "other ranks take part in making each of them, once"
    assert all(same(fake.weights, weights_of(3)) for fake in fakes.values())
    assert times(fakes["127.0.0.1"], "/update_weights") == 3
    assert all(server.ensure_current() == fake.label for server, fake in zip(servers, fakes.values(), strict=True))


def test_the_tensors_of_an_incomplete_update_are_discarded(servers, fakes, http, transfer):
    """A trainer dies between two tensors; the next one must not have its first tensor taken for its last."""
    dead = WeightTransfer("gloo", SHAPES, ("lm_head.weight",), timeout=10)

    def half():
        yield "a", torch.zeros(3, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dead.load(half(), 0, [StudentServer(server.url, http, 1.0, dead.send_to) for server in servers])
    assert {fake.label for fake in fakes.values()} == {"unfinished"}
    transfer.load(weights_of(4).items(), 4, servers)
    assert all(same(fake.weights, weights_of(4)) for fake in fakes.values())


@pytest.mark.parametrize(
    ("named_tensors", "message"),
    [
        ({"a": torch.zeros(3, 5), "b": torch.zeros(8)}, r"b is \(8,\) and should be \(7,\)"),
        (weights_of(1, "ab"), r"c is missing and should be \(2, 2\)"),
        (weights_of(1) | {"d": torch.zeros(1)}, r"d is \(1,\) and should be absent"),
    ],
)
def test_unexpected_tensors_are_never_served(named_tensors, message, servers, fakes, transfer):
    with pytest.raises(UserError, match=message):
        transfer.load(named_tensors.items(), 1, servers)
    assert not any(times(fake, "/resume") for fake in fakes.values())


def test_a_server_that_is_up_but_can_not_receive_weights_is_an_error_at_once(servers, fakes, transfer):
    def refuse(update_info):
        raise RuntimeError("KeyError: a")

    fakes["localhost"].update_weights = refuse
    with pytest.raises(
        ServiceError, match=r"http://localhost:8000: can't be sent the student's weights over gloo.*KeyError"
    ):
        transfer.load(weights_of(1).items(), 1, servers)


def test_another_backend_than_the_recipes_is_refused(servers):
    message = """gloo, not rollout.weight_sync = nccl; start it with --weight-transfer-config '{"backend": "nccl"}'"""
    with pytest.raises(UserError, match=message):
        servers[0].wait_until_ready(ServerRequirements(64, "nccl"))
    assert servers[0].wait_until_ready(ServerRequirements(64, "gloo")).name == "fake"


def test_other_ranks_wait_until_the_main_rank_has_sent_the_weights_again(servers, fakes, http, transfer):
    other = StudentServer(servers[1].url, http, 10.0, wait_for_main_rank)
    other.wanted = transfer.load(weights_of(1).items(), 1, servers)
    fakes["localhost"].restart()
    monitor = HealthMonitor(servers)
    try:
        assert other.ensure_current() == fakes["localhost"].label
    finally:
        monitor.close()
    assert same(fakes["localhost"].weights, weights_of(1)) and times(fakes["127.0.0.1"], "/update_weights") == 3


def test_other_ranks_wait_no_longer_than_the_limit(servers, http, transfer):
    other = StudentServer(servers[1].url, http, 0.05, wait_for_main_rank)
    other.wanted = transfer.load(weights_of(1).items(), 1, servers[:1])
    with pytest.raises(
        ServiceError, match=r"does not have the student's weights of version 1 again yet; all attempts failed for 0.05"
    ):
        other.ensure_current()
