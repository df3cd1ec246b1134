"""The rank and world size that a launcher (torchrun, or ours) has set in environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_gkd.errors import UserError

_HINT = "torchrun and --nproc set it; unset it to run one process"
_HINT_BOTH = "torchrun and --nproc set RANK and WORLD_SIZE; unset both to run one process"


def rank() -> int:
    """Return this process's rank; 0 where there is none, or none that is a number."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def world_size(environment: Mapping[str, str] | None = None) -> int:
    """Return the number of processes of the run.

    Raises:
        UserError: a variable of the launcher is no number, or two of them contradict each other.
    """
    environment = os.environ if environment is None else environment
    size = _integer(environment, "WORLD_SIZE", 1, 1)
    place = _integer(environment, "RANK", 0, 0)
    _integer(environment, "LOCAL_RANK", 0, 0)
    if _integer(environment, "MASTER_PORT", 1, 1) > 65535:
        raise UserError(f"MASTER_PORT = {environment['MASTER_PORT']}: must be an integer from 1 to 65535; {_HINT}")
    if "RANK" in environment and "WORLD_SIZE" not in environment:
        raise UserError(f"RANK = {place}: WORLD_SIZE is not set; {_HINT_BOTH}")
    if size > 1 and "RANK" not in environment:
        raise UserError(f"WORLD_SIZE = {size}: RANK is not set; {_HINT_BOTH}")
    if place >= size:
        raise UserError(f"RANK = {place}: must be less than WORLD_SIZE ({size}); {_HINT_BOTH}")
    return size


def _integer(environment: Mapping[str, str], name: str, least: int, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise UserError(f"{name} = {text!r}: must be an integer >= {least}; {_HINT}")
    return int(text)
