"""Load a recipe: a YAML file and the command line's overrides -> a checked `Recipe`, or every problem at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_gkd.config import keys, yaml_text
from megatron_gkd.config.aliases import SECTIONS as OTHER_SECTIONS
from megatron_gkd.config.aliases import is_other_name, translate_names
from megatron_gkd.config.checks import TRAIN, CommandChecks, find_problems
from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.overrides import apply_overrides
from megatron_gkd.config.renamed import rename_keys
from megatron_gkd.config.schema import Recipe

_PLACEHOLDER = "placeholder"  # for a required leaf that is missing, so that the other checks can still be made


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int,
    require_paths: bool = True,
    command: CommandChecks = TRAIN,
) -> Recipe:
    """Read, override, validate and check a recipe. Warns with a DeprecatedKey of each key under a former name.

    Args:
        path: the YAML file.
        overrides: as on a command line: `--beta 1.0`, `--distill.beta=1.0`, `--packing`, `--dataset a b`.
        world_size: the number of processes that the layout must fit.
        require_paths: whether models, data and plugins must exist, and output_dir be writable.
        command: which checks are made.

    Raises:
        RecipeError: with all problems, one line each.
    """
    tree = _read(Path(path))
    _move_tuner_type(tree)
    problems, doubtful = rename_keys(tree)
    for found, concerned in (
        translate_names(tree, keys.SECTION_OF),
        apply_overrides(tree, overrides),
        _drop_unknown(tree),
    ):
        problems += found
        doubtful |= concerned
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
    if _is_of_another_tool(tree):
        raise RecipeError(
            [f"has no sections of a recipe but keys of another tool; megatron-gkd migrate {path} writes a recipe"]
        )
    return tree


def _is_of_another_tool(tree: dict[str, Any]) -> bool:
    """Return whether a file is a configuration of NeMo-RL, or a flat one of ms-swift or TRL."""
    if any(name in OTHER_SECTIONS for name in tree):
        return True
    is_flat = not any(name in keys.SECTIONS for name in tree)
    return is_flat and any(is_other_name(str(name)) or name in keys.SECTION_OF for name in tree)


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


def _drop_unknown(tree: dict[str, Any]) -> tuple[list[str], set[str]]:
    """Remove unknown sections and keys from `tree`, and add missing sections.

    Returns:
        The problems, and the leaves that were probably meant.
    """
    problems: list[str] = []
    concerned: set[str] = set()

    def report(section: str | None, name: Any) -> None:
        text, meant = keys.describe_unknown(section, str(name))
        problems.append(text)
        concerned.update({meant} if meant else ())

    for name in [name for name in tree if name not in keys.SECTIONS]:
        report(None, name)
        del tree[name]
    for section, leaves in keys.SECTIONS.items():
        content = tree.get(section)
        if content is None and section in keys.NULLABLE_SECTIONS:
            continue
        if content is not None and not isinstance(content, dict):
            problems.append(f"{section} = {_show(content)}: must be a mapping with the keys {', '.join(leaves)}")
            concerned.update(leaves)
        tree[section] = content if isinstance(content, dict) else {}
        for name in [name for name in tree[section] if name not in leaves]:
            report(section, name)
            del tree[section][name]
    return problems, concerned


def _drop_invalid(tree: dict[str, Any], doubtful: set[str]) -> list[str]:
    """Replace what the schema refuses by defaults, and add it to `doubtful`, whose leaves may be missing.

    Returns:
        The problems, at most one of a leaf: a list may have several bad entries.
    """
    try:
        Recipe.model_validate(tree)
    except ValidationError as invalid:
        errors = {str(error["loc"][1]): error for error in reversed(invalid.errors())}  # by leaf
        is_missing = {leaf: one["type"] == "missing" and len(one["loc"]) == 2 for leaf, one in errors.items()}
    else:
        return []
    problems: list[str] = []
    for leaf in sorted(is_missing, key=list(keys.SECTION_OF).index):
        name, field = f"{keys.SECTION_OF[leaf]}.{leaf}", keys.find_field(leaf)
        section, allowed = tree[keys.SECTION_OF[leaf]], keys.describe_allowed(field)
        if errors[leaf]["type"] == "path":
            allowed = errors[leaf]["msg"]
        if not is_missing[leaf]:
            problems.append(f"{name} = {_show(section.pop(leaf))}: must be {allowed}")
        elif leaf not in doubtful:
            problems.append(f"{name}: missing; must be {allowed} ({field.description})")
        if field.is_required():
            section[leaf] = _PLACEHOLDER
    doubtful.update(is_missing)
    return problems


def _show(value: Any) -> str:
    """Return a value on one line, as YAML would write it inside a list."""
    if isinstance(value, bool) or value is None:
        return yaml_text.dump(value).split("\n")[0]
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
