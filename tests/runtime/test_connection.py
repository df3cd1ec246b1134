"""Processes that cannot meet say so in one line, in bounded time."""

from __future__ import annotations

import datetime
import socket
import subprocess
import sys
import time

import pytest
from launching import environment
from ports import free_port

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import connection, hosts
from megatron_gkd.runtime.connection import connect

MINUTES = datetime.timedelta(minutes=30)
OF_LAUNCHERS = ("TORCHELASTIC_USE_AGENT_STORE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(params=["free", "taken"])
def port(request):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if request.param == "taken":
            other.listen()
            yield other.getsockname()[1]
            return
    yield free_port()


@pytest.mark.parametrize(
    ("port", "rank", "variables", "end"),
    [
        ("free", 1, {"MASTER_ADDR": "host.invalid"}, ": the host is not known: "),
        ("free", 0, {"MASTER_ADDR": "host.invalid"}, ": the host is not known: "),
        ("free", 1, {"MASTER_ADDR": "127.0.0.1"}, ": cannot be reached for 1 s: Connection refused"),
        ("free", 0, {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, ": cannot be reached for 1 "),
        ("free", 0, {"MASTER_ADDR": "127.0.0.1"}, "can't meet the other processes there: Timed out"),
        ("taken", 0, {"MASTER_ADDR": "127.0.0.1"}, "can't meet the other processes there: The server socket has fail"),
        ("taken", 1, {"MASTER_ADDR": "127.0.0.1"}, "can't meet the other processes there: no response within 1 s"),
        ("free", 0, {}, "MASTER_ADDR: not set; "),
    ],
    indirect=["port"],
)
def test_processes_that_cannot_meet_end_with_one_line(port, rank, variables, end, monkeypatch, capfd):
    for name in OF_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2, **variables}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(hosts, "NAMED_WITHIN_S", 0.0)
    monkeypatch.setattr(hosts, "REACHED_WITHIN_S", 1.0)
    monkeypatch.setattr(connection, "_LONGER_S", 2.0)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        connect(backend="gloo", timeout=MINUTES)
    assert time.monotonic() - start < 30
    assert end in str(error.value) and "\n" not in str(error.value)
    address = variables.get("MASTER_ADDR")
    assert address is None or str(error.value).startswith(f"MASTER_ADDR = {address} and MASTER_PORT = {port}: ")
    assert capfd.readouterr().err == ""


CONNECT = """
import datetime
import torch
import torch.distributed as dist
from megatron_gkd.runtime.connection import connect

connect(backend="gloo", timeout=datetime.timedelta(minutes=30))
found = torch.ones(1)
dist.all_reduce(found)
print(found.item())
"""


def test_processes_meet_without_a_launcher():
    port, ranks = free_port(), []
    for rank in (1, 0):
        variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        outside = environment() | {name: str(value) for name, value in variables.items()}
        ranks.append(subprocess.Popen([sys.executable, "-c", CONNECT], env=outside, stdout=subprocess.PIPE, text=True))
    assert [rank.communicate(timeout=90)[0] for rank in ranks] == ["2.0\n", "2.0\n"]
