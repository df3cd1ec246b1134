"""The mark of the main thread: phases inside each other, and progress from any thread."""

import threading
import time

import pytest

from megatron_gkd.runtime import current_phase
from megatron_gkd.runtime.current_phase import (
    PhaseMark,
    begin_step,
    current_mark,
    in_phase,
    iterate_in_phase,
    note_progress,
    seconds_without_progress,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(current_phase, "_current", current_phase._Current())


def test_items_are_progress(monkeypatch):
    counted = []
    monkeypatch.setattr(current_phase, "note_progress", lambda: counted.append(None))
    assert list(current_phase.note_each("abc")) == ["a", "b", "c"] and len(counted) == 3


def test_phases_are_nested_and_counted_alike_on_all_ranks():
    begin_step(7)
    with in_phase("validation"):
        assert current_mark() == PhaseMark("validation", 7, 1)
        with in_phase("teacher", is_limited=False):
            assert current_mark() == PhaseMark("teacher", 7, 2, is_limited=False)
        assert current_mark() == PhaseMark("validation", 7, 3)
    assert current_mark() == PhaseMark("start", 7, 4)


def test_an_exception_leaves_its_phase():
    with pytest.raises(KeyError), in_phase("student"):
        raise KeyError
    assert current_mark() == PhaseMark("start", 0, 2)


def test_a_process_that_ends_does_so_in_the_phases_inside_too():
    with in_phase("rescue", is_ending=True), in_phase("checkpoint"):
        assert current_mark().is_ending
    assert not current_mark().is_ending


def test_progress_of_any_thread_counts():
    time.sleep(0.05)
    assert seconds_without_progress() >= 0.05
    thread = threading.Thread(target=note_progress)
    thread.start()
    thread.join()
    assert seconds_without_progress() < 0.05


def test_the_wait_for_an_item_is_a_phase_of_its_step():
    seen = []

    def items():
        for letter in "ab":
            seen.append((current_mark().phase, current_mark().step))
            yield letter

    for letter in iterate_in_phase("data", items(), 3):
        seen.append((letter, current_mark().phase))
    assert seen == [("data", 3), ("a", "start"), ("data", 4), ("b", "start")]
