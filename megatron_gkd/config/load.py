"""A YAML file and the command line's overrides -> a checked `Recipe`, or every problem at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_gkd.config import keys, yaml_text
from megatron_gkd.config.checks import TRAIN, CommandChecks, find_problems
from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.overrides import apply_overrides
from megatron_gkd.config.renamed import rename_keys
from megatron_gkd.config.schema import Recipe

_STAND_IN = "stand-in"  # for a required leaf that is missing, so that the other checks can still be made


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int,
    require_paths: bool = True,
    command: CommandChecks = TRAIN,
) -> Recipe:
    """Read, override, validate and cross-check a recipe.

    path: the YAML file.
    overrides: as they stand on a command line: `--beta 1.0`, `--distill.beta=1.0`, `--packing`, `--dataset a b`.
    world_size: the number of processes that the layout must fit.
    require_paths: whether models, data and plugins must exist, and output_dir be writable.
    command: what is asked of the recipe for this command.
    Raises RecipeError with all problems, one line each.
    """
    tree = _read(Path(path))
    _move_tuner_type(tree)
    problems, doubtful = rename_keys(tree)
    wrong_overrides, concerned = apply_overrides(tree, overrides)
    problems += wrong_overrides
    doubtful |= concerned
    problems += _drop_unknown(tree, doubtful)
    problems += _drop_invalid(tree, doubtful)
    recipe = Recipe.model_validate(tree)
    problems += find_problems(recipe, world_size, command=command, doubtful=doubtful, require_paths=require_paths)
    if problems:
        raise RecipeError(problems)
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml_text.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError([f"can't be read: {error.strerror}"]) from error
    except ValueError as error:
        raise RecipeError([f"not YAML: {error}"]) from error
    if not isinstance(tree, dict):
        raise RecipeError([f"must hold the sections {', '.join(keys.SECTIONS)}"])
    return tree


def _move_tuner_type(tree: dict[str, Any]) -> None:
    """Accept `tuner_type` in the section lora, too, unless it is in both."""
    lora = tree.get("lora")
    if isinstance(lora, dict) and "tuner_type" in lora:
        if tree.get("train") is None:
            tree["train"] = {}
        train = tree["train"]
        if isinstance(train, dict) and "tuner_type" not in train:
            train["tuner_type"] = lora.pop("tuner_type")
            if not lora and train["tuner_type"] == "full":
                del tree["lora"]


def _drop_unknown(tree: dict[str, Any], doubtful: set[str]) -> list[str]:
    """Take unknown sections and keys out of `tree`, add missing sections; the leaves meant become doubtful."""
    problems: list[str] = []

    def report(section: str | None, name: str) -> None:
        text, meant = keys.unknown(section, str(name))
        problems.append(text)
        doubtful.update({meant} if meant else ())

    for name in [name for name in tree if name not in keys.SECTIONS]:
        report(None, name)
        del tree[name]
    for section, leaves in keys.SECTIONS.items():
        content = tree.get(section)
        if content is None and section in keys.NULLABLE_SECTIONS:
            continue
        if content is not None and not isinstance(content, dict):
            problems.append(f"{section} = {_shown(content)}: must be a mapping with the keys {', '.join(leaves)}")
            doubtful.update(leaves)
        tree[section] = content if isinstance(content, dict) else {}
        for name in [name for name in tree[section] if name not in leaves]:
            report(section, name)
            del tree[section][name]
    return problems


def _drop_invalid(tree: dict[str, Any], doubtful: set[str]) -> list[str]:
    """Replace what the schema refuses by defaults, and add it to `doubtful`, whose leaves may be missing."""
    try:
        Recipe.model_validate(tree)
    except ValidationError as invalid:
        errors = invalid.errors()
    else:
        return []
    problems: list[str] = []
    leaves: set[str] = set()
    for error in errors:
        section, leaf, *rest = error["loc"]
        first = leaf not in leaves  # a list may have several bad entries, a union several complaints: one line a leaf
        leaves.add(leaf)
        field = keys.field_of(leaf)
        if error["type"] == "missing" and not rest:
            tree[section][leaf] = _STAND_IN
            if leaf not in doubtful:
                problems.append(f"{section}.{leaf}: missing; must be {keys.allowed(field)} ({field.description})")
        elif first:
            problems.append(f"{section}.{leaf} = {_shown(tree[section][leaf])}: must be {keys.allowed(field)}")
    for leaf in leaves:
        section = tree[keys.SECTION_OF[leaf]]
        if section[leaf] is not _STAND_IN:
            section.pop(leaf)
            if keys.field_of(leaf).is_required():
                section[leaf] = _STAND_IN
    doubtful |= leaves
    return problems


def _shown(value: Any) -> str:
    """A value on one line, as YAML would write it inside a list."""
    if isinstance(value, bool) or value is None:
        return yaml_text.dump(value).split("\n")[0]
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
