"""The command line's `--leaf value` pairs, which override the recipe's YAML."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_gkd.config import keys, yaml_text
from megatron_gkd.config.aliases import ALIASES, is_other_name, translate_names
from megatron_gkd.config.renamed import NEW_NAMES, rename_keys


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with its values: one after an `=`, and all arguments up to the next flag."""
    flag, values = "", list[str]()
    for argument in arguments:
        if argument.startswith("--"):
            if flag or values:
                yield flag, values
            flag, equals, first = argument.partition("=")
            values = [first] if equals else []
        else:
            values.append(argument)
    if flag or values:
        yield flag, values


def parse_value(leaf: str, texts: Sequence[str]) -> Any:
    """Return the value of the texts after a flag.

    Raises:
        ValueError: with what is wrong with them.
    """
    field = keys.find_field(leaf)
    kind = keys.type_of(field)
    if not texts:
        if kind is bool:
            return True
        raise ValueError(f"needs a value: {keys.describe_allowed(field)}")
    if len(texts) > 1 and kind is not tuple:
        raise ValueError(f"takes one value, not {len(texts)} ({' '.join(texts)})")
    if kind is str:  # not as YAML: a folder may be called 2024_01
        return None if keys.is_nullable(field) and texts[0] in ("null", "~", "") else texts[0]
    values = [yaml_text.parse(text) for text in texts]
    return values if kind is tuple and len(values) > 1 else values[0]


def parse_other(name: str, texts: Sequence[str]) -> Any:
    """Return the value of the texts after another tool's name of a setting.

    Raises:
        ValueError: with what is wrong with them.
    """
    alias = ALIASES.get(name)
    if alias is not None and alias.read is None and not alias.group:
        return parse_value(alias.leaves[0], texts)
    values = [yaml_text.parse(text) for text in texts]
    return values if len(values) > 1 else values[0] if values else True


def apply_overrides(tree: dict[str, Any], arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """Write the overrides into `tree` (section -> leaf -> value).

    Returns:
        The problems, and the leaves that they concern.
    """
    changes, problems, concerned = _read_overrides(arguments)
    doubly_named, doubtful = rename_keys(changes)
    refused, of_refused = translate_names(changes, keys.SECTION_OF, base=tree)
    doubly_named += [f"--{problem.partition('.')[2]}" for problem in refused]
    for section, values in changes.items():
        if tree.get(section) is None:  # left out, or left empty
            tree[section] = {}
        if isinstance(tree[section], dict):  # another type is a problem of the file, and reported there
            tree[section] |= values
    return problems + doubly_named, concerned | doubtful | of_refused


def _home_of(name: str) -> str:
    """Return the section of another tool's name; any will do for one without a key."""
    return keys.SECTION_OF[ALIASES[name].leaves[0]] if name in ALIASES else "train"


def _read_overrides(arguments: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str], set[str]]:
    """Return the values by section and leaf, the problems, and the leaves that these concern."""
    changes: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    concerned: set[str] = set()
    for flag, texts in _pairs(arguments):
        if not flag or flag == "--":
            problems.append(f"{' '.join(texts) or '--'}: unexpected argument; overrides are --leaf value")
            continue
        *section, name = flag.removeprefix("--").replace("-", "_").rsplit(".", 1)
        if is_other_name(name) and section in ([], [_home_of(name)]):
            try:
                changes.setdefault(_home_of(name), {})[name] = parse_other(name, texts)
            except ValueError as error:
                problems.append(f"--{name}: {error}")
            continue
        leaf = NEW_NAMES.get(name, name)
        if leaf not in keys.SECTION_OF or section not in ([], [keys.SECTION_OF[leaf]]):
            text, meant = keys.describe_unknown(section[0] if section else None, name)
            problems.append(f"--{text}")
            concerned |= {meant} if meant else set()
            continue
        try:
            changes.setdefault(keys.SECTION_OF[leaf], {})[name] = parse_value(leaf, texts)
        except ValueError as error:
            problems.append(f"--{name}: {error}")
            concerned.add(leaf)
    return changes, problems, concerned
