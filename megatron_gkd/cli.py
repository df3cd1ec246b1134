"""The command line. It answers --help and refuses a wrong recipe without importing torch.

`megatron-gkd train recipe.yaml --beta 1.0`, or `torchrun --nproc-per-node 2 -m megatron_gkd train recipe.yaml`.
"""

import difflib
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_gkd import __version__
from megatron_gkd.errors import RunStopped, ServiceFailed, UserError

if TYPE_CHECKING:
    from megatron_gkd.config import Recipe
    from megatron_gkd.config.checks import CommandChecks
    from megatron_gkd.config.commands import Option
    from megatron_gkd.training.checkpointing.inspection import RunFolder

USAGE = """\
usage: megatron-gkd train recipe.yaml [--leaf value ...]
       megatron-gkd check recipe.yaml [--nproc N] [--leaf value ...]
       megatron-gkd score recipe.yaml --output FOLDER [--leaf value ...]
       megatron-gkd generate recipe.yaml --from teacher|student --output FILE.jsonl [--n N] [--leaf value ...]
       megatron-gkd checkpoint list RUN
       megatron-gkd checkpoint verify RUN [STEP]
       megatron-gkd checkpoint export RUN [STEP] [--output FOLDER] [--leaf value ...]

train     distill a teacher into a student
check     read the recipe for N processes (default 1), say all that is wrong with it, print it and its layout
score     write what the teacher says of each row of the data sets (its gkd_logits_topk most likely tokens) into a
          folder, from which `teacher: {cache: FOLDER}` trains under any layout, without a teacher
generate  write N answers of a model to each prompt of the data set, as rows of token ids to train on with lmbda 0
checkpoint
          list the checkpoints of the run in the folder RUN (its output_dir), verify the files of one or all, or export
          one as a Hugging Face folder: STEP is a number, best or last (the default). An export needs one process,
          whatever the layout of the run; with a layout in --leaf value it runs under torchrun

train, score, generate and checkpoint export run under torchrun too, over its processes.

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
    if name == "checkpoint" and (not rest or rest[0] not in _CHECKPOINT_ACTIONS):
        found = rest[0] if rest else ""
        allowed = ", ".join(_CHECKPOINT_ACTIONS)
        raise _RecipeRefused(f"megatron-gkd checkpoint {found}: what to do must come first: {allowed}")
    if not rest or rest[0].startswith("-"):
        raise _RecipeRefused(f"megatron-gkd {name}: the recipe's path must come first: megatron-gkd {name} recipe.yaml")
    _COMMANDS[name](rest[0], rest[1:])
    return 0


def _help(name: str) -> str:
    from megatron_gkd.config import commands
    from megatron_gkd.config.help import recipe_keys

    options = {
        "check": commands.CHECK,
        "score": commands.SCORE,
        "generate": commands.GENERATE,
        "checkpoint": commands.EXPORT,
    }.get(name)
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


def _checkpoint(action: str, arguments: list[str]) -> None:
    from megatron_gkd.config import commands
    from megatron_gkd.training.checkpointing.inspection import RunFolder, list_checkpoints

    options, arguments = _take(arguments, commands.EXPORT) if action == "export" else ({}, arguments)
    named = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    overrides = arguments[len(named) :]
    if not 1 <= len(named) <= (1 if action == "list" else 2) or (overrides and action != "export"):
        usage = "RUN" if action == "list" else "RUN [STEP]"
        raise _RecipeRefused(f"megatron-gkd checkpoint {action} {' '.join(arguments)}: must be {action} {usage}")
    try:
        run = RunFolder.find(named[0])
        if action == "list":
            _print(list_checkpoints(run))
            return
        step = run.choose(named[1] if len(named) > 1 else None)
    except UserError as error:
        raise _RecipeRefused(str(error)) from error
    if action == "verify":
        _verify_checkpoints(run, [step] if len(named) > 1 or run.step is not None else run.folder.steps())
    else:
        _export_checkpoint(run, step, options["output"], overrides)


def _verify_checkpoints(run: "RunFolder", steps: Sequence[int]) -> None:
    from megatron_gkd.training.checkpointing.inspection import verify_checkpoints

    intact, damaged = verify_checkpoints(run, steps)
    _print("\n".join(intact))
    if damaged:
        raise _RecipeRefused("\n".join(damaged))


def _export_checkpoint(run: "RunFolder", step: int, output: str | None, overrides: list[str]) -> None:
    from megatron_gkd.config import commands

    folder = Path(output or run.output_dir / f"hf-step-{step:06d}")
    if folder.exists():
        raise _RecipeRefused(f"--output = {folder}: exists already; must be a folder that does not")
    path = str(run.output_dir / "recipe.yaml")
    recipe = _load(path, [*commands.one_process(), *overrides], _world_size(), commands.EXPORTS)
    with _imports():
        from megatron_gkd.training.export_checkpoint import export

    export(recipe, run.folder.final(step), folder)


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
    "checkpoint": _checkpoint,
}
_CHECKPOINT_ACTIONS = ("list", "verify", "export")
