"""Signals that are read once are released as they are read."""

from __future__ import annotations

import weakref

import pytest


class Signal:
    pass


def test_each_signal_is_released_as_it_is_read():
    import megatron_gkd.runtime.preload  # noqa: F401
    from megatron_gkd.teachers.base import ReadOnce

    signals = [Signal(), None, Signal()]
    first, last = weakref.ref(signals[0]), weakref.ref(signals[2])
    once = ReadOnce(signals)
    del signals
    assert len(once) == 3
    once[2]
    assert last() is None and first() is not None
    assert once[1] is None
    once[0]
    assert first() is None
    with pytest.raises(ValueError, match="signal 2 has been read and released already"):
        once[2]
