"""The recipe's keys as data: where each leaf belongs, what it takes, and the nearest one to a wrong name."""

import difflib
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from megatron_gkd.config.durations import FORMS
from megatron_gkd.config.schema import Recipe, Section
from megatron_gkd.config.schema.base import Duration, ModuleName, PathText, ServerUrl, StopText, TokenId
from megatron_gkd.config.schema.data import Datasets


def _section_of(annotation: Any) -> type[Section]:
    """Return the class of a section, which may be null as a whole."""
    return next(member for member in (*get_args(annotation), annotation) if member is not type(None))


SECTIONS: dict[str, dict[str, FieldInfo]] = {
    name: dict(_section_of(field.annotation).model_fields) for name, field in Recipe.model_fields.items()
}
NULLABLE_SECTIONS = frozenset(name for name, field in Recipe.model_fields.items() if get_args(field.annotation))
SECTION_OF: dict[str, str] = {leaf: section for section, leaves in SECTIONS.items() for leaf in leaves}
_ENTRIES = {  # of lists, in words
    get_args(get_args(Datasets)[0])[0]: "paths or {path, weight} with weight > 0",
    PathText: "paths",
    ServerUrl: "addresses (http://host:port)",
    TokenId: "token ids",
    StopText: "texts",
    ModuleName: "module names",
}


def field_of(leaf: str) -> FieldInfo:
    """The definition of a leaf; KeyError for an unknown one."""
    return SECTIONS[SECTION_OF[leaf]][leaf]


def nearest(name: str) -> str | None:
    """The leaf whose name comes nearest to `name`, if any does."""
    matches = difflib.get_close_matches(name.replace("-", "_"), SECTION_OF, n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown(section: str | None, name: str) -> tuple[str, str | None]:
    """What to say of an unknown key, and the leaf that was probably meant. `section` is None at the recipe's root."""
    shown = f"{section}.{name}" if section else name
    if name in SECTION_OF:
        return f"{shown}: unknown key; {name} belongs in the section {SECTION_OF[name]}", name
    if section is None:
        sections = difflib.get_close_matches(name, SECTIONS, n=1)
        if sections:
            return f"{shown}: unknown section; did you mean {sections[0]}?", None
    meant = nearest(name)
    if meant is None:
        known = f"keys of {section}" if section in SECTIONS else "sections"
        return f"{shown}: unknown key; the {known} are {', '.join(SECTIONS.get(section, SECTIONS))}", None
    return f"{shown}: unknown key; did you mean {SECTION_OF[meant]}.{meant}?", meant


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone; Annotated's extras are dropped."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for each in get_args(annotation) for member in _alternatives(each))
    return (annotation,)


def is_nullable(field: FieldInfo) -> bool:
    """Whether null is a value of the field."""
    return type(None) in _alternatives(field.annotation)


def kind_of(field: FieldInfo) -> Any:
    """The field's type without null: str, int, float, bool, dict, tuple or Literal."""
    kind = next(member for member in _alternatives(field.annotation) if member is not type(None))
    return get_origin(kind) or kind


def _bounds(field: FieldInfo) -> str:
    """' in [0, 1]', ' >= 1' or nothing."""
    low = next((m for m in field.metadata if isinstance(m, Ge | Gt)), None)
    high = next((m for m in field.metadata if isinstance(m, Le | Lt)), None)
    if low and high:
        opening = f"[{low.ge}" if isinstance(low, Ge) else f"({low.gt}"
        closing = f"{high.le}]" if isinstance(high, Le) else f"{high.lt})"
        return f" in {opening}, {closing}"
    if low:
        return f" >= {low.ge}" if isinstance(low, Ge) else f" > {low.gt}"
    return ""


def allowed(field: FieldInfo) -> str:
    """What the field takes, in words: 'a number in [0, 1]', 'one of last, all', 'an integer >= 1, or null'."""
    kind = kind_of(field)
    if kind is Literal:
        choices = next(member for member in _alternatives(field.annotation) if get_origin(member) is Literal)
        text = "one of " + ", ".join(get_args(choices))
    elif Duration in get_args(field.annotation):
        text = f"a time > 0 ({FORMS})"
    elif kind is tuple:
        text = f"a list of {_ENTRIES.get(get_args(field.annotation)[0], 'mappings')}"
    else:
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", dict: "a mapping"}
        text = names[kind] + _bounds(field)
    return text + (", or null" if is_nullable(field) else "")
