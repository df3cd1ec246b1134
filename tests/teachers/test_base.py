"""Signals that are read once are released as they are read."""

from __future__ import annotations

import pytest


def test_each_signal_is_released_as_it_is_read():
    import megatron_gkd.runtime.preload  # noqa: F401
    from megatron_gkd.teachers.base import ReadOnce

    signals = [object(), None, object()]
    first, _, last = signals
    once = ReadOnce(signals)
    assert len(once) == 3
    assert once[2] is last and signals == [first, None, None]
    assert once[1] is None and once[0] is first and signals == [None] * 3
    with pytest.raises(ValueError, match="signal 2 has been read and released already"):
        once[2]
