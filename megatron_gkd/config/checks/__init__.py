"""The checks of a recipe that involve several keys, or the file system. Each names the keys that it reads."""

from collections.abc import Set

from megatron_gkd.config.checks import (
    api_keys,
    attention,
    cache,
    cluster,
    data,
    distill,
    hubs,
    layout,
    lengths,
    lora,
    megatron,
    memory,
    model,
    output,
    rollout,
    streaming,
    teacher,
    training,
    vision,
)
from megatron_gkd.config.checks.registry import Check, CommandChecks, registered_checks
from megatron_gkd.config.schema import Recipe

_IN_ORDER = (
    teacher,
    cache,
    distill,
    rollout,
    api_keys,
    lengths,
    layout,
    training,
    attention,
    megatron,
    memory,
    lora,
    vision,
    data,
    streaming,
    output,
    hubs,
    model,
    cluster,
)
CHECKS = registered_checks(tuple(module.__name__ for module in _IN_ORDER))
"""All checks in the order of their reports."""

TRAIN = CommandChecks()

__all__ = ["CHECKS", "TRAIN", "Check", "CommandChecks", "find_problems"]


def find_problems(
    recipe: Recipe,
    world_size: int,
    *,
    command: CommandChecks = TRAIN,
    doubtful: Set[str] = frozenset(),
    require_paths: bool = True,
) -> list[str]:
    """Return the problems of a recipe whose sections are valid, except for the leaves in `doubtful`.

    Args:
        recipe: the recipe.
        world_size: the number of processes.
        command: which checks are made.
        doubtful: leaves that are wrong by themselves; checks that read them are left out.
        require_paths: whether checks that look at files and libraries of this machine are made.
    """
    checks = () if command.has_own else tuple(one for one in CHECKS if one not in command.left_out)
    return [
        problem
        for one in (*checks, *command.extra)
        if doubtful.isdisjoint(one.keys) and (require_paths or not one.needs_files)
        for problem in one.find(recipe, world_size)
    ]
