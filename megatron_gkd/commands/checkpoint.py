"""The command with a run's folder: checkpoint list, verify and export."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

from megatron_gkd.commands.parts import Work, imports, load_recipe, print_text, take
from megatron_gkd.errors import CommandRefused, UserError
from megatron_gkd.training.checkpointing.inspection import InspectedRun, list_checkpoints, verify_checkpoints

ACTIONS = ("list", "verify", "export")


def checkpoint(action: str, arguments: list[str], world_size: int) -> Work:
    """List, verify or export the checkpoints of a run."""
    from megatron_gkd.config import commands

    if action not in ACTIONS:
        raise CommandRefused(f"megatron-gkd checkpoint {action}: unknown action; the actions are {', '.join(ACTIONS)}")
    options, arguments = take(arguments, commands.EXPORT) if action == "export" else ({}, arguments)
    named = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    overrides = arguments[len(named) :]
    if not 1 <= len(named) <= (1 if action == "list" else 2) or (overrides and action != "export"):
        usage = "RUN" if action == "list" else "RUN [STEP]"
        raise CommandRefused(f"megatron-gkd checkpoint {action} {' '.join(arguments)}: must be {action} {usage}")
    try:
        run = InspectedRun.find(named[0])
        if action == "list":
            return lambda: print_text(list_checkpoints(run))
        step = run.choose(named[1] if len(named) > 1 else None)
    except UserError as error:
        raise CommandRefused(str(error)) from error
    if action == "export":
        return _export(run, step, options, overrides, world_size)
    return partial(_verify, run, [step] if len(named) > 1 or run.step is not None else run.folder.steps())


def _verify(run: InspectedRun, steps: list[int]) -> None:
    intact, damaged = verify_checkpoints(run, steps)
    print_text("\n".join(intact))
    if damaged:
        raise CommandRefused("\n".join(damaged))


def _export(run: InspectedRun, step: int, options: dict[str, Any], overrides: list[str], world_size: int) -> Work:
    from megatron_gkd.config import commands

    path = str(run.output_dir / "recipe.yaml")
    recipe = load_recipe(path, [*commands.one_process(), *overrides], world_size, commands.EXPORTS)
    if options["merge"] and recipe.lora is None:
        raise CommandRefused(f"--merge: {run.output_dir} has no adapters; must be left out")
    has_adapters = recipe.lora is not None and not options["merge"]
    name = "adapters" if has_adapters else "hf"
    folder = Path(options["output"] or run.output_dir / f"{name}-step-{step:06d}")
    if folder.exists():
        raise CommandRefused(f"--output = {folder}: exists already; must be a folder that does not")

    def work() -> None:
        with imports():
            from megatron_gkd.training.export_checkpoint import export

        export(recipe, run.folder.final(step), folder, has_adapters=has_adapters)

    return work
