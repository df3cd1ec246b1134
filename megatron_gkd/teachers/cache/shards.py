"""The files of a teacher cache: a safetensors file of some rows, whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_gkd.checkpoint_format.cache_manifest import Manifest
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.disk import publish
from megatron_gkd.teachers.cache.keys import KEY, KEY_BYTES


@dataclass(frozen=True)
class CachedRow:
    """The teacher's most likely tokens at the n labels of a row.

    Attributes:
        ids: int32 [n, k], the most likely tokens, by falling probability; -1 where there are fewer.
        log_probs: fp32 [n, k], in nats, at temperature 1 over the whole vocabulary; -inf where the id is -1.
        tail: fp32 [n], ln of the sum of exp(log_prob / temperature) over all other tokens; -inf where there are none.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    tail: np.ndarray

    def checksum(self) -> int:
        """Return the CRC-32 of all arrays."""
        value = 0
        for array in (self.ids, self.log_probs, self.tail):
            value = zlib.crc32(np.ascontiguousarray(array).data, value)
        return value


def write_shard(folder: Path, manifest: Manifest, keys: np.ndarray, rows: Sequence[CachedRow]) -> Path:
    """Write a shard as one file, which gets its name when all of it is on disk. The name is a hash of the keys.

    Args:
        folder: of the cache.
        manifest: of the cache.
        keys: `KEY` [rows].
        rows: with these keys.

    Returns:
        The file.
    """
    name = f"rows-{hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()}.safetensors"
    unfinished = folder / f".{name}.{os.getpid()}"
    tensors = {
        "keys": np.frombuffer(keys.tobytes(), dtype=np.uint8).reshape(len(keys), KEY_BYTES),
        "ends": np.cumsum([len(row.tail) for row in rows]),
        "checksums": np.array([row.checksum() for row in rows], dtype=np.uint32),
        "ids": np.concatenate([row.ids for row in rows]).astype(np.int32, copy=False),
        "log_probs": np.concatenate([row.log_probs for row in rows]).astype(np.float32, copy=False),
        "tail": np.concatenate([row.tail for row in rows]).astype(np.float32, copy=False),
    }
    save_file(tensors, unfinished, metadata={"cache": manifest.identity})
    publish(unfinished, folder / name)
    return folder / name


class Shard:
    """An open file that is mapped into memory; rows are read on demand.

    Attributes:
        keys: `KEY` [rows].

    Raises:
        UserError: the file is cut off, damaged, or of another cache.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="np")
            identity = (self._file.metadata() or {}).get("cache")
            if identity is None:
                raise UserError(f"{path}: is no shard of a teacher cache; move it elsewhere")
            if identity != manifest.identity:
                raise UserError(
                    f"{path}: is a shard of another teacher cache than that of manifest.json; move it there"
                )
            self.keys = np.frombuffer(self._file.get_tensor("keys").tobytes(), dtype=KEY)
            self._ends, self._checksums = self._file.get_tensor("ends"), self._file.get_tensor("checksums")
            shapes = {name: self._file.get_slice(name).get_shape() for name in ("ids", "log_probs", "tail")}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is cut off or damaged ({error}); {_REPAIR}") from error
        labels = [int(self._ends[-1]) if len(self._ends) else 0]
        whole = {"ids": [*labels, manifest.k], "log_probs": [*labels, manifest.k], "tail": labels}
        if shapes != whole or not len(self.keys) == len(self._ends) == len(self._checksums):
            raise UserError(f"{path}: its tensors don't fit together; {_REPAIR}")

    def read(self, row: int) -> CachedRow:
        """Read a row.

        Raises:
            UserError: the row is damaged.
        """
        start = int(self._ends[row - 1]) if row else 0
        span = slice(start, int(self._ends[row]))
        cached = CachedRow(*(self._file.get_slice(name)[span] for name in ("ids", "log_probs", "tail")))
        if cached.checksum() != self._checksums[row]:
            raise UserError(f"{self.path}: row {row} is damaged (its checksum differs); {_REPAIR}")
        return cached


_REPAIR = "delete it and run megatron-gkd score again, which scores the missing rows"
