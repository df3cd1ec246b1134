"""Messages of other libraries are hidden unless the user asks for them."""

import logging
import sys
import warnings

import pytest

from megatron_gkd.runtime.quiet import hidden_stderr, hide_import_warnings, hide_log_warnings

MESSAGE = "Apex is not installed"


@pytest.fixture
def logger():
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield logger
    logger.setLevel(level)


@pytest.mark.parametrize("shows", [False, True])
def test_messages_are_shown_on_request(shows, logger, monkeypatch, capsys):
    monkeypatch.setenv("MEGATRON_GKD_SHOW_WARNINGS", "1" if shows else "0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hide_import_warnings()
        warnings.warn(MESSAGE, stacklevel=1)
    hide_log_warnings()
    with hidden_stderr():
        print("progress", file=sys.stderr)
    assert len(caught) == shows
    assert logger.isEnabledFor(logging.WARNING) == shows
    assert ("progress" in capsys.readouterr().err) == shows
    assert logger.isEnabledFor(logging.ERROR)


def test_exceptions_pass():
    with pytest.raises(ValueError, match="broken"), hidden_stderr():
        raise ValueError("broken")
