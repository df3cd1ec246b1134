"""Ranks that agree: whatever goes wrong in one of them is raised in all."""

from __future__ import annotations

import torch.distributed as dist

from megatron_gkd.errors import UserError


def raise_together(problem: str | None, kind: type[UserError] = UserError) -> None:
    """Raises the first rank's `problem` in every rank of the world; returns if no rank has one. All must call it."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise kind(found)


def holds_everywhere(condition: bool) -> bool:
    """Whether it holds in every rank of the world. All must call it."""
    conditions = [False] * dist.get_world_size()
    dist.all_gather_object(conditions, condition)
    return all(conditions)
