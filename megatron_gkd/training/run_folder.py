"""The output folder of a run: locked by one run at a time, with the reason of the last exit in `exit.json`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from megatron_gkd.errors import GkdError, Interrupted, UserError
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.runtime.disk import replace_text
from megatron_gkd.runtime.nodes import Nodes
from megatron_gkd.runtime.run_lock import RunLock
from megatron_gkd.runtime.shared_folders import require_shared
from megatron_gkd.runtime.signals import leave_process

EXIT_FILE = "exit.json"
LOCK_FILE = "run.lock"
ENDED_BY_SECOND_SIGINT = 130  # as shells have it


class RunFolder:
    """The folder of one run. A context manager, which all ranks must enter together, in a world of processes.

    Only rank 0 writes. `exit.json` has the exit code (torchrun hides it), the reason as text, and the newest step; it
    is deleted when the next run starts.

    Args:
        path: recipe key `output.output_dir`.
        is_main: whether this is rank 0.

    Attributes:
        step: returns the newest step of the run.
    """

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path, self._is_main = path, is_main
        self._lock = RunLock(path / LOCK_FILE)
        self._is_mine = False
        self.step: Callable[[], int] = lambda: 0

    def __enter__(self) -> RunFolder:
        run_on_main(self._acquire)
        try:
            require_shared("output.output_dir", self.path, Nodes.from_world())
        except GkdError as error:
            self._release(error.exit_code, str(error))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._release(0, "finished")
        else:
            code = error.exit_code if isinstance(error, GkdError) else 1
            self._release(code, str(error) if isinstance(error, GkdError) else f"{type(error).__name__}: {error}")

    def leave(self, signal_name: str, is_second: bool) -> None:
        """End this process at once, by a signal before the first step or by a second SIGINT. Callable by any thread."""
        if is_second:
            code, reason = ENDED_BY_SECOND_SIGINT, "second SIGINT: ended at once"
        else:
            code, reason = Interrupted.exit_code, f"{signal_name} before the first step: nothing has changed"
        self._release(code, reason)
        if self._is_main:
            print(reason, file=sys.stderr)
        leave_process(code)

    def record_end(self, code: int, reason: str) -> None:
        """Write the exit record for ranks that can't, and release the lock where this rank holds it."""
        if self._is_main:
            self._release(code, reason)
        elif self.path.is_dir():
            self._write(code, reason)

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output.output_dir = {self.path}: can't be made ({error})") from error
        self._lock.acquire()
        self._is_mine = True
        (self.path / EXIT_FILE).unlink(missing_ok=True)

    def _release(self, code: int, reason: str) -> None:
        if not self._is_mine:
            return
        self._write(code, reason)
        self._lock.release()
        self._is_mine = False

    def _write(self, code: int, reason: str) -> None:
        ended = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        record = {"code": code, "reason": reason, "step": self.step(), "ended": ended}
        try:
            replace_text(self.path / EXIT_FILE, json.dumps(record, indent=1) + "\n")
        except OSError as error:  # for example of a full disk: the exit code has the reason too
            print(f"{self.path / EXIT_FILE}: can't be written ({error})", file=sys.stderr)
