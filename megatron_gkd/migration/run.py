"""Write a recipe from another tool's script or configuration."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.config import keys, yaml_text
from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.load import load
from megatron_gkd.errors import UserError
from megatron_gkd.migration.draft import Draft
from megatron_gkd.migration.nemo import read_nemo
from megatron_gkd.migration.nemo_config import read_nemo_config
from megatron_gkd.migration.processes import read_processes
from megatron_gkd.migration.settings import read_options, value_of
from megatron_gkd.migration.source import NAMES, Source, read_settings, read_source
from megatron_gkd.migration.swift import read_swift
from megatron_gkd.migration.trl import read_trl


@dataclass(frozen=True)
class Migration:
    """A recipe and what its user has to know.

    Attributes:
        text: the recipe.
        lines: the report, line by line.
        processes: the number of processes that it is for.
    """

    text: str
    lines: list[str]
    processes: int


def migrate(path: Path, tool: str | None, output: Path) -> Migration:
    """Return the recipe of a script or configuration.

    Args:
        path: the file.
        tool: swift, trl or nemo; None to find it out.
        output: where the recipe will be.

    Raises:
        UserError: the file can't be read, or has no settings of a tool.
    """
    source = read_source(path, tool)
    draft = Draft()
    read_processes(source.environment, source.launcher, draft)
    _read(source, draft)
    draft.drop_keys_of_other_engines()
    missing = draft.drop_invalid()
    place = f" ({source.place})" if source.place else ""
    head = f"# Written by megatron-gkd migrate from {path.name}{place}, {NAMES[source.tool]}."
    report = list(_report(source, draft, missing, output))
    return Migration(f"{head}\n{yaml_text.dump(draft.tree())}", report, draft.processes)


def write(migration: Migration, output: Path) -> list[str]:
    """Write the recipe; return the report, with what is wrong with it apart from files that may be elsewhere.

    Raises:
        UserError: the file exists, or can't be written.
    """
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(migration.text)
    except OSError as error:
        raise UserError(f"--output = {output}: can't be written: {error.strerror}") from error
    try:
        load(output, world_size=migration.processes, require_paths=False)
    except RecipeError as error:
        return [*migration.lines, "\nTo correct:", *(f"  {problem}" for problem in error.problems)]
    return migration.lines


def _read(source: Source, draft: Draft) -> None:
    if source.tool == "nemo":
        _read_nemo(source, draft)
        return
    given: dict[str, Any] = dict(source.settings)
    options = read_options(source.options, draft)
    config = value_of(options, "config")
    if isinstance(config, str):
        del options["config"]
        file = next((one for one in (Path(config), source.path.parent / config) if one.is_file()), None)
        if file is None:
            draft.skip("--config", config, "there is no such file; its settings are not known")
        else:
            given |= read_settings(file)
    given |= options
    if source.tool == "swift":
        kind = value_of(given, "rlhf_type", "gkd")
        if kind != "gkd":
            raise UserError(f"{source.path}: --rlhf_type = {kind}: must be gkd")
        read_swift(given, draft, is_megatron=source.is_megatron, environment=source.environment)
    else:
        environment = given.pop("env", None)
        if isinstance(environment, dict):
            read_processes({str(name): str(value) for name, value in environment.items()}, (), draft)
        read_trl(given, draft, "--" if source.options else "")


def _read_nemo(source: Source, draft: Draft) -> None:
    path, overrides = source.path, [word for word in source.options if "=" in word and not word.startswith("--")]
    if source.options or source.launcher:
        words = [word for word in source.options if word not in overrides]
        config = value_of(read_options(words, draft), "config")
        if not isinstance(config, str):
            raise UserError(f"{source.path}: {source.place}: has no --config FILE.yaml")
        candidates = (Path(config), source.path.parent / config)
        path = next((one for one in candidates if one.is_file()), candidates[0])
    tree, missing = read_nemo_config(path, overrides)
    for base in missing:
        draft.skip("defaults", base, "there is no such file beside the configuration; its settings are not known")
    read_nemo(tree, draft)


def _report(source: Source, draft: Draft, missing: list[str], output: Path) -> Iterator[str]:
    """Yield the lines of the report, without those of the checks."""
    yield f"{output}: written, from {NAMES[source.tool]}'s settings in {source.path}"
    if draft.skipped:
        yield "\nNot carried over:"
        yield from (f"  {one}" for one in draft.skipped)
    if draft.notes:
        yield "\nDifferent here:"
        yield from (f"  {note}" for note in draft.notes)
    if missing:
        yield "\nTo add:"
        yield from (f"  {keys.SECTION_OF[leaf]}.{leaf}: {keys.find_field(leaf).description}" for leaf in missing)
    yield "\nTo start it:"
    yield f"  {start_command(draft, output)}"
    if draft.nproc is None:
        yield "  (the number of processes is not in the file; global_batch_size and the layout may depend on it)"


def start_command(draft: Draft, output: Path) -> str:
    """Return the command line that trains with the recipe."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in draft.environment.items()]
    nodes = [f"--nnodes {draft.nodes} --rdzv HOST:29400"] if draft.nodes > 1 else []
    command = f"megatron-gkd train {shlex.quote(str(output))} --nproc {draft.nproc or 1}"
    return " ".join([*variables, command, *nodes])
