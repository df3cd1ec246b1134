"""The reference of the recipe's keys in Markdown, from the same data as `train --help`."""

import re
from collections.abc import Mapping

from pydantic.fields import FieldInfo

from megatron_gkd.config import keys
from megatron_gkd.config.help import default_text
from megatron_gkd.config.renamed import RENAMED
from megatron_gkd.config.schema import DatasetEntry, Section, TaggedTeacher


def recipe_reference() -> str:
    """Return a heading and a table for each section, and the former names of keys."""
    blocks = [_section(section, leaves) for section, leaves in keys.SECTIONS.items()]
    return "\n".join([*blocks, _former_names()])


def _section(section: str, leaves: Mapping[str, FieldInfo]) -> str:
    meaning = (keys.SECTION_CLASSES[section].__doc__ or "").splitlines()[0]
    rows = [_row(leaf, field) for leaf, field in leaves.items()]
    notes = {
        "teacher": f"Each entry of `teachers` has the keys above, and {_entry_text(TaggedTeacher, 'tags')}.\n",
        "data": f"An entry of `dataset` and `val_dataset` is its path, or a mapping:\n\n{_list(DatasetEntry)}\n",
    }
    head = "| key | value | default | meaning |\n|---|---|---|---|"
    return "\n".join([f"## `{section}`\n", f"{meaning}\n", head, *rows, "", *filter(None, [notes.get(section)])])


def _row(leaf: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{default_text(field)}`"
    cells = (f"`{leaf}`", _escape(keys.describe_allowed(field)), default, _escape(field.description or ""))
    return f"| {' | '.join(cells)} |"


def _former_names() -> str:
    rows = [
        f"| `{section}.{old}` | `{section}.{new}` |" for section, names in RENAMED.items() for old, new in names.items()
    ]
    text = "Recipes and command lines may use them; the run then prints one line for each, with the present name."
    return "\n".join(["## Former names\n", f"{text}\n", "| former name | key |\n|---|---|", *rows, ""])


def _entry_text(entry: type[Section], leaf: str) -> str:
    return f"`{leaf}`: {entry.model_fields[leaf].description or ''}"


def _list(entry: type[Section]) -> str:
    return "\n".join(f"- {_entry_text(entry, leaf)}" for leaf in entry.model_fields)


def _escape(text: str) -> str:
    """Return text for a cell of a table, where `|` and `<` stand for themselves."""
    return re.sub(r"([|<])", r"\\\1", text)
