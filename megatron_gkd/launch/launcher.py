"""Start the ranks of this node, wait for them, and report the first failure."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from megatron_gkd.errors import UserError
from megatron_gkd.launch import meet
from megatron_gkd.launch.agent import RankAgent
from megatron_gkd.launch.options import GPU, LaunchOptions
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.hosts import REACHED_WITHIN_S
from megatron_gkd.runtime.open_files import raise_open_files_limit

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def launch(options: LaunchOptions, command: Sequence[str]) -> int:
    """Run `command` in the ranks of this node, and print why they fail; return the exit code.

    Raises:
        UserError: the ranks could not be started.
    """
    _silence_torch_agent()
    raise_open_files_limit()
    host, port = options.rdzv or ("127.0.0.1", 0)
    address = None
    if options.node_rank == 0 or host in _LOOPBACK:
        address = host  # the name by which the other nodes connect to this one
    try:
        handler = _rendezvous(options, host, port, address)
        agent = RankAgent(_spec(options, handler, command), command, options, address)
        try:
            agent.run()
        finally:
            text = agent.report() if agent.ends else ""
            if text:
                print(text, file=sys.stderr, flush=True)
        agent.wait_for_other_nodes()
        handler.shutdown()
    except (RendezvousError, dist.DistError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"--rdzv = {host}:{port}: {options.max_nodes} nodes could not meet there ({type(error).__name__}: {reason})"
        ) from error
    return agent.exit_code


def _rendezvous(options: LaunchOptions, host: str, port: int, address: str | None) -> RendezvousHandler:
    is_host = True if options.rdzv is None else meet.is_host(host, port, options.node_rank)
    if not is_host:
        meet.wait_for_host(host, port, REACHED_WITHIN_S)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        run_id=options.rdzv_id,
        min_nodes=options.min_nodes,
        max_nodes=options.max_nodes,
        local_addr=address,
        join_timeout=REACHED_WITHIN_S,
        is_host=is_host,
    )
    return get_rendezvous_handler(parameters)


def _spec(options: LaunchOptions, handler: RendezvousHandler, command: Sequence[str]) -> WorkerSpec:
    return WorkerSpec(
        role="rank",
        local_world_size=processes(options),
        rdzv_handler=handler,
        entrypoint=command[0],
        max_restarts=options.max_restarts,
        monitor_interval=0.05,
    )


def processes(options: LaunchOptions) -> int:
    """Return the number of processes on this node.

    Raises:
        UserError: there are not as many GPUs.
    """
    gpus = portability.num_gpus()
    if isinstance(options.nproc, str):
        if gpus == 0:
            raise UserError(f"--nproc = {GPU}: no GPU is visible; give a number")
        return gpus
    if 0 < gpus < options.nproc:
        raise UserError(f"--nproc = {options.nproc}: {gpus} GPUs are visible; must be at most that")
    return options.nproc


def _silence_torch_agent() -> None:
    """Keep the elastic agent's log off the terminal, unless LOGLEVEL asks for it."""
    if "LOGLEVEL" not in os.environ:
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
