"""Settings of NeMo-RL by dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_gkd.migration.nemo_tables import SILENT, WITHOUT_MEANING


class NemoSettings:
    """The settings of a configuration; those that were read are known."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree
        self.seen: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting, which is then read."""
        self.seen.add(name)
        found: Any = self.tree
        for part in name.split("."):
            if not isinstance(found, dict) or part not in found:
                return default
            found = found[part]
        return found

    def number(self, name: str) -> int | None:
        """Return a setting that is a whole number >= 1; None for any other."""
        value = self.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def unread(self) -> dict[str, Any]:
        """Return the settings that were not read and have a value, by dotted names."""
        return dict(self._walk(self.tree, ""))

    def _walk(self, tree: dict[str, Any], place: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            name = f"{place}{key}"
            if name in self.seen or name in WITHOUT_MEANING or value is None or value in ([], {}):
                continue
            if isinstance(value, dict):
                yield from self._walk(value, f"{name}.")
            elif value not in SILENT.get(name, ()):
                yield name, value
