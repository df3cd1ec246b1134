"""The recipe's keys as data: the section of each leaf, its type and bounds, and the nearest one to a wrong name."""

import difflib
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from megatron_gkd.config.aliases import ALIASES, UNSUPPORTED
from megatron_gkd.config.durations import FORMS
from megatron_gkd.config.schema import Recipe, Section
from megatron_gkd.config.schema.base import Duration, ModuleName, PathText, ServerUrl, StopText, TokenId
from megatron_gkd.config.schema.data import Datasets
from megatron_gkd.config.schema.parallel import RecomputedModule


def _section_class(annotation: Any) -> type[Section]:
    """Return the class of a section, which may be null as a whole."""
    return next(member for member in (*get_args(annotation), annotation) if member is not type(None))


SECTION_CLASSES: dict[str, type[Section]] = {
    name: _section_class(field.annotation) for name, field in Recipe.model_fields.items()
}
SECTIONS: dict[str, dict[str, FieldInfo]] = {name: dict(one.model_fields) for name, one in SECTION_CLASSES.items()}
NULLABLE_SECTIONS = frozenset(name for name, field in Recipe.model_fields.items() if get_args(field.annotation))
SECTION_OF: dict[str, str] = {leaf: section for section, leaves in SECTIONS.items() for leaf in leaves}
_ENTRIES = {  # of lists, in words
    get_args(get_args(Datasets)[0])[0]: "paths or {path, weight} with weight > 0",
    PathText: "paths",
    ServerUrl: "addresses (http://host:port, also with a path)",
    TokenId: "token ids",
    StopText: "texts",
    ModuleName: "module names",
    RecomputedModule: "modules (" + ", ".join(get_args(RecomputedModule)) + ")",
}


def find_field(leaf: str) -> FieldInfo:
    """Return the definition of a leaf.

    Raises:
        KeyError: there is no such leaf.
    """
    return SECTIONS[SECTION_OF[leaf]][leaf]


def describe_unknown(section: str | None, name: str) -> tuple[str, str | None]:
    """Return the problem of an unknown key, and the leaf that was probably meant.

    Args:
        section: the section that the key is in; None at the recipe's root.
        name: the key.
    """
    shown = f"{section}.{name}" if section else name
    if name in SECTION_OF:
        return f"{shown}: unknown key; {name} belongs in the section {SECTION_OF[name]}", name
    if name in ALIASES:
        leaf = ALIASES[name].leaves[0]
        key = f"{SECTION_OF[leaf]}.{leaf}"
        return f"{shown}: is another name of {key}; it belongs in the section {SECTION_OF[leaf]}", leaf
    if name in UNSUPPORTED:
        return f"{shown}: not supported; {UNSUPPORTED[name].reason}", None
    if section is None:
        sections = difflib.get_close_matches(name, SECTIONS, n=1)
        if sections:
            return f"{shown}: unknown section; did you mean {sections[0]}?", None
    near = _nearest(section, name.replace("-", "_"))
    if near is not None:
        leaf = near if near in SECTION_OF else ALIASES[near].leaves[0]
        other = "" if near == leaf else f"{near}, another name of "
        return f"{shown}: unknown key; did you mean {other}{SECTION_OF[leaf]}.{leaf}?", leaf
    if section is not None and section in SECTIONS:
        return f"{shown}: unknown key; the keys of {section} are {', '.join(SECTIONS[section])}", None
    return f"{shown}: unknown key; the sections are {', '.join(SECTIONS)}", None


def _nearest(section: str | None, name: str) -> str | None:
    """Return the leaf or alias that a wrong name is nearly, rather of its own section; None if there is none."""

    def nearness(candidate: str) -> float:
        leaf = candidate if candidate in SECTION_OF else ALIASES[candidate].leaves[0]
        ratio = difflib.SequenceMatcher(a=name, b=candidate).ratio()
        return ratio + 0.1 if SECTION_OF[leaf] == section else ratio

    best = max([*SECTION_OF, *ALIASES], key=nearness)
    return best if nearness(best) >= 0.8 else None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone, without the extras of Annotated."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for each in get_args(annotation) for member in _alternatives(each))
    return (annotation,)


def is_nullable(field: FieldInfo) -> bool:
    """Return whether null is a value of the field."""
    return type(None) in _alternatives(field.annotation)


def type_of(field: FieldInfo) -> Any:
    """Return the field's type without null: str, int, float, bool, dict, tuple or Literal."""
    found = next(member for member in _alternatives(field.annotation) if member is not type(None))
    return get_origin(found) or found


def _describe_bounds(field: FieldInfo) -> str:
    """Return ' in [0, 1]', ' >= 1' or nothing."""
    low = next((m for m in field.metadata if isinstance(m, Ge | Gt)), None)
    high = next((m for m in field.metadata if isinstance(m, Le | Lt)), None)
    if low and high:
        opening = f"[{low.ge}" if isinstance(low, Ge) else f"({low.gt}"
        closing = f"{high.le}]" if isinstance(high, Le) else f"{high.lt})"
        return f" in {opening}, {closing}"
    if low:
        return f" >= {low.ge}" if isinstance(low, Ge) else f" > {low.gt}"
    return ""


def describe_allowed(field: FieldInfo) -> str:
    """Return what the field takes, in words: 'a number in [0, 1]', 'one of last, all', 'an integer >= 1, or null'."""
    kind = type_of(field)
    if kind is Literal:
        choices = next(member for member in _alternatives(field.annotation) if get_origin(member) is Literal)
        text = "one of " + ", ".join(get_args(choices))
    elif Duration in get_args(field.annotation) or any(one in field.metadata for one in get_args(Duration)[1:]):
        text = f"a time > 0 ({FORMS})"
    elif kind is tuple:
        text = f"a list of {_ENTRIES.get(get_args(field.annotation)[0], 'mappings')}"
    else:
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", dict: "a mapping"}
        text = names[kind] + _describe_bounds(field)
    return text + (", or null" if is_nullable(field) else "")
