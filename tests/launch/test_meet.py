import socket
import threading

import pytest
from ports import free_port

from megatron_gkd.errors import UserError
from megatron_gkd.launch import meet


@pytest.fixture
def listener():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        yield found


def test_the_node_that_the_host_names_holds_the_rendezvous():
    assert meet.is_host("127.0.0.1", free_port(), None)
    assert not meet.is_host("192.0.2.1", 29400, None), "an address of no machine"


def test_the_second_launcher_on_a_machine_does_not(listener):
    assert not meet.is_host("127.0.0.1", listener.getsockname()[1], None)


def test_a_given_node_rank_decides(listener):
    assert meet.is_host("127.0.0.1", free_port(), 0)
    assert not meet.is_host("127.0.0.1", free_port(), 1)
    port = listener.getsockname()[1]
    with pytest.raises(UserError, match=f"--rdzv = 127.0.0.1:{port}: this node cannot listen there: Address already"):
        meet.is_host("127.0.0.1", port, 0)


def test_an_unknown_host_is_one_line():
    with pytest.raises(UserError, match=r"^--rdzv = host\.invalid:29400: the host is not known: .+$"):
        meet.is_host("host.invalid", 29400, 0, named_within=0)


def test_waiting_for_a_host_that_comes_later_and_for_one_that_does_not():
    port = free_port()
    with pytest.raises(UserError, match=f"^--rdzv = 127.0.0.1:{port}: cannot be reached for 0.1 s: Connection refused"):
        meet.wait_for_host("127.0.0.1", port, 0.1)
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        late.bind(("127.0.0.1", port))
        timer = threading.Timer(0.3, late.listen)
        timer.start()
        meet.wait_for_host("127.0.0.1", port, 30)
        timer.join()
