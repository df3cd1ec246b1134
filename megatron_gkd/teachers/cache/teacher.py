"""A teacher's top-k on disk, row by row, and the teacher that reads it in the model's place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.loader import SampleDataset
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import UserError
from megatron_gkd.ops.topk import TopK
from megatron_gkd.runtime.agreement import holds_everywhere, run_on_all
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Part, Parts, ScoresAhead, TeacherFailed, TeacherSignal, TeacherSource
from megatron_gkd.teachers.cache.keys import KEY, dataset_keys, keys_of
from megatron_gkd.teachers.cache.manifest import Manifest
from megatron_gkd.teachers.cache.shards import CachedRow, Shard
from megatron_gkd.teachers.selection import select_rows

MISSING = -1


class TeacherCache:
    """The rows of a folder that `megatron-gkd score` has written, by their keys. Only the index is in memory.

    Raises:
        UserError: the folder is no cache, or a file in it is damaged or does not belong there.
    """

    def __init__(self, folder: str | Path):
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
        """int64 [n], for `KEY` [n]: what `read` takes, `MISSING` where there is no such row."""
        if len(self._keys) == 0:
            return np.full(len(keys), MISSING, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[places] == keys, places, MISSING)

    def read(self, place: int) -> CachedRow:
        """UserError where the row is damaged on disk."""
        return self._shards[self._shard_of[place]].read(int(self._row_of[place]))


class CachedTeacher:
    """Says of each row what `cache` has of it, and lets `rest` judge the rows that are not there.

    Args:
        cache: opened by every rank for itself.
        mesh: of the student.
        k: how many of the cached tokens count, the most likely ones; None for all. The others join the tail.
        rest: a teacher for rows that the cache hasn't; None makes them an error.
    """

    def __init__(self, cache: TeacherCache, mesh: Mesh, *, k: int | None = None, rest: TeacherSource | None = None):
        self.cache, self.mesh, self.rest = cache, mesh, rest
        self.k = min(k or cache.manifest.k, cache.manifest.k)

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """`rest` is, while it scores."""
        return contextlib.nullcontext()

    def begin(self, samples: Iterable[Sample]) -> None:
        """As `ScoresAhead.begin`: a `rest` that works elsewhere hears of the rows that are missing."""
        if isinstance(self.rest, ScoresAhead):
            samples = list(samples)
            places = self.cache.find(keys_of(samples))
            self.rest.begin(sample for sample, place in zip(samples, places, strict=True) if place == MISSING)

    @torch.no_grad()
    def score(self, microbatches: Sequence[Microbatch]) -> list[TeacherSignal | None]:
        """Reads on the last pipeline stage. Where any rank of the world misses a row, `rest` scores as many
        microbatches as there are on all of them: they wait for each other where they share experts or a server.
        """
        places = [self.cache.find(keys_of(microbatch.samples)) for microbatch in microbatches]
        missing = [
            [
                sample
                for sample, place in zip(microbatch.samples, found, strict=True)
                if place == MISSING and sample.num_labels
            ]
            for microbatch, found in zip(microbatches, places, strict=True)
        ]

        def read() -> list[Part | None]:
            if any(missing) and self.rest is None:
                row_id = next(samples[0].row_id for samples in missing if samples)
                raise UserError(f"row {row_id} is not in the teacher cache {self.cache.folder}")
            if not self.mesh.is_last_stage:
                return [None] * len(microbatches)
            return [self._read(microbatch, found) for microbatch, found in zip(microbatches, places, strict=True)]

        parts = run_on_all(read, TeacherFailed)
        if self.rest is None or holds_everywhere(not any(missing)):
            return [None if part is None else part.signal for part in parts]
        return self._let_the_rest_judge(microbatches, missing, parts)

    def _let_the_rest_judge(
        self, microbatches: Sequence[Microbatch], missing: list[list], parts: list[Part | None]
    ) -> list[TeacherSignal | None]:
        chosen = []
        for microbatch, samples in zip(microbatches, missing, strict=True):
            wanted = {id(sample) for sample in samples}
            chosen.append(select_rows(microbatch, lambda sample, wanted=wanted: id(sample) in wanted, self.mesh))
        with self.rest.resident():
            judged = self.rest.score([selected for selected, _ in chosen])
        signals = []
        for part, (_, rows), signal, samples in zip(parts, chosen, judged, missing, strict=True):
            if part is None or not samples:
                signals.append(None if part is None else part.signal)
            else:
                signals.append(Parts((part, Part(rows, signal))))
        return signals

    def _read(self, microbatch: Microbatch, places: np.ndarray) -> Part:
        """Of the labels on this context-parallel rank: which ones the cache knows, and what it says of them."""
        samples = microbatch.samples
        counts = np.array([sample.num_labels for sample in samples], dtype=np.int64)
        is_known = torch.from_numpy(np.repeat(places != MISSING, counts))
        numbers = local_label_indices(microbatch, self.mesh.cp.rank(), self.mesh.cp.size())
        rows = is_known[numbers].nonzero().squeeze(1)
        entries = []
        for sample, place, count in zip(samples, places, counts, strict=True):
            if place == MISSING or count == 0:
                continue
            entry = self.cache.read(place)
            if len(entry.tail) != count:
                raise UserError(f"{self.cache.folder}: has {len(entry.tail)} of row {sample.row_id}'s {count} labels")
            entries.append(entry)
        wanted = (is_known.cumsum(0) - 1)[numbers[rows]]
        device = microbatch.labels.device
        return Part(rows.to(device), self._topk(entries, wanted.numpy(), device))

    def _topk(self, entries: Sequence[CachedRow], wanted: np.ndarray, device: torch.device) -> TopK:
        """Of the labels with the numbers `wanted`, counted over all `entries`."""
        manifest, k = self.cache.manifest, self.k
        none = np.empty((0, manifest.k), np.float32)
        ids = np.concatenate([none.astype(np.int32), *(entry.ids for entry in entries)])[wanted]
        values = torch.from_numpy(np.concatenate([none, *(entry.log_probs for entry in entries)])[wanted])
        tail = torch.from_numpy(np.concatenate([none[:, 0], *(entry.tail for entry in entries)])[wanted])
        if k < manifest.k:
            tail = torch.logaddexp(tail, (values[:, k:] / manifest.temperature).logsumexp(-1))
        return TopK(
            torch.from_numpy(ids[:, :k].astype(np.int64)).to(device),
            values[:, :k].to(device),
            tail.to(device),
            manifest.temperature,
        )


def open_cache(folder: str | Path) -> TeacherCache:
    """UserError in all ranks together. All must call it."""
    return run_on_all(lambda: TeacherCache(folder))


def require_rows(cache: TeacherCache, dataset: SampleDataset, name: str, tags: Sequence[str] | None = None) -> None:
    """UserError, in every rank, for a row of `dataset` with labels that the cache hasn't. All ranks must call it.

    name: of the dataset, for the message.
    tags: only rows that have one of them count; None: all do.
    """
    absent = np.flatnonzero((cache.find(dataset_keys(dataset)) == MISSING) & (dataset.num_labels > 0))
    if tags is not None:
        absent = np.array([row for row in absent if dataset[row].tag in tags], dtype=np.int64)
    if len(absent):
        raise UserError(
            f"{name}, row {absent[0]} (from 0, of the rows that are used) is not in the teacher cache {cache.folder}, "
            f"nor are {len(absent) - 1} others; score this data set with the same max_length, truncation_strategy and "
            "loss_on, or name a teacher beside the cache"
        )
