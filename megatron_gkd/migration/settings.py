"""Settings of ms-swift and TRL by their flat names, and the recipe's leaves that they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gkd.config import keys, yaml_text
from megatron_gkd.config.aliases import VALUES, alias_values, is_other_name
from megatron_gkd.config.overrides import parse_other, parse_value
from megatron_gkd.migration.draft import Draft
from megatron_gkd.migration.script import is_unknown


@dataclass(frozen=True)
class Texts:
    """The words after an option, which become a value of its type when its name is known."""

    words: tuple[str, ...]


def read_options(words: Iterable[str], draft: Draft) -> dict[str, Any]:
    """Return the words after each option of a command line; those with variables of the shell are skipped."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            option, equals, first = word[2:].partition("=")
            name = option.replace("-", "_")
            found[name] = [first] if equals and first else []
        elif name:
            found[name].append(word)
        else:
            draft.skip(word, "", "an argument without an option before it")
    for name, texts in list(found.items()):
        if any(map(is_unknown, texts)):
            draft.skip(f"--{name}", found.pop(name), "has a variable or command that only a shell can expand")
    return {name: Texts(tuple(texts)) for name, texts in found.items()}


def value_of(given: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return a setting's value as YAML reads it."""
    value = given.get(name, default)
    if not isinstance(value, Texts):
        return value
    try:
        values = [yaml_text.parse(word) for word in value.words]
    except ValueError:
        return " ".join(value.words)
    return values if len(values) > 1 else values[0] if values else True


def numbers_of(given: Mapping[str, Any], *names: str) -> list[int]:
    """Return the values of settings that are whole numbers >= 1; 1 for any other."""
    values = [value_of(given, name) for name in names]
    return [value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1 for value in values]


def translate(given: Mapping[str, Any], draft: Draft, prefix: str = "--") -> None:
    """Write the settings to the draft whose names are the recipe's or aliases; note the others.

    Args:
        given: values or texts by name.
        draft: the recipe.
        prefix: what the tool writes before names.
    """
    others: dict[str, Any] = {}
    for name, value in given.items():
        try:
            if name in keys.SECTION_OF:
                draft.leaves[name] = _own(name, parse_value(name, value.words) if isinstance(value, Texts) else value)
            elif is_other_name(name):
                others[name] = parse_other(name, value.words) if isinstance(value, Texts) else value
            else:
                draft.skip(prefix + name, value_of(given, name), "unknown; no key of a recipe has this name")
        except ValueError as error:
            draft.skip(prefix + name, value_of(given, name), str(error))
    found = alias_values(others)
    for name, reason in found.refused.items():
        draft.skip(prefix + name, others[name], reason)
    for leaf, value in found.values.items():
        name = found.origins[leaf]
        if isinstance(value, dict) and isinstance(draft.leaves.get(leaf), dict):
            draft.leaves[leaf] = draft.leaves[leaf] | value
        elif leaf in draft.leaves:
            draft.skip(prefix + name, others[name], f"{leaf} is set, too")
        else:
            draft.leaves[leaf] = _own(leaf, value)


def _own(leaf: str, value: Any) -> Any:
    """Return a value of a leaf as the recipe has it: other tools' words, lists of one, and mappings that are JSON."""
    kind = keys.type_of(keys.find_field(leaf))
    if isinstance(value, str) and kind is dict:
        return yaml_text.parse(value)
    if kind is tuple and value is not None and not isinstance(value, list):
        return [value]
    if leaf in VALUES and isinstance(value, str | int) and not isinstance(value, bool):
        return VALUES[leaf].get(value, value)
    return value
