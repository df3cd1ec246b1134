"""A JSONL file of responses that grows by chunks; an interrupted run continues it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.errors import UserError
from megatron_gkd.runtime.disk import replace_text

PROMPTS = "prompts"
"""The setting that files lack which earlier versions have begun."""


@dataclass(frozen=True)
class GeneratedFile:
    """Rows with their number in the dataset under "row", in rising order.

    Attributes:
        path: of the file.
        chunk_rows: numbers of rows that a chunk has.
        settings: all that the content depends on; kept beside the file, to check whether a run may continue it.
    """

    path: Path
    chunk_rows: int
    settings: dict[str, Any]

    def resume(self) -> int:
        """Remove the newest chunk, which may be incomplete, and return the first chunk to write.

        Raises:
            UserError: the file has other settings, or another origin.
        """
        self._check_settings()
        chunk, start, position = 0, 0, 0
        if self.path.exists():
            with open(self.path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    line_chunk = self._chunk_of(line)
                    if line_chunk != chunk:
                        chunk, start = line_chunk, position
                    position += len(line)
            with open(self.path, "r+b") as file:
                file.truncate(start)
        return chunk

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append a chunk, and flush it to the disk."""
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
                raise UserError(f"{self.path}: exists, and was not written by generate; name another file")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._settings_file, json.dumps(settings, indent=2))
            return
        saved = json.loads(self._settings_file.read_text(encoding="utf-8"))
        if PROMPTS not in saved:
            settings.pop(PROMPTS, None)
        for name in sorted(saved.keys() | settings.keys()):
            if saved.get(name) != settings.get(name):
                raise UserError(
                    f"{self.path}: was begun with {name} = {saved.get(name)}, not {settings.get(name)}; "
                    "name another file, or remove this one"
                )

    def _chunk_of(self, line: bytes) -> int:
        try:
            return int(json.loads(line)["row"]) // self.chunk_rows
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: has a line that generate does not write: {line[:80]!r}; name another file"
            ) from error
