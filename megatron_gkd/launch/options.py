"""The options that start several processes: `--nproc 8 --nnodes 2 --rdzv node0:29400`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.options import Option, positive, take_options

GPU = "gpu"


def _processes(text: str) -> int | str:
    return GPU if text == GPU else positive(text)


def _nodes(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    found = positive(least), positive(most or least)
    if found[0] > found[1] or text.endswith(":"):
        raise ValueError
    return found


def _not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or positive(port) > 65535:
        raise ValueError
    return host.removeprefix("[").removesuffix("]"), int(port)


LAUNCH = {
    "nproc": Option(
        "an integer >= 1, or gpu", "processes to start on this node; gpu: one for each visible GPU", read=_processes
    ),
    "nnodes": Option("an integer >= 1, or MIN:MAX", "nodes, on each of which the command runs", 1, _nodes),
    "node-rank": Option("an integer >= 0", "place of this node; node 0 is HOST of --rdzv", read=_not_negative),
    "rdzv": Option("HOST:PORT", "where the nodes meet; the same on all nodes, HOST is one of them", read=_endpoint),
    "rdzv-id": Option("a text", "name of the run; default: the Slurm job's number, or the recipe's path, hashed"),
    "max-restarts": Option(
        "an integer >= 0", "how often to start the processes again after a failure", 0, _not_negative
    ),
    "shutdown-timeout": Option(
        "an integer >= 1", "seconds that processes have to save and end after a signal, before SIGKILL", 300, positive
    ),
}
"""Options by name. Their defaults are for --help: `take` must see which are given."""


@dataclass(frozen=True)
class LaunchOptions:
    """How to start the processes of a run on this node.

    Attributes:
        nproc: processes on this node; "gpu" for one on each visible GPU.
        min_nodes: fewest nodes to start with.
        max_nodes: most nodes.
        node_rank: the place of this node; None: as the nodes join.
        rdzv: host and port where the nodes meet; None for one node.
        rdzv_id: name of the run; the same on all nodes.
        max_restarts: how often the processes are started again after a failure.
        shutdown_timeout: seconds between a signal and SIGKILL.
    """

    nproc: int | str
    min_nodes: int = 1
    max_nodes: int = 1
    node_rank: int | None = None
    rdzv: tuple[str, int] | None = None
    rdzv_id: str = "run"
    max_restarts: int = 0
    shutdown_timeout: float = 300


def take(
    recipe: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[LaunchOptions | None, list[str]]:
    """Return the launch options among `arguments`, None without --nproc, and the other arguments.

    Raises:
        RecipeError: with all that is wrong with them.
    """
    environment = os.environ if environment is None else environment
    given, rest = take_options(arguments, {name: _without_default(option) for name, option in LAUNCH.items()})
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None, rest
    problems = list(_problems(given, environment))
    if problems:
        raise RecipeError(problems)
    least, most = given.get("nnodes", (1, 1))
    options = LaunchOptions(
        nproc=given["nproc"],
        min_nodes=least,
        max_nodes=most,
        node_rank=given.get("node-rank"),
        rdzv=given.get("rdzv"),
        rdzv_id=given.get("rdzv-id") or environment.get("SLURM_JOB_ID") or _hash_of(recipe),
        max_restarts=given.get("max-restarts", 0),
        shutdown_timeout=given.get("shutdown-timeout", 300),
    )
    return options, rest


def _without_default(option: Option) -> Option:
    return Option(option.allowed, option.meaning, None, option.read)


def _problems(given: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[str]:
    if "nproc" not in given:
        name = next(iter(given))
        yield f"--{name}: needs --nproc N, the number of processes to start on this node"
        return
    for name in ("RANK", "WORLD_SIZE"):
        if name in environment:
            yield (
                f"--nproc = {given['nproc']}: {name} is set, so a launcher has started this process already; "
                f"remove --nproc or unset {name}"
            )
            return
    least, most = given.get("nnodes", (1, 1))
    if most > 1 and "rdzv" not in given:
        yield f"--nnodes = {least if least == most else f'{least}:{most}'}: needs --rdzv HOST:PORT"
    place = given.get("node-rank")
    if place is not None and least != most:
        yield f"--node-rank = {place}: needs a fixed number of nodes; --nnodes is {least}:{most}"
    elif place is not None and place >= most:
        yield f"--node-rank = {place}: must be less than the number of nodes ({most})"


def _hash_of(recipe: str) -> str:
    return hashlib.sha256(str(Path(recipe).absolute()).encode()).hexdigest()[:12]
