"""The package's logger: where its records go, and the prefix of time, level and rank that they carry."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

LOGGER = logging.getLogger("megatron_gkd")
"""The logger of the package. Every module uses it; `log_to_console` and `log_to_file` configure it."""

_LOGGERS = (LOGGER, logging.getLogger("py.warnings"))  # the latter gets what `warnings.warn` emits


@contextlib.contextmanager
def log_to_console(level: str, ranks: Literal["main", "all"], rank: int) -> Iterator[None]:
    """Show the records of the package, and Python's warnings, on the console. Errors are shown whichever rank has them.

    Args:
        level: recipe key `output.log_level`: the lowest level that is recorded.
        ranks: recipe key `output.log_ranks`: which ranks show their records.
        rank: rank of this process in the world.
    """
    handler = _ConsoleHandler(logging.NOTSET if rank == 0 or ranks == "all" else logging.ERROR)
    states = [(logger, logger.level, logger.propagate) for logger in _LOGGERS]
    for logger in _LOGGERS:
        logger.setLevel(level.upper())
        logger.propagate = False  # the root logger's handlers, if a library has added any, would show records twice
    logging.captureWarnings(True)
    try:
        with _attached(handler, rank):
            yield
    finally:
        logging.captureWarnings(False)
        for logger, old_level, propagate in states:
            logger.setLevel(old_level)
            logger.propagate = propagate


@contextlib.contextmanager
def log_to_file(output_dir: Path, rank: int) -> Iterator[None]:
    """Append the records of every rank other than the main one to `output_dir/logs/rank_N.log` as well."""
    if rank == 0:
        yield
        return
    path = output_dir / "logs" / f"rank_{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        LOGGER.error("%s: can't be written (%s); the records of rank %d are in no file", path, error, rank)
        yield
        return
    with _attached(handler, rank):
        yield


@contextlib.contextmanager
def _attached(handler: logging.Handler, rank: int) -> Iterator[None]:
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s rank {rank}: %(message)s", "%Y-%m-%d %H:%M:%S"))
    for logger in _LOGGERS:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in _LOGGERS:
            logger.removeHandler(handler)
        handler.close()


class _Formatter(logging.Formatter):
    """Format a record without the line end of Python's warnings, which would add an empty line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return super().format(record).rstrip()


class _ConsoleHandler(logging.Handler):
    """Print records to the stdout of the moment: a progress bar replaces it, and shows them above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        try:
            print(self.format(record), file=sys.stdout, flush=True)
        except Exception:
            self.handleError(record)
