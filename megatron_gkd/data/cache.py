"""A folder on disk for the tokenized rows of one source, built by one process of a node and opened by all.

Its key depends on exactly what the rows depend on: the file (path, size, time of change), the tokenizer's
content, the options, the plugins' text. `datasets` would key it by the pickled function instead, which changes between
versions of Python and misses changes of what the function calls.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_gkd.errors import UserError
from megatron_gkd.runtime.disk import publish

VERSION = 5  # raise it when the same rows and options give other tokens


def fingerprint(
    name: str, state: list[Any], tokenizer_hash: str, options: dict[str, Any], plugin_paths: list[str]
) -> str:
    """Return the key (32 hex digits) of the tokenized rows of a source.

    Args:
        name: of the source; the absolute one of a path.
        state: what changes when its rows do; see `describe_source`.
        tokenizer_hash: see `hash_tokenizer`.
        options: all else that the samples depend on.
        plugin_paths: plugins, whose text counts.

    Raises:
        UserError: a plugin does not exist.
    """
    key = {
        "version": VERSION,
        "path": name,
        "files": state,
        "tokenizer": tokenizer_hash,
        "options": options,
        "plugins": [hash_plugin(plugin) for plugin in plugin_paths],
    }
    return _hash(json.dumps(key, sort_keys=True))


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all that determines the ids of a text: model, merges, added tokens, special tokens and chat template.

    Raises:
        UserError: the tokenizer is not a fast one, so spans of text cannot be mapped to its tokens.
    """
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {type(tokenizer).__name__}: a fast tokenizer (tokenizer.json) is needed")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = tokenizer.chat_template
    return _hash(json.dumps([tokenizer.backend_tokenizer.to_str(), special, template], sort_keys=True))


@dataclass(frozen=True)
class CacheFolder:
    """The folder of one source's rows, which is built in `folder.unfinished` beside it."""

    folder: Path

    @property
    def _unfinished(self) -> Path:
        return self.folder.with_name(self.folder.name + ".unfinished")

    def build(self, write: Callable[[Path, Path], None]) -> None:
        """Build the folder unless it exists. One process at a time builds it, while others wait.

        Args:
            write: called with two folders. The first is for finished parts, which may remain from an earlier build that
                was killed. The second is empty and becomes the cache folder.

        Raises:
            UserError: the cache cannot be written.
        """
        while not self.folder.exists():
            try:
                self._unfinished.mkdir(parents=True, exist_ok=True)
                lock = _Lock.acquire(self._unfinished / "lock")
            except OSError as error:
                raise UserError(
                    f"data.dataset_cache_dir = {self.folder.parent}: cannot be written ({error}); name a folder that "
                    "this user may write to"
                ) from error
            with lock:
                if lock.is_current() and not self.folder.exists():
                    self._build(write)

    def _build(self, write: Callable[[Path, Path], None]) -> None:
        parts = self._unfinished / "parts"
        parts.mkdir(exist_ok=True)
        out = Path(tempfile.mkdtemp(prefix="out.", dir=self._unfinished))
        out.chmod(0o755)  # mkdtemp gives 0700; a shared cache is for every user of the machine
        try:
            write(parts, out)
            publish(out, self.folder)
        except Exception:
            shutil.rmtree(out, ignore_errors=True)
            if not self.folder.exists():  # another process may have built it, where the file system has no locks
                if not any(parts.iterdir()):
                    shutil.rmtree(self._unfinished, ignore_errors=True)
                raise
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def is_visible(self, until: float) -> bool:
        """Return whether the folder becomes visible before `time.monotonic()` is `until`.

        On a network file system that may be later than it was written.
        """
        while not self.folder.exists():
            if time.monotonic() >= until:
                return False
            time.sleep(0.1)
            if self.folder.parent.exists():
                os.listdir(self.folder.parent)  # makes the file system's client read the folder again
        return True


@dataclass(frozen=True)
class _Lock:
    """An exclusive lock on a file, which the operating system releases if the process dies.

    File systems without locks have none: two builders then do the same work side by side.
    """

    path: Path
    descriptor: int

    @classmethod
    def acquire(cls, path: Path) -> _Lock:
        """Wait for the lock and take it."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(descriptor)
                raise
        return cls(path, descriptor)

    def is_current(self) -> bool:
        """Return whether the locked file still has its name, which the previous holder may have removed."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # also for processes that have inherited the file
        os.close(self.descriptor)


def default_cache_dir() -> Path:
    """Return the folder of the caches where the recipe sets none."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_gkd" / "datasets"


def hash_texts(texts: Iterable[str]) -> str:
    """Return one hash of several texts in this order."""
    return _hash(json.dumps(list(texts)))


def hash_plugin(path: str) -> str:
    """Return a hash of a plugin's text.

    Raises:
        UserError: it does not exist.
    """
    if not Path(path).is_file():
        raise UserError(f"external_plugins: {path}: no such file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
