"""The parts that commands share: loading recipes, reading options, and showing that a command starts."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from megatron_gkd import __version__
from megatron_gkd.errors import CommandRefused
from megatron_gkd.launch import environment

if TYPE_CHECKING:
    from megatron_gkd.config.checks import CommandChecks
    from megatron_gkd.config.options import Option
    from megatron_gkd.config.schema import Recipe

Work = Callable[[], None]
Command = Callable[[str, list[str], int], Work]
"""Check a command line, given as its first argument and the others, for a number of processes; return the work."""


def load_recipe(
    path: str, overrides: Sequence[str], world_size: int, command: "CommandChecks | None" = None
) -> "Recipe":
    """Return a checked recipe.

    Raises:
        CommandRefused: with all that is wrong with it.
    """
    from megatron_gkd.config.checks import TRAIN
    from megatron_gkd.config.errors import RecipeError
    from megatron_gkd.config.load import load

    try:
        return load(path, overrides, world_size=world_size, command=command or TRAIN)
    except RecipeError as error:
        raise CommandRefused("\n".join(f"{path}: {problem}" for problem in error.problems)) from error


def take(arguments: list[str], options: "Mapping[str, Option]") -> tuple[dict[str, Any], list[str]]:
    """Return the values of a command's own options, and the other arguments.

    Raises:
        CommandRefused: a value is wrong.
    """
    from megatron_gkd.config.errors import RecipeError
    from megatron_gkd.config.options import take_options

    try:
        return take_options(arguments, options)
    except RecipeError as error:
        raise CommandRefused(str(error)) from error


def imports() -> AbstractContextManager[object]:
    """Show the imports of a command as the first phase of its start."""
    from megatron_gkd.reporting.phases import phase

    return phase(f"Starting megatron-gkd {__version__}", is_main=environment.rank() == 0)


def print_text(text: str) -> None:
    """Print to a reader that may stop reading (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
