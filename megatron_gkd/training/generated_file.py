"""A JSONL file of answers that grows by chunks, and goes on where a run that was killed has left it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.errors import UserError
from megatron_gkd.runtime.disk import replace_text


@dataclass(frozen=True)
class GeneratedFile:
    """Rows with their number in the data set under "row", in rising order; a chunk has `chunk_rows` numbers.

    settings: all that the content depends on; beside the file they tell whether a run may go on with it.
    """

    path: Path
    chunk_rows: int
    settings: dict[str, Any]

    def resume(self) -> int:
        """Cut off what the newest chunk has, which may be incomplete. Returns the first chunk to be made.

        Raises:
            UserError: there is a file of other settings, or of another origin.
        """
        self._check_settings()
        chunk, start, position = 0, 0, 0
        if self.path.exists():
            with open(self.path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    found = self._chunk_of(line)
                    if found != chunk:
                        chunk, start = found, position
                    position += len(line)
            with open(self.path, "r+b") as file:
                file.truncate(start)
        return chunk

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add a chunk. It is on disk afterwards."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    @property
    def _settings_file(self) -> Path:
        return self.path.with_name(self.path.name + ".settings.json")

    def _check_settings(self) -> None:
        settings = {**self.settings, "chunk_rows": self.chunk_rows}
        if not self._settings_file.exists():
            if self.path.exists():
                raise UserError(f"{self.path}: exists, and not by generate; name another file")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._settings_file, json.dumps(settings, indent=2))
            return
        found = json.loads(self._settings_file.read_text(encoding="utf-8"))
        for name in sorted(found.keys() | settings.keys()):
            if found.get(name) != settings.get(name):
                raise UserError(
                    f"{self.path}: was begun with {name} = {found.get(name)}, not {settings.get(name)}; "
                    "name another file, or remove this one"
                )

    def _chunk_of(self, line: bytes) -> int:
        try:
            return int(json.loads(line)["row"]) // self.chunk_rows
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: holds a line that generate has not written: {line[:80]!r}") from error
