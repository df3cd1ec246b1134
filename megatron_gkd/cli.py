"""The command line. It prints --help and refuses a wrong recipe without importing torch.

`megatron-gkd train recipe.yaml --nproc 2`, or `torchrun --nproc-per-node 2 -m megatron_gkd train recipe.yaml`.
"""

import difflib
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from megatron_gkd import __version__
from megatron_gkd.commands import COMMANDS
from megatron_gkd.commands.checkpoint import ACTIONS
from megatron_gkd.commands.parts import Work, print_text
from megatron_gkd.errors import CommandRefused, GkdError
from megatron_gkd.launch import environment
from megatron_gkd.launch.failures import end_with_launcher, report_failure

if TYPE_CHECKING:
    from megatron_gkd.launch.options import LaunchOptions

USAGE = """\
usage: megatron-gkd train recipe.yaml [--nproc N] [--leaf value ...]
       megatron-gkd check recipe.yaml [--nproc N] [--leaf value ...]
       megatron-gkd data recipe.yaml [--show 3] [--split train|validation] [--json] [--leaf value ...]
       megatron-gkd plan recipe.yaml --gpus N [--gpu-memory 80GB] [--nodes-of 8] [--device NAME|FILE.yaml]
                             [--suggest [N]] [--json] [--leaf value ...]
       megatron-gkd score recipe.yaml --output FOLDER [--nproc N] [--leaf value ...]
       megatron-gkd generate recipe.yaml --from teacher|student --output FILE.jsonl [--n N] [--nproc N]
                             [--leaf value ...]
       megatron-gkd doctor [recipe.yaml] [--nproc N] [--json] [--leaf value ...]
       megatron-gkd migrate args.sh|args.yaml [--from swift|trl|nemo] [--output recipe.yaml]
       megatron-gkd checkpoint list RUN
       megatron-gkd checkpoint verify RUN [STEP]
       megatron-gkd checkpoint export RUN [STEP] [--output FOLDER] [--merge] [--nproc N] [--leaf value ...]

train     distill a teacher into a student
check     check the recipe for N processes (default 1), print all that is wrong with it, or the recipe and its layout
data      tokenize the rows as train does; print some as the model reads them, why others are left out, and the lengths.
          Reads neither weights nor teachers, needs no GPU
plan      print the memory of each GPU, the communication and an estimate of the time of a step on N GPUs, what does not
          fit and what helps, and with --suggest the fastest layouts; reads the models' config.json alone, needs no GPU
score     write the teacher's log-probabilities of each row of the data sets (of its gkd_logits_topk most likely tokens)
          to a folder, from which `teacher: {teacher_cache: FOLDER}` trains under any layout, without a teacher
generate  write N completions of each prompt of the data set, as rows of token ids to train on with lmbda 0
doctor    check this machine and its installation, and a recipe's files and servers: one line each, ok, warning or
          failed, with the remedy. The exit code is 0 unless one failed
migrate   write a recipe from a script or configuration of ms-swift, TRL or NeMo-RL, and list what it leaves out
checkpoint
          list the checkpoints of the run in the folder RUN (its output_dir), verify the files of one or all, or export
          one as a Hugging Face folder: STEP is a number, best or last (the default). An export needs one process,
          whatever the layout of the run

train, score, generate and checkpoint export start N processes with --nproc N, one for each GPU with --nproc gpu. They
run under torchrun too, over its processes.

Options: -h, --help (`megatron-gkd train --help` lists the recipe's keys), --version
"""

OVERRIDES = """\
Every key of the recipe can be given on the command line as --leaf value or --section.leaf value; values are YAML.
A true-or-false key may stand alone (--packing); a list takes several values (--dataset a.jsonl b.jsonl).
Names of ms-swift, TRL and NeMo-RL (--torch_dtype, --save_steps, --learning_rate, ...) are accepted, too:
docs/migrating.md lists them.
"""

_FIRST = {
    "checkpoint": f"the action must come first: {', '.join(ACTIONS)}",
    "migrate": "the script or configuration must come first: megatron-gkd migrate args.sh",
}
_WITHOUT_PROCESSES = ("check", "data", "plan", "doctor", "migrate", "checkpoint list", "checkpoint verify")


