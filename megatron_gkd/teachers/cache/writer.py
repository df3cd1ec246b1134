"""A cache that is being written: what it has already, and what is still to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_gkd.errors import UserError
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.runtime.disk import replace_text
from megatron_gkd.teachers.cache.manifest import FILE, Manifest
from megatron_gkd.teachers.cache.teacher import MISSING, TeacherCache, open_cache

SHARD_BYTES = 256 << 20


def open_for_writing(folder: Path, manifest: Manifest) -> TeacherCache:
    """A new cache, or one that a run with the same manifest has begun. All ranks must call it.

    Raises:
        UserError: in all ranks; another kind of cache is there, or the folder can't be written to.
    """

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FILE).exists():
            replace_text(folder / FILE, manifest.text())
        _require_same(folder, manifest)
        for leftover in folder.glob(".rows-*"):  # of a run that was killed
            leftover.unlink()

    run_on_main(prepare, os_error=f"{folder}: can't be written to")
    return open_cache(folder)


def _require_same(folder: Path, manifest: Manifest) -> None:
    try:
        found = Manifest.read(folder)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    for name, value in vars(manifest).items():
        if getattr(found, name) != value:
            raise UserError(
                f"{folder}: has a teacher cache already, with {name} = {getattr(found, name)} instead of {value}; "
                "name another folder"
            )


def plan_shards(
    keys: np.ndarray, num_labels: np.ndarray, cache: TeacherCache, *, shard_rows: int, k: int
) -> list[np.ndarray]:
    """Which rows each shard that is still to be written has: int64 arrays, in the order of the rows.

    Equal rows count once, rows without labels not at all. The division into shards is that of a cache without any row:
    so a run that goes on scores the same rows together as one that was never interrupted, and writes the same bits.

    Args:
        keys: `KEY` [rows].
        num_labels: int64 [rows].
        cache: what there is already.
        shard_rows: most rows of a shard; `SHARD_BYTES` may have it closed earlier.
        k: tokens of each distribution.
    """
    rows = np.sort(np.unique(keys, return_index=True)[1])
    rows = rows[num_labels[rows] > 0]
    is_there = cache.find(keys[rows]) != MISSING
    shards = []
    for shard in _cut(num_labels[rows] * (8 * k + 4), shard_rows):
        todo = rows[shard][~is_there[shard]]
        if len(todo):
            shards.append(todo)
    return shards


def _cut(sizes: Sequence[int], most: int) -> list[slice]:
    """Consecutive stretches of at most `most` rows, and of `SHARD_BYTES` bytes unless a row alone has more."""
    stretches, start, total = [], 0, 0
    for row, size in enumerate(sizes):
        if row > start and (row - start == most or total + size > SHARD_BYTES):
            stretches.append(slice(start, row))
            start, total = row, 0
        total += int(size)
    return [*stretches, slice(start, len(sizes))] if len(sizes) else []


def refuse_unlike_twins(keys: np.ndarray, tags: Sequence[str | None]) -> None:
    """UserError for equal rows with unlike tags: several teachers would have to share one entry."""
    seen: dict[bytes, int] = {}
    for row, key in enumerate(keys.tolist()):
        first = seen.setdefault(key, row)
        if tags[row] != tags[first]:
            raise UserError(
                f"rows {row} and {first} are the same, but their tags {tags[row]!r} and {tags[first]!r} name two "
                "teachers; a cache has one entry for both"
            )
