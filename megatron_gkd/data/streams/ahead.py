"""Processes that tokenize the rows of streams ahead of the steps."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megatron_gkd.data.shards import start_worker_process
from megatron_gkd.data.streams.raw_order import RawChunk
from megatron_gkd.data.streams.tokenized import ChunkTokenizer, TokenizedChunk
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.signals import STOP_SIGNALS

_POLL_S = 0.2  # how often the thread that reads looks whether it is to end


def tokenize_chunks(
    chunks: Iterator[RawChunk], tokenize: ChunkTokenizer, *, workers: int, ahead: int
) -> Iterator[TokenizedChunk]:
    """Yield the tokenized chunks in order. Closing the iterator ends the processes.

    Args:
        chunks: endless; a thread reads them where there are workers.
        tokenize: tokenizes one of them.
        workers: processes that tokenize; 0 tokenizes each chunk when it is needed.
        ahead: most chunks that wait to be tokenized or taken, with workers.

    Raises:
        UserError: a source can't be read, or a process was killed.
    """
    if workers == 0:
        yield from map(tokenize, chunks)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenize, os.getpid()))
    pool.submit(int).result()  # the processes are started by this thread, before there is another
    reader = _Reader(chunks, pool, ahead)
    try:
        while True:
            yield reader.futures.get().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"data.dataloader_num_workers = {workers}: a process that tokenizes was killed, probably for lack of "
            "memory; start again with fewer processes"
        ) from error
    finally:
        reader.close()
        pool.shutdown(wait=False, cancel_futures=True)


class _Reader:
    """Read chunks in a thread and hand them to the processes.

    Attributes:
        futures: the tokenized chunks in order; what ends the reading is the exception of the last one.
    """

    def __init__(self, chunks: Iterator[RawChunk], pool: ProcessPoolExecutor, ahead: int) -> None:
        self.futures: queue.Queue[Future[TokenizedChunk]] = queue.Queue(ahead)
        self._chunks, self._pool = chunks, pool
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream reader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, which may still wait for a row."""
        self._is_closed.set()
        self._thread.join(timeout=2 * _POLL_S)

    def _run(self) -> None:
        try:
            for chunk in self._chunks:
                if not self._put(self._pool.submit(_tokenize, chunk)):
                    return
        except BaseException as error:
            failed: Future[TokenizedChunk] = Future()
            failed.set_exception(error)
            self._put(failed)

    def _put(self, future: Future[TokenizedChunk]) -> bool:
        """Return whether the future was taken, which it is unless the reader is closed."""
        while not self._is_closed.is_set():
            try:
                self.futures.put(future, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False


_tokenizer: ChunkTokenizer  # of a worker process


def _start_worker(tokenizer: ChunkTokenizer, parent: int) -> None:
    global _tokenizer
    start_worker_process(parent)
    for number in STOP_SIGNALS:  # Slurm sends them to all processes of a job; the rank fails without its workers
        signal.signal(number, signal.SIG_IGN)
    _tokenizer = tokenizer


def _tokenize(chunk: RawChunk) -> TokenizedChunk:
    return _tokenizer(chunk)
