"""The command that writes a recipe from another tool's settings: migrate."""

from pathlib import Path

from megatron_gkd.commands.parts import Work, print_text, take
from megatron_gkd.errors import CommandRefused, UserError


def migrate(path: str, arguments: list[str], _: int) -> Work:
    """Write a recipe from a script or configuration of ms-swift, TRL or NeMo-RL."""
    from megatron_gkd.config import commands
    from megatron_gkd.migration.run import migrate as read
    from megatron_gkd.migration.run import write

    options, others = take(arguments, commands.MIGRATE)
    if others:
        raise CommandRefused(f"megatron-gkd migrate {others[0]}: unknown; the options are --from, --output")
    output = Path(options["output"])
    if output.exists():
        raise CommandRefused(f"--output = {output}: exists already; must be a file that does not")
    try:
        found = read(Path(path), options["from"], output)
    except UserError as error:
        raise CommandRefused(str(error)) from error
    return lambda: print_text("\n".join(write(found, output)))
