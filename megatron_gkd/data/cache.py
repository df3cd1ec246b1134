"""A folder on disk for the tokenised rows of one source, built by one process and opened by all.

Its key is made of what the rows depend on and of nothing else: the file (path, size, time of change), the tokenizer's
content, the options, the plugins' text. `datasets` would key it by the pickled function instead, which changes between
versions of Python and misses changes of what the function calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.sources import source_files
from megatron_gkd.errors import UserError

VERSION = 3  # raise it when the same rows and options give other tokens


def fingerprint(path: str, tokenizer_hash: str, options: dict[str, Any], plugin_paths: list[str]) -> str:
    """Key (32 hex digits) of the tokenised rows of the source at `path`.

    Raises:
        UserError: the source or a plugin does not exist.
    """
    root = Path(path).resolve()
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source_files(str(root))]
    key = {
        "version": VERSION,
        "path": str(root),
        "files": stats,
        "tokenizer": tokenizer_hash,
        "options": options,
        "plugins": [_text_hash(plugin) for plugin in plugin_paths],
    }
    return _hash(json.dumps(key, sort_keys=True))


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides which ids a text gets: model, merges, added tokens, special tokens and chat template.

    Raises:
        UserError: the tokenizer is not a fast one; spans of text cannot be found in its tokens.
    """
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {type(tokenizer).__name__}: a fast tokenizer (tokenizer.json) is needed")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = tokenizer.chat_template
    return _hash(json.dumps([tokenizer.backend_tokenizer.to_str(), special, template], sort_keys=True))


@dataclass(frozen=True)
class CacheFolder:
    """Where one source's rows lie: `folder`, and beside it `folder.error` where building them failed."""

    folder: Path

    @property
    def _error_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".error")

    def build(self, write: Callable[[Path], None]) -> None:
        """Makes the folder unless it exists. `write` fills a private folder, which then takes its name in one move.

        What `write` raises is left beside the folder for the other processes, and raised.
        """
        self._error_file.unlink(missing_ok=True)
        if self.folder.exists():
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=self.folder.name + ".", dir=self.folder.parent))
        try:
            write(private)
            self._publish(private)
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._error_file.write_text(message, encoding="utf-8")
            raise
        finally:
            shutil.rmtree(private, ignore_errors=True)

    def _publish(self, private: Path) -> None:
        private.chmod(0o755)  # mkdtemp gives 0700; a shared cache is for every user of the machine
        try:
            os.replace(private, self.folder)
        except OSError:
            if not self.folder.exists():
                raise
            # another run has just built the same rows

    def open(self) -> Path:
        """The folder; UserError with the builder's own message where it failed."""
        if self._error_file.exists():
            raise UserError(self._error_file.read_text(encoding="utf-8"))
        if not self.folder.exists():
            raise UserError(f"{self.folder}: not there; dataset_cache_dir must be a folder that every process sees")
        return self.folder


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_gkd" / "datasets"


def _text_hash(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"external_plugins: {path}: no such file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
