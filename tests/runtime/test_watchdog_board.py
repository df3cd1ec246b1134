"""What the watchdogs of all ranks share, over a real store, and what a rank does when another one has failed."""

import datetime
import time

import pytest
import torch.distributed as dist

from megatron_gkd.runtime.watchdog.board import Board
from megatron_gkd.runtime.watchdog.report import End, EndKind
from megatron_gkd.runtime.watchdog.watchdog import FAILS_BY_ITSELF_S, Limits, Watchdog


@pytest.fixture
def board(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    yield Board.connect(2)
    del store


def failure(rank):
    return End(EndKind.FAILURE, f"rank {rank} has failed", 1, hanging=(rank,))


def test_the_first_end_is_that_of_all(board):
    assert board.find_end() is None
    assert [board.announce(failure(rank)) for rank in (1, 0)] == [failure(1)] * 2 and board.find_end() == failure(1)


def test_a_store_that_pauses_is_not_given_up(board):
    """`Watchdog` takes the error of a call for the end of the store's process."""
    assert board._store.underlying_store.timeout >= datetime.timedelta(hours=12)


def test_a_rank_that_fails_meanwhile_ends_with_its_own_message(board, tmp_path):
    left = []
    watchdog = Watchdog(board, 0, Limits(60.0), tmp_path, lambda end, is_recorder: left.append(end))
    watchdog._failure = failure(0)
    begin = time.monotonic()
    watchdog._end(failure(1))
    assert left == [] and time.monotonic() - begin < FAILS_BY_ITSELF_S
    watchdog._failure = None
    watchdog._end(failure(1))
    assert left == [failure(1)]
