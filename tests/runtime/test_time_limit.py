import time

import pytest

from megatron_gkd.runtime import time_limit
from megatron_gkd.runtime.time_limit import TimeLimit, process_start


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time_limit.time, "time", lambda: now[0])
    return now


def test_there_is_time_for_two_more_of_the_longest_step_and_for_two_saves(clock):
    saves = [None]
    limit = TimeLimit(100.0, started=1000.0, longest_save=lambda: saves[0])
    limit.begin()
    for seconds in (10, 30, 10):
        clock[0] += seconds
        limit.step_ended()
    assert limit.longest_step == 30 and limit.is_near()  # 50 + 2 x 30
    limit.longest_step = 20.0
    assert not limit.is_near()  # 50 + 40 + 5, as no save was measured
    saves[0] = 4.0
    assert not limit.is_near()  # 50 + 40 + 8
    saves[0] = 5.0
    assert limit.is_near()


def test_a_process_without_a_launcher_counts_from_its_own_start(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    own = process_start()
    assert own < time.time()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert process_start() <= own
