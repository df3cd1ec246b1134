"""Lock a folder against a second run, on this host or another, with a file in it.

On the same host a lock is stale if its process is gone. A process of another host cannot be looked up: its lock is
stale if the file's time does not change while it is watched, as its owner renews it every few seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from megatron_gkd.errors import UserError

RENEW_EVERY_S = 10.0
WATCH_S = 35.0
_SAME_START_S = 1.0  # two readings of a process's start differ by less


class RunLock:
    """The lock of the folder that contains `path`, held by one process of a run.

    Args:
        path: the lock file.
        key: the recipe key that names the folder, for messages.
    """

    def __init__(self, path: Path, key: str = "output.output_dir") -> None:
        self.path, self.key = path, key
        self._token = secrets.token_hex(8)
        self._is_released = threading.Event()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: a run that is alive holds it, or the file can't be written.
        """
        try:
            with _alone_in(self.path.parent):
                while not self._create():
                    self._delete_if_stale()
        except OSError as error:
            raise UserError(f"{self.key} = {self.path.parent}: can't be written to ({error})") from error
        threading.Thread(target=self._renew, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Release the lock. Idempotent."""
        self._is_released.set()
        if self._read().get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        me = psutil.Process()
        owner = {"host": socket.gethostname(), "boot": _boot_id(), "pid": me.pid, "started": me.create_time()}
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(owner | {"token": self._token}, file)
            file.flush()
            os.fsync(file.fileno())
        return True

    def _delete_if_stale(self) -> None:
        owner = self._read()
        is_here = owner.get("host") == socket.gethostname()
        if is_here and owner.get("boot") == _boot_id():
            is_alive = _is_alive(owner)
        else:
            is_alive = not is_here and self._is_renewed()
        if is_alive:
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.get("started", 0)))
            raise UserError(
                f"{self.key} = {self.path.parent}: a run is under way there (process {owner.get('pid', 'unknown')} on "
                f"{owner.get('host', 'an unknown host')}, since {began}); wait for its end, or name another folder"
            )
        self.path.unlink(missing_ok=True)

    def _is_renewed(self) -> bool:
        """Watch the file: return whether its owner renews it, or it is gone and so may be created."""
        before = self._modified()
        deadline = time.monotonic() + WATCH_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, WATCH_S / 10))
            if self._modified() != before:
                return self._modified() is not None
        return False

    def _modified(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _read(self) -> dict[str, Any]:
        """Return the owner; an empty dictionary if the file is gone or incomplete."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _renew(self) -> None:
        while not self._is_released.wait(RENEW_EVERY_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock the folder against other runs that start: two that find one stale lock would delete each other's new lock.

    On network file systems that cannot lock folders it does nothing.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_alive(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(owner["pid"]))
        is_same = abs(process.create_time() - float(owner["started"])) < _SAME_START_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
