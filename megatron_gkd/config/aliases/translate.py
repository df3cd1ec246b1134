"""Put the recipe's keys in place of other tools' names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_gkd.config import yaml_text
from megatron_gkd.config.aliases.entry import Values
from megatron_gkd.config.aliases.held import HELD
from megatron_gkd.config.aliases.names import ALIASES, VALUES
from megatron_gkd.config.aliases.readers import GROUPS
from megatron_gkd.config.aliases.unsupported import UNSUPPORTED

MAPPINGS = ("chat_template_kwargs", "vllm_engine_kwargs")
"""Leaves of which an alias sets one entry."""


@dataclass
class Translation:
    """What names of other tools become.

    Attributes:
        values: by leaf.
        origins: by leaf, the name that it comes from.
        refused: by name, what is wrong with it.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, values: Values) -> None:
        """Add the values of a name; those of a leaf that is a mapping are joined."""
        for leaf, value in values.items():
            if leaf in MAPPINGS and leaf in self.values:
                self.values[leaf] = self.values[leaf] | value
            elif leaf in self.values:
                self.refused[name] = f"is another name of {leaf}, as {self.origins[leaf]} is; remove one of the two"
            else:
                self.values[leaf], self.origins[leaf] = value, name


def is_other_name(name: str) -> bool:
    """Return whether a name is one of the tables of other tools' names."""
    return name in ALIASES or name in HELD or name in UNSUPPORTED


def alias_values(given: Mapping[str, Any]) -> Translation:
    """Return what values of aliases, held and unsupported settings become."""
    result = Translation()
    for name, value in given.items():
        if name in HELD:
            problem = _not_held(name, value)
            if problem:
                result.refused[name] = problem
        elif name in UNSUPPORTED:
            result.refused[name] = f"not supported; {UNSUPPORTED[name].reason}"
    for names in _grouped([name for name in given if name in ALIASES]):
        alias = ALIASES[names[0]]
        try:
            if alias.group:
                values = GROUPS[alias.group]({name: given[name] for name in names})
            else:
                values = alias.read(given[names[0]]) if alias.read else {alias.leaves[0]: given[names[0]]}
        except ValueError as error:
            result.refused[names[-1]] = str(error)
        else:
            result.add(names[-1], values)
    return result


def _grouped(names: list[str]) -> list[list[str]]:
    """Return the names, those of a group together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(ALIASES[name].group or name, []).append(name)
    return list(groups.values())


def _not_held(name: str, value: Any) -> str | None:
    """Return what is wrong with a value of a held setting."""
    held = HELD[name]
    given = value.lower() if isinstance(value, str) else value
    given = {"true": True, "false": False}.get(given, given) if isinstance(given, str) else given
    if any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in held.values):
        return None
    allowed = " or ".join(yaml_text.dump(one).split("\n")[0] for one in held.values)
    return f"must be {allowed}: {held.reason}" + (f"; {held.otherwise}" if held.otherwise else "")


def translate_names(
    tree: dict[str, Any], section_of: Mapping[str, str], *, base: Mapping[str, Any] | None = None
) -> tuple[list[str], set[str]]:
    """Put keys in place of other tools' names in `tree` (section -> leaf -> value).

    Args:
        tree: the recipe, or the changes of a command line; is changed.
        section_of: the section of each leaf.
        base: the recipe that the changes are made to, to whose mappings entries are added.

    Returns:
        The problems, and the leaves that they concern.
    """
    problems: list[str] = []
    concerned: set[str] = set()
    given: dict[str, Any] = {}
    places: dict[str, str] = {}
    for section, content in tree.items():
        if not isinstance(content, dict):
            continue
        for name in [name for name in content if isinstance(name, str) and _is_at_home(name, section, section_of)]:
            given[name], places[name] = content.pop(name), section
        _translate_values(content)
    found = alias_values(given)
    for name, problem in found.refused.items():
        problems.append(f"{places[name]}.{name} = {_show(given[name])}: {problem}")
        concerned.update(ALIASES[name].leaves if name in ALIASES else ())
    for leaf, value in found.values.items():
        section, name = section_of[leaf], found.origins[leaf]
        content = tree.get(section)
        if content is None:
            content = tree[section] = {}
        if not isinstance(content, dict):
            continue  # reported where sections are checked
        if leaf in MAPPINGS:
            content[leaf] = _joined(content.get(leaf, _of(base, section, leaf)), value)
        elif leaf in content:
            problem = f"is another name of {section}.{leaf}; remove one of the two"
            problems.append(f"{places[name]}.{name} = {_show(given[name])}: {problem}")
            concerned.add(leaf)
        else:
            content[leaf] = value
    return problems, concerned


def _is_at_home(name: str, section: str, section_of: Mapping[str, str]) -> bool:
    if name in ALIASES:
        return section_of[ALIASES[name].leaves[0]] == section
    return name in HELD or name in UNSUPPORTED


def _translate_values(content: dict[str, Any]) -> None:
    """Replace other tools' values of keys that they name as the recipe does."""
    for leaf, values in VALUES.items():
        if leaf in content and isinstance(content[leaf], str | int) and not isinstance(content[leaf], bool):
            content[leaf] = values.get(content[leaf], content[leaf])


def _of(base: Mapping[str, Any] | None, section: str, leaf: str) -> Any:
    content = (base or {}).get(section)
    return content.get(leaf) if isinstance(content, dict) else None


def _joined(known: Any, entries: dict[str, Any]) -> Any:
    """Return a mapping with further entries; anything else is reported by the schema."""
    return {**known, **entries} if isinstance(known, dict) else entries if known is None else known


def _show(value: Any) -> str:
    return yaml_text.dump(value).split("\n")[0] if isinstance(value, bool) or value is None else str(value)
