"""Dispatch of many scoring requests to several servers, some of them before their responses are needed."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from queue import SimpleQueue

from megatron_gkd.errors import ServiceError
from megatron_gkd.runtime.servers import ServerDown
from megatron_gkd.teachers.server.client import TeacherBackoff, TeacherServer
from megatron_gkd.teachers.server.response import ScoreRequest, Scores

_AVOIDED_S = 10.0  # how long a server that failed gets no requests while others respond


class RequestDispatcher:
    """Send requests to servers in turn, from daemon threads that also read the responses.

    Unlike an executor's threads, these never keep the process from ending, however long a server hangs.

    Args:
        servers: of one teacher.
        concurrency: requests in flight, over all servers.
        max_downtime: seconds for which a request is retried after its first failure.
        first: index of the server that gets the first request.
    """

    def __init__(
        self, servers: Sequence[TeacherServer], *, concurrency: int, max_downtime: float, first: int = 0
    ) -> None:
        self.servers, self.concurrency, self.max_downtime = servers, concurrency, max_downtime
        self._turns = itertools.count(first)
        self._queue: SimpleQueue[tuple[Future[Scores], ScoreRequest]] = SimpleQueue()
        self._num_threads = 0
        self._pending: dict[bytes, tuple[ScoreRequest, Future[Scores]]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def begin(self, requests: Iterable[ScoreRequest]) -> None:
        """Send requests, except for those that are pending. Returns at once; any thread may call it."""
        with self._lock:
            for request in requests:
                _, future = self._pending.get(request.key, (request, None))
                # A request that failed before its response was needed may succeed now.
                if future is None or (future.done() and future.exception()):
                    self._pending[request.key] = request, self._submit(request)

    def pending(self) -> dict[bytes, ScoreRequest]:
        """Return all requests, by key, whose responses have not been collected."""
        with self._lock:
            return {key: request for key, (request, _) in self._pending.items()}

    def collect(self, requests: Collection[ScoreRequest]) -> dict[bytes, Scores]:
        """Return the responses by the requests' keys, and forget them here. Sends requests that are not pending.

        Raises:
            GkdError: the error of the first request that failed for good. No request can be sent afterwards.
        """
        self.begin(requests)
        with self._lock:
            futures = {key: self._pending.pop(key)[1] for key in {request.key for request in requests}}
        done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        failure = next((error for error in (future.exception() for future in done) if error is not None), None)
        if failure is not None:
            self.close()
            raise failure
        return {key: future.result() for key, future in futures.items()}

    def forget_all_but(self, newest: int) -> None:
        """Forget all but the newest pending requests; those of dropped rows are never collected."""
        with self._lock:
            for key in list(self._pending)[: max(0, len(self._pending) - newest)]:
                self._pending.pop(key)[1].cancel()

    def close(self) -> None:
        """Send no more requests; those in flight end with their attempt."""
        self._closed = True

    def _submit(self, request: ScoreRequest) -> Future[Scores]:
        future: Future[Scores] = Future()
        if self._closed:
            future.set_exception(ServiceError("the teacher's servers are no longer used after an earlier failure"))
            return future
        self._queue.put((future, request))
        if self._num_threads < self.concurrency:
            self._num_threads += 1
            threading.Thread(target=self._work, daemon=True, name="teacher-server").start()
        return future

    def _work(self) -> None:
        while not self._closed:
            future, request = self._queue.get()
            if not self._closed and future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._send(request))
                except BaseException as error:
                    future.set_exception(error)

    def _send(self, request: ScoreRequest) -> Scores:
        backoff = TeacherBackoff(self.max_downtime)
        turn = next(self._turns)
        while True:
            try:
                return self._select_server(turn).score(request)
            except ServerDown as error:
                if self._closed:
                    raise ServiceError(str(error)) from error
                backoff.wait(error)
                turn += 1

    def _select_server(self, turn: int) -> TeacherServer:
        """Return the server whose turn it is, or the next that has not failed recently."""
        count = len(self.servers)
        in_order = [self.servers[(turn + i) % count] for i in range(count)]
        recently = time.monotonic() - _AVOIDED_S
        return next((one for one in in_order if one.down_since is None or one.down_since < recently), in_order[0])
