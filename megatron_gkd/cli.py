"""The command line. It answers --help and refuses a wrong recipe without importing torch.

`megatron-gkd train recipe.yaml --beta 1.0`, or `torchrun --nproc-per-node 2 -m megatron_gkd train recipe.yaml`.
"""

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_gkd import __version__
from megatron_gkd.errors import RunStopped, ServiceFailed, UserError

if TYPE_CHECKING:
    from megatron_gkd.config import Recipe
    from megatron_gkd.config.checks import CommandChecks
    from megatron_gkd.config.commands import Option

USAGE = """\
usage: megatron-gkd train recipe.yaml [--leaf value ...]
       megatron-gkd check recipe.yaml [--nproc N] [--leaf value ...]
       megatron-gkd score recipe.yaml --output FOLDER [--leaf value ...]
       megatron-gkd generate recipe.yaml --from teacher|student --output FILE.jsonl [--n N] [--leaf value ...]

train     distill a teacher into a student
check     read the recipe for N processes (default 1), say all that is wrong with it, print it and its layout
score     write what the teacher says of each row of the data sets (its gkd_logits_topk most likely tokens) into a
          folder, from which `teacher: {cache: FOLDER}` trains under any layout, without a teacher
generate  write N answers of a model to each prompt of the data set, as rows of token ids to train on with lmbda 0

All but check run under torchrun too, over its processes.

Options: -h, --help (`megatron-gkd train --help` lists the recipe's keys), --version
"""

OVERRIDES = """\
Every key of the recipe can be given on the command line as --leaf value or --section.leaf value; values are YAML.
A true-or-false key may stand alone (--packing); a list takes several values (--dataset a.jsonl b.jsonl).
"""


def run() -> NoReturn:
    """Run `main` as the whole process.

    A rank that fails inside a process group leaves at once: to take the group down it would have to wait for ranks that
    may never come, and the launcher ends these only when it is gone.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    if code and _has_process_group():
        from megatron_gkd.runtime.signals import leave_process

        leave_process(code)
    sys.exit(code)


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 where the user has to change something, 75 of an interrupted run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        return _dispatch(arguments)
    except UserError as error:
        # Every rank raises these together, so one prints them; another error may be of one rank alone.
        is_shared = isinstance(error, _RecipeRefused | RunStopped | ServiceFailed)
        if rank == 0 or not is_shared:
            print(f"rank {rank}: {error}" if rank else error, file=sys.stderr, flush=True)
        if _has_process_group() and (rank == 0 or is_shared):
            from megatron_gkd.runtime.agreement import wait_for_message

            wait_for_message()
        return error.exit_code


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
        _print(_help(name))
        return 0
    if not rest or rest[0].startswith("-"):
        raise _RecipeRefused(f"megatron-gkd {name}: the recipe's path must come first: megatron-gkd {name} recipe.yaml")
    _COMMANDS[name](rest[0], rest[1:])
    return 0


def _help(name: str) -> str:
    from megatron_gkd.config import commands
    from megatron_gkd.config.help import recipe_keys

    options = {"check": commands.CHECK, "score": commands.SCORE, "generate": commands.GENERATE}.get(name)
    own = f"options of {name}:\n{commands.help_of(options)}\n\n" if options else ""
    return f"{USAGE}\n{own}{OVERRIDES}\n{recipe_keys()}"


def _print(text: str) -> None:
    """Print to a reader that may stop reading (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit


def _load(path: str, overrides: Sequence[str], world_size: int, command: "CommandChecks | None" = None) -> "Recipe":
    from megatron_gkd.config import RecipeError, load
    from megatron_gkd.config.checks import TRAIN

    try:
        return load(path, overrides, world_size=world_size, command=command or TRAIN)
    except RecipeError as error:
        raise _RecipeRefused("\n".join(f"{path}: {problem}" for problem in error.problems)) from error


def _train(path: str, overrides: list[str]) -> None:
    recipe = _load(path, overrides, _world_size())
    with _imports():
        from megatron_gkd.training.run import train

    train(recipe)


def _score(path: str, arguments: list[str]) -> None:
    from megatron_gkd.config import commands

    options, overrides = _take(arguments, commands.SCORE)
    recipe = _load(path, overrides, _world_size(), commands.SCORES)
    with _imports():
        from megatron_gkd.training.score import score

    score(recipe, **options)


def _generate(path: str, arguments: list[str]) -> None:
    from megatron_gkd.config import commands

    options, overrides = _take(arguments, commands.GENERATE)
    source = options.pop("from")
    asked = commands.TEACHER_GENERATES if source == "teacher" else commands.STUDENT_GENERATES
    recipe = _load(path, overrides, _world_size(), asked)
    with _imports():
        from megatron_gkd.training.generate import generate

    generate(recipe, source, **options)


def _check(path: str, arguments: list[str]) -> None:
    from megatron_gkd.config import commands

    options, overrides = _take(arguments, commands.CHECK)
    recipe = _load(path, overrides, options["nproc"])
    from megatron_gkd.config.layout import describe_layout

    layout = describe_layout(recipe, options["nproc"])
    lines = [f"{name + ':':8} {text}" for name, text in layout.items()]
    _print("\n".join([recipe.to_yaml(), *lines]))


def _imports() -> AbstractContextManager:
    """Show the imports of a command as the first phase of its start."""
    from megatron_gkd.reporting.phases import phase

    return phase(f"Starting megatron-gkd {__version__}", is_main=int(os.environ.get("RANK", "0")) == 0)


def _world_size() -> int:
    """As the launcher has it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _take(arguments: list[str], options: "Mapping[str, Option]") -> tuple[dict[str, Any], list[str]]:
    from megatron_gkd.config import RecipeError
    from megatron_gkd.config.commands import take_options

    try:
        return take_options(arguments, options)
    except RecipeError as error:
        raise _RecipeRefused(str(error)) from error


_COMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    "train": _train,
    "check": _check,
    "score": _score,
    "generate": _generate,
}
