"""The command line's `--leaf value` pairs, laid over the recipe's YAML."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_gkd.config import keys, yaml_text
from megatron_gkd.config.renamed import NEW_NAMES, rename_keys


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(flag, its values); an `=` ends the flag, and what follows up to the next flag are further values."""
    flag, values = "", []
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


def _parse(leaf: str, texts: Sequence[str]) -> Any:
    """The value that the texts after a flag stand for. Raises ValueError with what is wrong."""
    field = keys.field_of(leaf)
    kind = keys.kind_of(field)
    if not texts:
        if kind is bool:
            return True
        raise ValueError(f"needs a value: {keys.allowed(field)}")
    if len(texts) > 1 and kind is not tuple:
        raise ValueError(f"takes one value, not {len(texts)} ({' '.join(texts)})")
    if kind is str:  # as it stands: a folder may be called 2024_01
        return None if keys.is_nullable(field) and texts[0] in ("null", "~", "") else texts[0]
    values = [yaml_text.parse(text) for text in texts]
    return values if kind is tuple and len(values) > 1 else values[0]


def apply_overrides(tree: dict[str, Any], arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """Write the overrides into `tree` (section -> leaf -> value). Returns the problems, and the leaves they concern."""
    problems: list[str] = []
    concerned: set[str] = set()
    changes: dict[str, dict[str, Any]] = {}
    for flag, texts in _pairs(arguments):
        if not flag or flag == "--":
            problems.append(f"{' '.join(texts) or '--'}: unexpected argument; overrides are --leaf value")
            continue
        *section, leaf = flag.removeprefix("--").replace("-", "_").rsplit(".", 1)
        field = NEW_NAMES.get(leaf, leaf)
        if field not in keys.SECTION_OF or section not in ([], [keys.SECTION_OF[field]]):
            text, meant = keys.unknown(section[0] if section else None, leaf)
            problems.append(f"--{text}")
            concerned |= {meant} if meant else set()
            continue
        try:
            changes.setdefault(keys.SECTION_OF[field], {})[leaf] = _parse(field, texts)
        except ValueError as error:
            problems.append(f"--{leaf}: {error}")
            concerned.add(field)
    doubly_named, doubtful = rename_keys(changes)
    for section_name, values in changes.items():
        if tree.get(section_name) is None:  # left out, or left empty
            tree[section_name] = {}
        if isinstance(tree[section_name], dict):  # another type is a problem of the file, and reported there
            tree[section_name] |= values
    return problems + doubly_named, concerned | doubtful