def run() -> NoReturn:
    """Run `main` as the whole process.

    A rank that fails inside a process group exits at once: to destroy the group it would wait for ranks that may never
    come, and the launcher ends these only once it has exited.
    """
    end_with_launcher()
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
        report_failure("interrupted by SIGINT", None, code)
    except Exception as error:
        code = 1
        report_failure(f"{type(error).__name__}: {error}", traceback.format_exc(), code)
    if code and _has_process_group():
        from megatron_gkd.runtime.signals import leave_process

        leave_process(code)
    sys.exit(code)


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, or that of the GkdError that ends it (see `errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except GkdError as error:
        report_failure(str(error), None, error.exit_code, is_shared=error.is_shared)
        return error.exit_code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"megatron-gkd {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise CommandRefused(f"megatron-gkd {name}: unknown command; {hint}")
    if "-h" in rest or "--help" in rest:
        print_text(_help(name))
        return 0
    if name == "doctor" and (not rest or rest[0].startswith("-")):
        rest = ["", *rest]
    if not rest or rest[0].startswith("-"):
        first = _FIRST.get(name, f"the recipe's path must come first: megatron-gkd {name} recipe.yaml")
        raise CommandRefused(f"megatron-gkd {name}: {first}")
    subject, arguments = rest[0], rest[1:]
    options = None
    if name not in _WITHOUT_PROCESSES and f"{name} {subject}" not in _WITHOUT_PROCESSES:
        options, arguments = _launch_options(subject, arguments)
    if options is not None:
        return _launch(options, name, subject, arguments)
    work = _prepare(name, subject, arguments)
    work()
    return 0


def _prepare(name: str, subject: str, arguments: list[str]) -> Work:
    """Check a command line and return its work; print the deprecated keys that it names, once in a run."""
    from megatron_gkd.config.renamed import DeprecatedKey

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecatedKey)
        work = COMMANDS[name](subject, arguments, environment.world_size())
    for one in caught:
        if not issubclass(one.category, DeprecatedKey):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if environment.rank() == 0:
        for text in dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, DeprecatedKey)):
            print(text, file=sys.stderr)
    return work


def _launch_options(path: str, arguments: list[str]) -> "tuple[LaunchOptions | None, list[str]]":
    from megatron_gkd.config.errors import RecipeError
    from megatron_gkd.launch.options import take

    try:
        return take(path, arguments)
    except RecipeError as error:
        raise CommandRefused(str(error)) from error


def _launch(options: "LaunchOptions", name: str, path: str, arguments: list[str]) -> int:
    """Start the ranks, if the recipe allows that many; return the exit code."""
    from megatron_gkd.config.renamed import DeprecatedKey

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecatedKey)  # the main rank prints them
        if isinstance(options.nproc, int):
            COMMANDS[name](path, arguments, options.nproc * options.min_nodes)  # before torch is imported
        from megatron_gkd.launch.launcher import launch, processes

        if not isinstance(options.nproc, int):  # "gpu"
            COMMANDS[name](path, arguments, processes(options) * options.min_nodes)
    return launch(options, [sys.executable, "-m", "megatron_gkd", name, path, *arguments])


def _help(name: str) -> str:
    from megatron_gkd.config import commands
    from megatron_gkd.config.help import recipe_keys
    from megatron_gkd.config.options import help_of
    from megatron_gkd.launch.options import LAUNCH

    options = {
        "check": commands.CHECK,
        "data": commands.DATA,
        "doctor": commands.DOCTOR,
        "plan": commands.PLAN,
        "score": commands.SCORE,
        "generate": commands.GENERATE,
        "checkpoint": commands.EXPORT,
        "migrate": commands.MIGRATE,
    }.get(name)
    own = f"options of {name}:\n{help_of(options)}\n\n" if options else ""
    if name not in _WITHOUT_PROCESSES:
        own += f"options to start several processes:\n{help_of(LAUNCH)}\n\n"
    if name == "migrate":  # reads no recipe
        return f"{USAGE}\n{own.rstrip()}"
    return f"{USAGE}\n{own}{OVERRIDES}\n{recipe_keys()}"
