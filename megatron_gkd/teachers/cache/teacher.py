"""A teacher's top-k on disk, row by row, and the teacher that reads it in place of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_gkd.checkpoint_format.cache_manifest import Manifest
from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.loader import SampleDataset
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import UserError
from megatron_gkd.ops.topk import TopK
from megatron_gkd.runtime.agreement import holds_everywhere, run_on_all
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Part, Parts, ScoresAhead, TeacherSignal, TeacherSource, select_parts
from megatron_gkd.teachers.cache.keys import KEY, dataset_keys, row_keys
from megatron_gkd.teachers.cache.shards import CachedRow, Shard
from megatron_gkd.teachers.selection import select_rows

NOT_FOUND = -1  # what `TeacherCache.find` returns for a row that is not in the cache


class TeacherCache:
    """The rows of a folder that `megatron-gkd score` has written, by their keys. Only the index is in memory.

    Raises:
        UserError: the folder is no cache, or a file in it is damaged or of another cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = Manifest.read(folder)
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error
        self._shards = [Shard(path, self.manifest) for path in sorted(self.folder.glob("*.safetensors"))]
        keys = np.concatenate([np.empty(0, KEY), *(shard.keys for shard in self._shards)])
        lengths = [len(shard.keys) for shard in self._shards]
        shards = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        rows = np.concatenate([np.empty(0, np.int32), *(np.arange(length, dtype=np.int32) for length in lengths)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._shard_of, self._row_of = keys[order], shards[order], rows[order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return int64 [n] for `KEY` [n]: the entries that `read` takes, `NOT_FOUND` where there is no such row."""
        if len(self._keys) == 0:
            return np.full(len(keys), NOT_FOUND, dtype=np.int64)
        entries = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[entries] == keys, entries, NOT_FOUND)

    def read(self, entry: int) -> CachedRow:
        """Read a row from disk.

        Raises:
            UserError: the row is damaged.
        """
        return self._shards[self._shard_of[entry]].read(int(self._row_of[entry]))


class CachedTeacher:
    """Read the signals of cached rows, and let another teacher score the other rows.

    Args:
        cache: opened by every rank for itself.
        mesh: the groups of the student.
        k: number of the cached tokens that count, the most likely ones; None for all. The others join the tail.
        fallback: scores rows that are not in the cache; None makes them an error.
    """

    def __init__(
        self, cache: TeacherCache, mesh: Mesh, *, k: int | None = None, fallback: TeacherSource | None = None
    ) -> None:
        self.cache, self.mesh, self.fallback = cache, mesh, fallback
        self.k = min(k or cache.manifest.k, cache.manifest.k)

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """See ``TeacherSource.resident``; the fallback is resident while it scores."""
        return contextlib.nullcontext()

    def begin(self, samples: Iterable[Sample]) -> None:
        """See ``ScoresAhead.begin``; a fallback that scores ahead gets the rows that are not in the cache."""
        if self.fallback is not None and isinstance(self.fallback, ScoresAhead):
            samples = list(samples)
            entries = self.cache.find(row_keys(samples))
            self.fallback.begin(sample for sample, entry in zip(samples, entries, strict=True) if entry == NOT_FOUND)

    @torch.no_grad()
    def score(self, microbatches: Sequence[Microbatch]) -> list[TeacherSignal | None]:
        """See ``TeacherSource.score``.

        Where any rank of the world lacks a row, the fallback scores as many microbatches as there are on all ranks:
        they wait for each other where they share experts or a server.

        Raises:
            UserError: in all ranks; a row is not in the cache and there is no fallback, or it is damaged.
            GkdError: in all ranks; see the fallback.
        """
        entries = [self.cache.find(row_keys(microbatch.samples)) for microbatch in microbatches]
        missing = [
            [
                sample
                for sample, entry in zip(microbatch.samples, entries_of_one, strict=True)
                if entry == NOT_FOUND and sample.num_labels
            ]
            for microbatch, entries_of_one in zip(microbatches, entries, strict=True)
        ]

        def read() -> list[Part | None]:
            if any(missing) and self.fallback is None:
                row_id = next(samples[0].row_id for samples in missing if samples)
                raise UserError(f"row {row_id} is not in the teacher cache {self.cache.folder}")
            if not self.mesh.is_last_stage:
                return [None] * len(microbatches)
            return [self._read(microbatch, one) for microbatch, one in zip(microbatches, entries, strict=True)]

        parts = run_on_all(read)
        if self.fallback is None or holds_everywhere(not any(missing)):
            return [None if part is None else part.signal for part in parts]
        return self._score_missing(self.fallback, microbatches, missing, parts)

    def _score_missing(
        self,
        fallback: TeacherSource,
        microbatches: Sequence[Microbatch],
        missing: Sequence[Sequence[Sample]],
        parts: Sequence[Part | None],
    ) -> list[TeacherSignal | None]:
        """Add the fallback's signals of the `missing` rows to the cache's `parts`. All ranks call it together."""
        selected = []
        for microbatch, samples in zip(microbatches, missing, strict=True):
            ids = frozenset(map(id, samples))
            selected.append(select_rows(microbatch, partial(_has_id, ids), self.mesh))
        with fallback.resident():
            scored = fallback.score([microbatch for microbatch, _ in selected])
        signals: list[TeacherSignal | None] = []
        for part, (_, rows), signal, samples in zip(parts, selected, scored, missing, strict=True):
            if part is None or signal is None or not samples:
                signals.append(None if part is None else part.signal)
            else:
                signals.append(Parts((part, *select_parts(rows, signal))))
        return signals

    def _read(self, microbatch: Microbatch, entries: np.ndarray) -> Part:
        """Return the signal of the labels on this context-parallel rank whose rows are in the cache."""
        samples = microbatch.samples
        counts = np.array([sample.num_labels for sample in samples], dtype=np.int64)
        is_cached = torch.from_numpy(np.repeat(entries != NOT_FOUND, counts))
        indices = local_label_indices(microbatch, self.mesh.cp.rank(), self.mesh.cp.size())
        rows = is_cached[indices].nonzero().squeeze(1)
        cached_rows = []
        for sample, entry, count in zip(samples, entries.tolist(), counts.tolist(), strict=True):
            if entry == NOT_FOUND or count == 0:
                continue
            row = self.cache.read(entry)
            if len(row.tail) != count:
                raise UserError(f"{self.cache.folder}: has {len(row.tail)} of row {sample.row_id}'s {count} labels")
            cached_rows.append(row)
        cached_indices = (is_cached.cumsum(0) - 1)[indices[rows]]
        device = microbatch.labels.device
        return Part(rows.to(device), self._build_topk(cached_rows, cached_indices.numpy(), device))

    def _build_topk(self, rows: Sequence[CachedRow], indices: np.ndarray, device: torch.device) -> TopK:
        """Return the top-k of the labels `indices`, counted over all labels of `rows`."""
        manifest, k = self.cache.manifest, self.k
        none = np.empty((0, manifest.k), np.float32)
        ids = np.concatenate([none.astype(np.int32), *(row.ids for row in rows)])[indices]
        values = torch.from_numpy(np.concatenate([none, *(row.log_probs for row in rows)])[indices])
        tail = torch.from_numpy(np.concatenate([none[:, 0], *(row.tail for row in rows)])[indices])
        if k < manifest.k:
            tail = torch.logaddexp(tail, (values[:, k:] / manifest.temperature).logsumexp(-1))
        return TopK(
            torch.from_numpy(ids[:, :k].astype(np.int64)).to(device),
            values[:, :k].to(device),
            tail.to(device),
            manifest.temperature,
        )


def _has_id(ids: frozenset[int], sample: Sample) -> bool:
    return id(sample) in ids


def open_cache(folder: str | Path) -> TeacherCache:
    """Open a cache on every rank. All ranks must call it.

    Raises:
        UserError: in all ranks; see `TeacherCache`.
    """
    return run_on_all(lambda: TeacherCache(folder))


def require_rows(cache: TeacherCache, dataset: SampleDataset, name: str, tags: Sequence[str] | None = None) -> None:
    """Check that a cache has all rows of a dataset that have labels. All ranks must call it.

    Args:
        cache: the cache.
        dataset: the rows.
        name: of the dataset, for the message.
        tags: only rows with one of these tags are checked; None: all rows.

    Raises:
        UserError: in all ranks; a row is not in the cache.
    """
    absent = np.flatnonzero((cache.find(dataset_keys(dataset)) == NOT_FOUND) & (dataset.num_labels > 0))
    if tags is not None:
        absent = np.array([row for row in absent if dataset[int(row)].tag in set(tags)], dtype=np.int64)
    if len(absent):
        raise UserError(
            f"{name}, row {absent[0]} (from 0, of the rows that are used) is not in the teacher cache {cache.folder}, "
            f"nor are {len(absent) - 1} others; score this data set with the same max_length, truncation_strategy and "
            "loss_scale, or name a teacher beside the cache"
        )
