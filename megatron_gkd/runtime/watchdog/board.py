"""The reports of all ranks in a store, and the end that one of them announces."""

from __future__ import annotations

import datetime
import os

import torch.distributed as dist

from megatron_gkd.runtime.watchdog.report import End, Report

_CONNECT_WITHIN = datetime.timedelta(seconds=60)
_NO_LIMIT = datetime.timedelta(days=1)  # `Watchdog` has its own


class Board:
    """The part of the watchdogs that they share. A call may block for as long as the store's process is stopped.

    Args:
        store: of the ranks, over a connection that nothing else uses.
        world_size: number of ranks.
    """

    def __init__(self, store: dist.Store, world_size: int) -> None:
        self._store, self.world_size = store, world_size
        self._keys = [f"report/{rank}" for rank in range(world_size)]

    @classmethod
    def connect(cls, world_size: int) -> Board:
        """Connect to the store by which the launcher's ranks have met: each thread needs a connection of its own."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=_CONNECT_WITHIN, wait_for_workers=False)
        # A call that gave up because the store's process is stopped for a while would pass for a lost connection.
        store.set_timeout(_NO_LIMIT)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"watchdog/{attempt}", store), world_size)

    def publish(self, report: Report) -> None:
        """Replace the report of a rank."""
        self._store.set(self._keys[report.rank], report.encode())

    def read(self, rank: int) -> Report | None:
        """Return the newest report of a rank; None before its first."""
        key = self._keys[rank]
        return Report.decode(self._store.get(key)) if self._store.check([key]) else None

    def read_all(self) -> list[Report] | None:
        """Return the newest reports of all ranks; None before the first of any."""
        if not self._store.check(self._keys):
            return None
        return [Report.decode(text) for text in self._store.multi_get(self._keys)]

    def take_ticket(self) -> int:
        """Return the number of this call, from 1, over all ranks."""
        return int(self._store.add("tickets", 1))

    def announce(self, end: End) -> End:
        """Announce the end of the run, unless another rank has; return the first one."""
        return End.decode(self._store.compare_set("end", "", end.encode()))

    def find_end(self) -> End | None:
        """Return the end that a rank has announced; None before."""
        return End.decode(self._store.get("end")) if self._store.check(["end"]) else None

    def count(self, name: str, *, mine: int) -> int:
        """Add `mine` to a counter that all ranks share, and return it."""
        return int(self._store.add(name, mine))
