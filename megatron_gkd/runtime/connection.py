"""Connect the processes of a run: they meet at a store, whose address the launcher has set."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import hosts
from megatron_gkd.runtime.background import in_background
from megatron_gkd.runtime.open_files import raise_open_files_limit
from megatron_gkd.runtime.quiet import shows_warnings

_LONGER_S = 10.0  # than torch's own limit, which it overruns a little
_STDERR = 2


def connect(*, backend: str, timeout: datetime.timedelta, **world: Any) -> None:
    """Create the default process group.

    Args:
        backend: of its collectives.
        timeout: longest time of one of them.
        world: `store`, `rank` and `world_size` where they are known. Else the environment gives them, and all processes
            have to come within `hosts.REACHED_WITHIN_S`; torch waits for them as long as for a collective.

    Raises:
        UserError: the address is wrong, or a process does not come.
    """
    raise_open_files_limit()
    dist.init_process_group(backend=backend, timeout=timeout, **(world or _meet(timeout)))


def _meet(timeout: datetime.timedelta) -> dict[str, Any]:
    """Return the store of the run's processes, and this one's rank; see `connect`."""
    host, port = _variable("MASTER_ADDR"), int(_variable("MASTER_PORT"))
    key = f"MASTER_ADDR = {host} and MASTER_PORT = {port}"
    hosts.resolve(host, port, key, hosts.NAMED_WITHIN_S)
    is_of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_of_launcher or os.environ["RANK"] != "0":
        what = "the launcher" if is_of_launcher else "rank 0"
        hosts.wait_for_port(host, port, key, what, hosts.REACHED_WITHIN_S)
    limit = datetime.timedelta(seconds=hosts.REACHED_WITHIN_S)
    try:
        with _hidden_output():  # torch prints a stack for each attempt
            meeting = in_background(lambda: next(iter(dist.rendezvous("env://", timeout=limit))))
            store, rank, world_size = meeting.result(hosts.REACHED_WITHIN_S + _LONGER_S)
    except (dist.DistError, TimeoutError) as error:
        # Without a time limit torch waits for the response of a service that is no store.
        reason = str(error).strip().partition("\n")[0] or f"no response within {hosts.REACHED_WITHIN_S:g} s"
        raise UserError(
            f"{key}: rank {os.environ['RANK']} on {socket.gethostname()} can't meet the other processes there: {reason}"
        ) from error
    store.set_timeout(timeout)
    return {"store": dist.PrefixStore("default_pg", store), "rank": rank, "world_size": world_size}


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UserError(f"{name}: not set; torchrun and --nproc set it, or the job script where RANK is set there")
    return value


@contextlib.contextmanager
def _hidden_output() -> Iterator[None]:
    """Discard what this process's libraries write to stderr, unless the user wants to see it."""
    if shows_warnings():
        yield
        return
    own, nothing = os.dup(_STDERR), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, _STDERR)
        yield
    finally:
        os.dup2(own, _STDERR)
        os.close(own)
        os.close(nothing)
