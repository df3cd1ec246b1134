"""The command that shows the rows of a recipe as the model reads them: data."""

import contextlib
import json
import sys

from megatron_gkd.commands.parts import Work, imports, load_recipe, print_text, take


def data(path: str, arguments: list[str], _: int) -> Work:
    """Print rows of a recipe and their lengths on one process, whatever its layout."""
    from megatron_gkd.config import commands

    options, overrides = take(arguments, commands.DATA)
    recipe = load_recipe(path, overrides, 1, commands.DATA_CHECKS)

    def work() -> None:
        with contextlib.redirect_stdout(sys.stderr):  # the progress: only the report is on stdout
            with imports():
                from megatron_gkd.training.data_report import read_split
            found = read_split(recipe, options["split"], options["show"])
        show = options["show"]
        print_text(json.dumps(found.to_json(show)) if options["json"] else "\n".join(found.lines(show)))

    return work
