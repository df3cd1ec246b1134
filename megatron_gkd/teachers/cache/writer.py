"""Writing of a cache: its manifest, and the shards that are still to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_gkd.checkpoint_format.cache_manifest import FILE, Manifest
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.runtime.disk import replace_text
from megatron_gkd.teachers.cache.teacher import NOT_FOUND, TeacherCache, open_cache

SHARD_BYTES = 256 << 20


def open_for_writing(folder: Path, manifest: Manifest) -> TeacherCache:
    """Create a cache, or open one that a run with the same manifest has begun. All ranks must call it.

    Raises:
        UserError: in all ranks; the folder has another cache, or cannot be written.
    """

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FILE).exists():
            replace_text(folder / FILE, manifest.text())
        _require_same(folder, manifest)
        for leftover in folder.glob(".rows-*"):  # of a run that was killed
            leftover.unlink()

    run_on_main(prepare, os_error=f"{folder}: cannot be written")
    return open_cache(folder)


def _require_same(folder: Path, manifest: Manifest) -> None:
    try:
        found = Manifest.read(folder)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    for name, value in vars(manifest).items():
        if name == "vocabulary" and found.vocabulary is None:  # of an older release
            continue
        if getattr(found, name) != value:
            raise UserError(
                f"{folder}: has a teacher cache already, with {name} = {getattr(found, name)} instead of {value}; "
                "name another folder"
            )


def plan_shards(
    keys: np.ndarray, num_labels: np.ndarray, cache: TeacherCache, *, shard_rows: int, k: int
) -> list[np.ndarray]:
    """Return the rows of each shard that is still to be written: int64 arrays, in the order of the rows.

    Equal rows count once, rows without labels not at all. The division into shards is that of an empty cache: so a
    continued run scores the same rows together as one that was never interrupted, and writes the same bits.

    Args:
        keys: `KEY` [rows].
        num_labels: int64 [rows].
        cache: the rows that exist already.
        shard_rows: most rows of a shard; `SHARD_BYTES` may end it earlier.
        k: tokens of each distribution.
    """
    rows = np.sort(np.unique(keys, return_index=True)[1])
    rows = rows[num_labels[rows] > 0]
    exists = cache.find(keys[rows]) != NOT_FOUND
    shards = []
    for shard in _split(num_labels[rows] * (8 * k + 4), shard_rows):
        todo = rows[shard][~exists[shard]]
        if len(todo):
            shards.append(todo)
    return shards


def _split(sizes: np.ndarray, max_rows: int) -> list[slice]:
    """Split rows of these sizes into spans of at most `max_rows` rows and `SHARD_BYTES` bytes, or of a single row."""
    spans, start, total = [], 0, 0
    for row, size in enumerate(sizes.tolist()):
        if row > start and (row - start == max_rows or total + size > SHARD_BYTES):
            spans.append(slice(start, row))
            start, total = row, 0
        total += size
    return [*spans, slice(start, len(sizes))] if len(sizes) else []


def require_consistent_tags(keys: np.ndarray, tags: Sequence[str | None]) -> None:
    """Check that equal rows have equal tags, since they share one entry.

    Raises:
        UserError: two equal rows have different tags.
    """
    seen: dict[bytes, int] = {}
    for row, key in enumerate(keys.tolist()):
        first = seen.setdefault(key, row)
        if tags[row] != tags[first]:
            raise UserError(
                f"rows {row} and {first} are the same, but their tags {tags[row]!r} and {tags[first]!r} select "
                "two teachers; the cache has one entry for both, so give them one tag"
            )
