"""Many questions to several servers at the same time, some of them before their answers are needed."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from queue import SimpleQueue

from megatron_gkd.errors import ServiceError
from megatron_gkd.runtime.servers import ServerDown
from megatron_gkd.teachers.server.client import Patience, TeacherServer
from megatron_gkd.teachers.server.response import Question, Scores

_AVOIDED = 10.0  # seconds for which a server that failed is left alone where others answer


class ScoreRequests:
    """Deals questions to `servers` in turn, from the one numbered `first` on. Answers are read in its threads, too,
    which no process waits for at its end (an executor's it does, however long a server hangs).

    Args:
        concurrency: requests in flight, over all servers.
        patience: seconds for which a question is asked again, here and there, after it failed first.
    """

    def __init__(self, servers: Sequence[TeacherServer], *, concurrency: int, patience: float, first: int = 0):
        self.servers, self.concurrency, self.patience = servers, concurrency, patience
        self._turns = itertools.count(first)
        self._waiting: SimpleQueue[tuple[Future[Scores], Question]] = SimpleQueue()
        self._threads = 0
        self._asked: dict[bytes, tuple[Question, Future[Scores]]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def begin(self, questions: Iterable[Question]) -> None:
        """Ask them, except for those that are asked already. Returns at once; any thread may call it."""
        with self._lock:
            for question in questions:
                _, future = self._asked.get(question.key, (question, None))
                # What failed before anybody needed it may work by now.
                if future is None or (future.done() and future.exception()):
                    self._asked[question.key] = question, self._submit(question)

    def begun(self) -> dict[bytes, Question]:
        """By their keys, all questions whose answers nobody has collected yet."""
        with self._lock:
            return {key: question for key, (question, _) in self._asked.items()}

    def collect(self, questions: Collection[Question]) -> dict[bytes, Scores]:
        """The answers by the questions' keys; asks what was not begun, waits, and forgets them here.

        Raises:
            UserError: of the first question that failed for good. Nothing can be asked afterwards.
        """
        self.begin(questions)
        with self._lock:
            futures = {key: self._asked.pop(key)[1] for key in {question.key for question in questions}}
        done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        failure = next((error for error in (future.exception() for future in done) if error is not None), None)
        if failure is not None:
            self.close()
            raise failure
        return {key: future.result() for key, future in futures.items()}

    def forget_all_but(self, newest: int) -> None:
        """Of what was begun and not collected. Rows that were dropped are never collected."""
        with self._lock:
            for key in list(self._asked)[: max(0, len(self._asked) - newest)]:
                self._asked.pop(key)[1].cancel()

    def close(self) -> None:
        """Ask nothing more; what is in flight ends with its attempt."""
        self._closed = True

    def _submit(self, question: Question) -> Future[Scores]:
        future: Future[Scores] = Future()
        if self._closed:
            future.set_exception(ServiceError("the teacher's servers have been given up"))
            return future
        self._waiting.put((future, question))
        if self._threads < self.concurrency:
            self._threads += 1
            threading.Thread(target=self._work, daemon=True, name="teacher-server").start()
        return future

    def _work(self) -> None:
        while not self._closed:
            future, question = self._waiting.get()
            if not self._closed and future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._ask(question))
                except BaseException as error:
                    future.set_exception(error)

    def _ask(self, question: Question) -> Scores:
        patience = Patience(self.patience)
        for attempt in itertools.count(next(self._turns)):
            server = self._server(attempt)
            try:
                return server.score(question)
            except ServerDown as error:
                if self._closed:
                    raise ServiceError(str(error)) from error
                patience.wait(error)
        raise AssertionError

    def _server(self, turn: int) -> TeacherServer:
        """The one whose turn it is, or the next that has not failed just now."""
        count = len(self.servers)
        in_order = [self.servers[(turn + i) % count] for i in range(count)]
        recently = time.monotonic() - _AVOIDED
        return next((one for one in in_order if one.down_since is None or one.down_since < recently), in_order[0])
