"""The entries of `data.dataset` and `data.val_dataset`: which rows a split has, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_gkd.config.dataset_names import DatasetName
from megatron_gkd.config.schema import DataSection, DatasetEntry
from megatron_gkd.data.plugins import Preprocessor, find_dataset, find_preprocessor
from megatron_gkd.data.selection import Selection
from megatron_gkd.data.sources.opening import parse_name

TAG_IS_DATASET = "dataset"  # the value of teacher.teacher_tag_key for which the tag of a row is the name of its source


@dataclass(frozen=True)
class EntryOptions:
    """What becomes of an entry's rows before they are checked.

    Attributes:
        columns: new names of the rows' keys, which the preprocessor reads.
        preprocessor: its name; None for none, or for that of `dataset`.
        dataset: name of the registered data set whose preprocessor is used.
        tag: the tag of all rows; None: rows may have one of their own.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    preprocessor: str | None = None
    dataset: str | None = None
    tag: str | None = None

    def find_preprocessor(self) -> Preprocessor | None:
        """Return the preprocessor, from the plugins that are loaded.

        Raises:
            UserError: it is not registered.
        """
        if self.dataset is not None and (registered := find_dataset(self.dataset)) is not None:
            return registered.preprocessor
        return find_preprocessor(self.preprocessor) if self.preprocessor else None

    def rename(self, row: dict[str, object]) -> dict[str, object]:
        """Return a row with its new keys, which replace others of these names."""
        renamed = {self.columns[key]: value for key, value in row.items() if key in self.columns and value is not None}
        kept = {key: value for key, value in row.items() if key not in self.columns}
        return kept | renamed


@dataclass(frozen=True)
class Entry:
    """A source of a split.

    Attributes:
        name: of the source.
        selection: which of its rows the split has.
        options: what becomes of them.
    """

    name: DatasetName
    selection: Selection
    options: EntryOptions


def read_entries(
    section: DataSection, split: Literal["train", "validation"], *, seed: int = 0, tag_key: str | None = None
) -> list[Entry]:
    """Return the sources of a split. Plugins must be loaded before.

    Args:
        section: the recipe's data section.
        split: "validation" has the rows of `val_dataset`, or the share `split_dataset_ratio` of the training rows.
        seed: of the run.
        tag_key: the recipe's `teacher.teacher_tag_key`.

    Raises:
        UserError: an entry is no name of a source.
    """
    ratio = section.split_dataset_ratio
    entries = section.dataset if split == "train" or ratio else section.val_dataset
    found = []
    for position, entry in enumerate(entries):
        name = parse_name(entry.path)
        selection = Selection(name.size, ratio, split, seed, position)
        found.append(Entry(name, selection, _options_of(entry, name, section, tag_key)))
    return found


def _options_of(entry: DatasetEntry, name: DatasetName, section: DataSection, tag_key: str | None) -> EntryOptions:
    registered = find_dataset(name) if entry.preprocessor is None else None
    columns: Mapping[str, str] | None = entry.columns
    if columns is None and registered is not None:
        columns = registered.columns
    return EntryOptions(
        columns=section.columns if columns is None else columns,
        preprocessor=None if registered is not None else entry.preprocessor or section.preprocessor,
        dataset=None if registered is None else registered.name,
        tag=name.text if tag_key == TAG_IS_DATASET else None,
    )
