"""The command line. It answers --help and refuses a wrong recipe without importing torch.

`megatron-gkd train recipe.yaml --beta 1.0`, or `torchrun --nproc-per-node 2 -m megatron_gkd train recipe.yaml`.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_gkd import __version__
from megatron_gkd.errors import ServiceFailed, UserError

if TYPE_CHECKING:
    from megatron_gkd.config import Recipe

USAGE = """\
usage: megatron-gkd train recipe.yaml [--leaf value ...]
       megatron-gkd check recipe.yaml [--nproc N] [--leaf value ...]

train   distill a teacher into a student; under torchrun, over its processes
check   read the recipe for N processes (default 1), say all that is wrong with it, print it and its layout

Options: -h, --help (`megatron-gkd train --help` lists the recipe's keys), --version
"""

OVERRIDES = """\
Every key of the recipe can be given on the command line as --leaf value or --section.leaf value; values are YAML.
A true-or-false key may stand alone (--packing); a list takes several values (--dataset a.jsonl b.jsonl).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 where the user has to change something."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        return _dispatch(arguments)
    except (_RecipeRefused, ServiceFailed) as error:  # every rank finds the same, so one tells
        if rank == 0:
            print(error, file=sys.stderr)
    except UserError as error:  # a rank may be the only one to meet it
        print(f"rank {rank}: {error}" if rank else error, file=sys.stderr)
    return 2


class _RecipeRefused(UserError):
    """A wrong command line or recipe, known before the ranks differ."""


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"megatron-gkd {__version__}")
        return 0
    name, *rest = arguments
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(_COMMANDS)}"
        raise _RecipeRefused(f"megatron-gkd {name}: unknown command; {hint}")
    if "-h" in rest or "--help" in rest:
        from megatron_gkd.config.help import recipe_keys

        _print(f"{USAGE}\n{OVERRIDES}\n{recipe_keys()}")
        return 0
    if not rest or rest[0].startswith("-"):
        raise _RecipeRefused(f"megatron-gkd {name}: the recipe's path must come first: megatron-gkd {name} recipe.yaml")
    _COMMANDS[name](rest[0], rest[1:])
    return 0


def _print(text: str) -> None:
    """Print to a reader that may stop reading (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit


def _load(path: str, overrides: Sequence[str], world_size: int) -> "Recipe":
    from megatron_gkd.config import RecipeError, load

    try:
        return load(path, overrides, world_size=world_size)
    except RecipeError as error:
        raise _RecipeRefused("\n".join(f"{path}: {problem}" for problem in error.problems)) from error


def _train(path: str, overrides: list[str]) -> None:
    recipe = _load(path, overrides, int(os.environ.get("WORLD_SIZE", "1")))
    from megatron_gkd.training.run import train

    train(recipe)


def _check(path: str, overrides: list[str]) -> None:
    world_size, overrides = _take_nproc(overrides)
    recipe = _load(path, overrides, world_size)
    _print(f"{recipe.to_yaml()}\n{_layout(recipe, world_size)}")


def _layout(recipe: "Recipe", world_size: int) -> str:
    """The processes and the step as products, a line each."""
    p, train, replicas = recipe.parallel, recipe.train, recipe.data_parallel_size(world_size)
    microbatches = recipe.num_microbatches(world_size)
    pipeline, packed = p.pipeline_model_parallel_size, "; packing makes them fewer" if recipe.data.packing else ""
    return (
        f"layout:  {world_size} processes = tensor {p.tensor_model_parallel_size} x context {p.context_parallel_size} "
        f"x pipeline {pipeline} x data {replicas}\n"
        f"experts: {world_size} processes = tensor {p.expert_tensor_parallel_size} x expert "
        f"{p.expert_model_parallel_size} x pipeline {pipeline} x data {recipe.expert_data_parallel_size(world_size)}\n"
        f"step:    {train.global_batch_size} rows = data {replicas} x microbatches {microbatches} "
        f"x rows {train.micro_batch_size}{packed}"
    )


def _take_nproc(arguments: list[str]) -> tuple[int, list[str]]:
    """The value of --nproc, and the other arguments."""
    rest, world_size = [], 1
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, text = argument.partition("=")
        if flag != "--nproc":
            rest.append(argument)
            continue
        text = text if equals else next(remaining, "")
        if not text.isdecimal() or int(text) < 1:
            raise _RecipeRefused(f"--nproc = {text}: must be an integer >= 1")
        world_size = int(text)
    return world_size, rest


_COMMANDS: dict[str, Callable[[str, list[str]], None]] = {"train": _train, "check": _check}
