"""The register of the checks, and running them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_gkd.config.schema import Recipe

Find = Callable[[Recipe, int], Iterator[str]]


@dataclass(frozen=True)
class Check:
    """A check of the recipe for a number of processes.

    Attributes:
        keys: the leaves that it reads. It is left out where one of them is wrong by itself: one mistake, one line.
        find: yields the problems of a recipe for a number of processes.
        needs_files: whether it looks at files and libraries of this machine.
    """

    keys: tuple[str, ...]
    find: Find
    needs_files: bool = False


@dataclass(frozen=True)
class CommandChecks:
    """The checks of a command.

    Attributes:
        extra: checks beside the registered ones.
        left_out: registered checks that the command does not need.
        has_own: whether it makes those of `extra` alone.
    """

    extra: tuple[Check, ...] = ()
    left_out: tuple[Check, ...] = ()
    has_own: bool = False


_REGISTERED: list[Check] = []


def check(*keys: str, needs_files: bool = False) -> Callable[[Find], Check]:
    """Make a function a check of every recipe.

    Args:
        *keys: the leaves that the function reads; a test compares them with what it does read.
        needs_files: whether it looks at files and libraries of this machine.
    """

    def register(find: Find) -> Check:
        made = Check(keys, find, needs_files)
        _REGISTERED.append(made)
        return made

    return register


def command_check(*keys: str, needs_files: bool = False) -> Callable[[Find], Check]:
    """Make a function a check for `CommandChecks.extra`. The arguments are those of `check`."""
    return lambda find: Check(keys, find, needs_files)


def registered_checks(modules: tuple[str, ...]) -> tuple[Check, ...]:
    """Return the registered checks of `modules` in this order, and within a module in the order of definition."""
    return tuple(sorted(_REGISTERED, key=lambda made: modules.index(made.find.__module__)))
