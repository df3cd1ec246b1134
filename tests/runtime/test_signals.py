"""Signals end a process at once before training, and at the end of a step in training."""

import os
import signal
import threading
import time

import pytest
from world import process_queue, start_process

from megatron_gkd.runtime.signals import SAME_KEYSTROKE_S, StopSignals, leave_process


class Events:
    """What `leave` was called with. It must not end pytest."""

    def __init__(self):
        self.calls, self._changed = [], threading.Condition()

    def __call__(self, name, is_second):
        with self._changed:
            self.calls.append((name, is_second))
            self._changed.notify()

    def wait_for(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= count, timeout=30)


def send(signals, number):
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 30
    while signals.received is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture
def events():
    return Events()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_ends_a_process_before_training(number, events):
    with StopSignals(events):
        os.kill(os.getpid(), number)
        events.wait_for(1)
    assert events.calls == [(number.name, False)]


def test_the_first_signal_is_noted_in_training(events):
    with StopSignals(events) as signals:
        signals.defer()
        assert signals.received is None
        send(signals, signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == "SIGUSR1" and events.calls == []


def test_one_keystroke_is_one_signal_and_a_second_one_ends_the_process(events):
    with StopSignals(events) as signals:
        signals.defer()
        send(signals, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, by the launcher
        time.sleep(SAME_KEYSTROKE_S + 0.2)
        assert events.calls == []
        os.kill(os.getpid(), signal.SIGINT)
        events.wait_for(1)
    assert events.calls == [("SIGINT", True)]


def test_handlers_are_restored_and_ignored_signals_stay_ignored(events):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(events):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
    assert {number: signal.getsignal(number) for number in handlers} == handlers and events.calls == []


def _block_in_c(ready):
    lock = threading.Lock()
    lock.acquire()
    with StopSignals(lambda name, is_second: leave_process(75)):
        ready.put(os.getpid())
        # Blocked in C with all Python handlers waiting, as in a collective.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        lock.acquire()


def test_signals_are_received_while_the_main_thread_is_blocked():
    ready = process_queue()
    process = start_process(_block_in_c, ready)
    os.kill(ready.get(timeout=60), signal.SIGTERM)
    process.join(timeout=30)
    assert process.exitcode == 75
