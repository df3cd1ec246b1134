"""Questions to servers that do what the tests say."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.runtime.servers import ServerDown
from megatron_gkd.teachers.server.requests import RequestDispatcher
from megatron_gkd.teachers.server.response import ScoreRequest, Scores


class Scripted:
    """Answers with the first token of the question, except where `failures` has an error for the next one."""

    def __init__(self, *failures: Exception, seconds: float = 0.0):
        self.failures, self.seconds = list(failures), seconds
        self.received: list[int] = []
        self.in_flight, self.most_in_flight = 0, 0
        self.down_since: float | None = None
        self.lock = threading.Lock()

    def score(self, question: ScoreRequest) -> Scores:
        with self.lock:
            self.received.append(int(question.token_ids[0]))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            failure = self.failures.pop(0) if self.failures else None
        time.sleep(self.seconds)
        with self.lock:
            self.in_flight -= 1
        if isinstance(failure, ServerDown):
            self.down_since = time.monotonic()
        if failure is not None:
            raise failure
        self.down_since = None
        return Scores(question.token_ids[:1, None], np.zeros((1, 1)))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("megatron_gkd.runtime.servers._FIRST_PAUSE", 1e-3)


@pytest.fixture
def requests_to():
    made = []

    def make(*servers, concurrency=1, max_downtime=5.0, first=0):
        made.append(RequestDispatcher(servers, concurrency=concurrency, max_downtime=max_downtime, first=first))
        return made[-1]

    yield make
    for dispatcher in made:
        dispatcher.close()


def requests(*firsts: int) -> list[ScoreRequest]:
    return [ScoreRequest(np.array([first, 0]), np.array([0])) for first in firsts]


def collect_ids(dispatcher: RequestDispatcher, received: list[ScoreRequest]) -> list[int]:
    found = dispatcher.collect(received)
    return [int(found[question.key].ids[0, 0]) for question in received]


def test_servers_get_requests_in_turn(requests_to):
    servers = [Scripted() for _ in range(3)]
    assert collect_ids(requests_to(*servers, first=1), requests(*range(7))) == list(range(7))
    assert [server.received for server in servers] == [[2, 5], [0, 3, 6], [1, 4]]


def test_concurrency_is_limited(requests_to):
    server = Scripted(seconds=0.05)
    collect_ids(requests_to(server, concurrency=3), requests(*range(9)))
    assert server.most_in_flight == 3


def test_another_server_gets_the_requests_of_one_that_failed(requests_to):
    dying, well = Scripted(ServerDown("gone")), Scripted()
    assert collect_ids(requests_to(dying, well), requests(*range(6))) == list(range(6))
    assert dying.received == [0] and well.received == [0, 1, 2, 3, 4, 5]


def test_a_temporary_failure_is_retried(requests_to):
    server = Scripted(*[ServerDown("slow")] * 3)
    assert collect_ids(requests_to(server), requests(4)) == [4]
    assert server.received == [4] * 4


def test_a_permanent_failure_is_an_error_that_names_the_limit(requests_to):
    server = Scripted(*[ServerDown("http://host:1: refused")] * 10_000)
    message = (
        r"http://host:1: refused; all attempts failed for 0.05 s \(teacher.teacher_server_max_downtime_s\).* "
        "start it again"
    )
    with pytest.raises(ServiceError, match=message):
        requests_to(server, max_downtime=0.05).collect(requests(*range(50)))


def test_a_refused_request_is_an_error_and_no_more_are_sent(requests_to):
    server = Scripted(UserError("400: no"), seconds=0.05)
    dispatcher = requests_to(server)
    with pytest.raises(UserError, match="400: no"):
        dispatcher.collect(requests(*range(50)))
    received = len(server.received)
    time.sleep(0.2)
    assert len(server.received) <= received + 1 < 5
    with pytest.raises(ServiceError, match="no longer used"):
        dispatcher.collect(requests(1))


def test_pending_and_equal_requests_are_sent_once(requests_to):
    server = Scripted()
    dispatcher = requests_to(server)
    dispatcher.begin(requests(1, 2, 1))
    assert collect_ids(dispatcher, requests(2, 1, 3, 3)) == [2, 1, 3, 3]
    assert sorted(server.received) == [1, 2, 3] and dispatcher.pending() == {}
    assert collect_ids(dispatcher, requests(2)) == [2]  # it is not remembered
    assert sorted(server.received) == [1, 2, 2, 3]


def test_a_request_that_failed_before_it_was_needed_is_sent_again(requests_to):
    server = Scripted(UserError("a bad moment"))
    dispatcher = requests_to(server)
    dispatcher.begin(requests(1))
    while server.in_flight or not server.received:
        time.sleep(0.01)
    time.sleep(0.05)
    assert collect_ids(dispatcher, requests(1)) == [1]


def test_pending_requests_are_forgotten_oldest_first(requests_to):
    dispatcher = requests_to(Scripted())
    received = requests(1, 2, 3)
    dispatcher.begin(received)
    dispatcher.forget_all_but(2)
    assert list(dispatcher.pending()) == [received[1].key, received[2].key]
