"""Torch's elastic agent with ranks of our own: it forwards signals, waits while they save, and keeps their exit codes.

torchrun's agent ends all ranks 30 s after a signal or after one of them has left, and turns their exit codes into 1.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousError

from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.launch import failures, report
from megatron_gkd.launch.deadlines import ENDS_AFTER_A_KILL_S, ENDS_BY_ITSELF_S, Deadlines
from megatron_gkd.launch.memory import count_memory_kills
from megatron_gkd.launch.options import LaunchOptions
from megatron_gkd.launch.ranks import Ranks
from megatron_gkd.launch.report import INTERRUPTED, End
from megatron_gkd.launch.signals import SignalHandlers

POLL_EVERY_S = 0.05
CHECK_NODES_EVERY_S = 1.0
CAUSE_WITHIN_S = 5.0  # a node whose ranks have lost a connection waits so long for the failure on another node
LEAVES_AFTER_S = {True: 300.0, False: 60.0}  # how long nodes wait for each other after success and after a failure
_LAST_RECORD_WITHIN_S = 1.0


class RankAgent(SimpleElasticAgent):
    """Run `command` once for each rank of this node.

    Attributes:
        ends: the ends of this node's ranks, in the last attempt.
        elsewhere: why ranks on another node failed first, and their exit code.

    Args:
        spec: torch's description of the ranks.
        command: the command of each rank.
        options: how they are started.
        address: the name of this node for the others; None: its host name.
    """

    _store: Any  # of the rendezvous; torch declares None alone

    def __init__(self, spec: WorkerSpec, command: Sequence[str], options: LaunchOptions, address: str | None) -> None:
        super().__init__(spec)
        self._command, self._options, self._address = list(command), options, address
        self._signals = SignalHandlers(self._on_signal)
        self._phase = _Phase.STARTING
        self._early: list[int] = []
        self._received: list[int] = []
        self._ranks: Ranks = Ranks([])
        self._folder: Path | None = None
        self._memory_kills = 0
        self.ends: list[End] = []
        self.elsewhere: tuple[str, int] | None = None
        self._ranks_store: dist.TCPStore | None = None

    # The rendezvous.

    def _assign_worker_ranks(
        self, store: dist.Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        place = self._options.node_rank
        if place is not None:
            store.set(f"node_rank/{group_rank}", str(place))
            places = [int(store.get(f"node_rank/{node}")) for node in range(group_world_size)]
            if sorted(places) != list(range(group_world_size)):
                raise UserError(
                    f"--node-rank = {place}: the {group_world_size} nodes gave {', '.join(map(str, sorted(places)))}; "
                    f"must be each of 0 to {group_world_size - 1} once"
                )
            group_rank = place
        return super()._assign_worker_ranks(store, group_rank, group_world_size, spec)

    def _rendezvous(self, worker_group: Any) -> None:  # not WorkerGroup, which declares None for what is set here
        super()._rendezvous(worker_group)
        if self._options.node_rank is not None:
            worker_group.group_rank = self._options.node_rank
        # A store of its own for each attempt: gloo would find the addresses of the attempt before in a shared one.
        if worker_group.group_rank == 0:
            address = self._address or socket.getfqdn()
            self._ranks_store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
            worker_group.store.set("ranks_store", f"{address} {self._ranks_store.port}")
        address, port = worker_group.store.get("ranks_store").decode().split()
        worker_group.master_addr, worker_group.master_port = address, int(port)

    # The ranks.

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._early, self._received, self.ends, self.elsewhere = [], [], [], None
        self._folder = Path(tempfile.mkdtemp(prefix="megatron-gkd-"))
        self._phase = _Phase.STARTING
        self._memory_kills = count_memory_kills()
        self._signals.install()
        self._ranks = Ranks.start(self._command, [self._variables(worker) for worker in worker_group.workers])
        self._phase = _Phase.RUNNING
        for signum in self._early:
            self._forward(signum)
        return dict(enumerate(self._ranks.pids))

    def _variables(self, worker: Worker) -> dict[str, str]:
        group, spec = self._worker_group, self._worker_group.spec
        values = {
            "RANK": worker.global_rank,
            "LOCAL_RANK": worker.local_rank,
            "GROUP_RANK": group.group_rank,
            "ROLE_RANK": worker.role_rank,
            "ROLE_NAME": spec.role,
            "WORLD_SIZE": worker.world_size,
            "LOCAL_WORLD_SIZE": spec.local_world_size,
            "GROUP_WORLD_SIZE": group.group_world_size,
            "ROLE_WORLD_SIZE": worker.role_world_size,
            "MASTER_ADDR": group.master_addr,
            "MASTER_PORT": group.master_port,
            "TORCHELASTIC_RESTART_COUNT": spec.max_restarts - self._remaining_restarts,
            "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": True,
            failures.FOLDER: self._folder,
            failures.LAUNCHER: os.getpid(),
        }
        if spec.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            values["OMP_NUM_THREADS"] = 1  # as torchrun
        return {name: str(value) for name, value in values.items()}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Wait until all ranks have ended, or nodes wait to join, for which torch starts the ranks again."""
        watch = Deadlines(self._options.shutdown_timeout)
        check_nodes_at = time.monotonic()
        while self._ranks.running:
            for local_rank in self._ranks.poll():
                self.ends.append(self._end_of(local_rank, watch))
                watch.on_end(self.ends[-1])
            if self._received:
                watch.on_signal()
            watch.act(self._ranks)
            if self._options.max_nodes > 1 and self._ranks.running and time.monotonic() >= check_nodes_at:
                check_nodes_at = time.monotonic() + CHECK_NODES_EVERY_S
                if self._check_nodes(watch):
                    return RunResult(WorkerState.HEALTHY)
            time.sleep(POLL_EVERY_S)
        self._wait_for_cause(watch)
        return self._result(worker_group)

    def _wait_for_cause(self, watch: Deadlines) -> None:
        """Wait for the failure on another node where ranks of this one have only lost their connections to it."""
        if self._options.max_nodes == 1 or self._remaining_restarts > 0 or self._received:
            return
        if not self._causes or any(not end.is_consequence for end in self._causes):
            return
        deadline = time.monotonic() + CAUSE_WITHIN_S
        while self.elsewhere is None and time.monotonic() < deadline:
            self._check_nodes(watch)
            time.sleep(POLL_EVERY_S)

    def _end_of(self, local_rank: int, watch: Deadlines) -> End:
        worker, code = self._worker_group.workers[local_rank], self._ranks.codes[local_rank]
        failure = None if self._folder is None else failures.read_failure(self._folder, worker.global_rank)
        forwarded = next((signum for signum in self._received if code in (-signum, 128 + signum)), 0)
        is_killed = code in (-signal.SIGTERM, -signal.SIGKILL) and not forwarded
        return End(
            worker.global_rank,
            code,
            time.time() if failure is None else failure.time,
            failure,
            stopped=watch.stopped if is_killed else None,
            forwarded=0 if watch.stopped else forwarded,
            lacked_memory=code == -signal.SIGKILL and count_memory_kills() > self._memory_kills,
        )

    def _check_nodes(self, watch: Deadlines) -> bool:
        """Look for failures on other nodes; return whether nodes wait to join."""
        if self.elsewhere is not None:
            return False
        try:
            if self._store.check(["failed"]):
                code, _, text = self._store.get("failed").decode().partition(" ")
                self.elsewhere = text, int(code)
                if int(code) == INTERRUPTED:  # nodes announce no other end with this code
                    watch.on_hang()
                else:
                    watch.on_failure(ENDS_AFTER_A_KILL_S)
            return not self._received and self._worker_group.spec.rdzv_handler.num_nodes_waiting() > 0
        except (RendezvousError, dist.DistError):
            self.elsewhere = "lost the connection to the rendezvous; the launcher that holds it has ended", 1
            if not self._received and not any(end.is_interruption for end in self.ends):
                watch.on_failure(ENDS_BY_ITSELF_S)
            return False

    def _result(self, worker_group: WorkerGroup) -> RunResult:
        code = self.exit_code
        if code == 0:
            return RunResult(
                WorkerState.SUCCEEDED, return_values={worker.global_rank: None for worker in worker_group.workers}
            )
        if code in (INTERRUPTED, UserError.exit_code, ServiceError.exit_code) or self._received:
            self._remaining_restarts = 0  # it would end in the same way
        if self._remaining_restarts > 0:
            number = worker_group.spec.max_restarts - self._remaining_restarts + 1
            print(f"{self.report()}\nrestart {number} of {worker_group.spec.max_restarts}", file=sys.stderr, flush=True)
        elif self.elsewhere is None and (code != INTERRUPTED or any(end.is_hang for end in self.ends)):
            first = self.report().partition("\n")[0]
            with contextlib.suppress(dist.DistError):
                self._store.set("failed", f"{code} node {worker_group.group_rank} ({socket.gethostname()}): {first}")
        return RunResult(WorkerState.FAILED)

    @property
    def exit_code(self) -> int:
        """Return the exit code of this launcher."""
        own = report.exit_code(self.ends)
        if self.elsewhere is None or own == INTERRUPTED or any(not end.is_consequence for end in self._causes):
            return own
        return self.elsewhere[1]

    @property
    def _causes(self) -> list[End]:
        return report.causes(self.ends)

    def report(self) -> str:
        """Return why the ranks failed, or were interrupted; an empty text where they succeeded."""
        world_size = self._worker_group.workers[0].world_size
        elsewhere = self.elsewhere and self.elsewhere[0]
        own = report.describe(self.ends, world_size, self._options.shutdown_timeout, is_explained=bool(elsewhere))
        return "\n".join(text for text in (elsewhere, own) if text)

    # The end.

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = 30) -> None:
        """End the running ranks, for nodes that join; they may save."""
        self._ranks.send(death_sig)
        deadline = time.monotonic() + self._options.shutdown_timeout
        while self._ranks.running and time.monotonic() < deadline:
            self._ranks.poll()
            time.sleep(POLL_EVERY_S)
        self._ranks.close()
        self._ranks = Ranks([])
        self._signals.restore()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _exit_barrier(self) -> None:
        """Do nothing: `wait_for_other_nodes` follows after failures too."""

    def wait_for_other_nodes(self) -> None:
        """Wait until the launchers of all nodes are here: ranks on other nodes may use the store of this one."""
        group: Any = self._worker_group
        if group.group_world_size in (None, 1):
            return
        code = self.exit_code
        seconds = self._options.shutdown_timeout if code == INTERRUPTED else LEAVES_AFTER_S[code == 0]
        deadline = time.monotonic() + seconds
        keys = [f"ended/{node}" for node in range(group.group_world_size)]
        self._phase = _Phase.LEAVING
        self._signals.install()
        with contextlib.suppress(dist.DistError):  # another node, which holds the store, has left
            self._store.set(keys[group.group_rank], "")
            while not self._store.check(keys) and time.monotonic() < deadline and self._phase is not _Phase.GONE:
                time.sleep(POLL_EVERY_S)
        self._signals.restore()

    def _on_signal(self, signum: int) -> None:
        if self._phase is _Phase.STARTING:
            self._early.append(signum)
        elif self._phase is _Phase.RUNNING:
            self._forward(signum)
        else:
            self._phase = _Phase.GONE

    def _forward(self, signum: int) -> None:
        if signum == signal.SIGINT and signal.SIGINT in self._received:
            self._end_at_once()
        self._received.append(signum)
        self._ranks.send(signum)
        if signum == signal.SIGINT:
            print("SIGINT: stopping after this step; a second Ctrl-C ends at once", file=sys.stderr, flush=True)

    def _end_at_once(self) -> NoReturn:
        """Forward a second SIGINT, upon which ranks write their exit record at most, and kill those that are left."""
        self._ranks.send(signal.SIGINT)
        deadline = time.monotonic() + _LAST_RECORD_WITHIN_S
        while self._ranks.running and time.monotonic() < deadline:
            self._ranks.poll()
            time.sleep(POLL_EVERY_S)
        self._ranks.kill()
        self._remove_folder()
        print("second SIGINT: ended at once", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)


class _Phase(Enum):
    """What the agent does, which decides about signals: they are for the ranks, or end the wait for other nodes."""

    STARTING, RUNNING, LEAVING, GONE = range(4)
