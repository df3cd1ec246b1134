"""Build of a tokenized, memory-mapped dataset from data files."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import DataSection
from megatron_gkd.data.cache import CacheFolder, default_cache_dir, fingerprint, hash_texts, hash_tokenizer
from megatron_gkd.data.columns import IMAGES
from megatron_gkd.data.plugins import find_preprocessor, load_plugins
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.sample import FROM_DATASET, Sample
from megatron_gkd.data.shards import ShardSummary, ShardWriter, tokenize_shards
from megatron_gkd.data.sources import Source, open_source
from megatron_gkd.data.tokenizing import RowOptions, RowTokenizer
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.image import from_record
from megatron_gkd.errors import UserError
from megatron_gkd.reporting.phases import phase
from megatron_gkd.runtime.nodes import Nodes

VISIBLE_WITHIN_S = 5.0  # how long another node may take to see a folder of a shared file system
_ROWS, _REPORT = "rows", "report.json"  # names in a cache folder
_STORED_IMAGES = "images"  # the folder of fetched images, beside the cache folders


class TokenizedDataset:
    """Samples of one or more sources, one after the other, read from memory-mapped Arrow files.

    Attributes:
        sizes: number of samples of each source.
        lengths: int64 [rows], tokens of each sample.
        num_labels: int64 [rows], labels of each sample that are not -100.
        teacher_lengths: int64 [rows], tokens of each sample as the teacher reads it, where that has a prompt of its
            own; else 0.
        num_patches: int64 [rows], patches of the images that each sample has for the student or the teacher, whichever
            are more.
        num_videos: int64 [rows], videos among these images.
        tags: the tags that rows have.
    """

    def __init__(self, parts: Sequence[datasets.Dataset]) -> None:
        rows = datasets.concatenate_datasets(list(parts))
        has_images = "images" in rows.column_names
        self.num_patches = _column(rows, "num_patches") if has_images else np.zeros(len(rows), np.int64)
        self.num_videos = _column(rows, "num_videos") if has_images else np.zeros(len(rows), np.int64)
        self._images = rows.select_columns(list(IMAGES)).with_format(None) if has_images else None
        self._rows = rows.remove_columns(list(IMAGES) if has_images else []).with_format("numpy")
        self.sizes = [len(part) for part in parts]
        self.lengths = _column(self._rows, "length")
        self.num_labels = _column(self._rows, "num_labels")
        self.teacher_lengths = _column(self._rows, "teacher_length")
        self.tags = frozenset(tag for tag in self._rows.unique("tag") if tag)

    def __len__(self) -> int:
        return len(self._rows)

    def first_row_with_tag(self, tag: str) -> int:
        """Return the index of the first row with this tag.

        Raises:
            ValueError: no row has it.
        """
        return list(self._rows["tag"]).index(tag)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[int(index)]
        input_ids, labels = row["input_ids"].astype(np.int64), row["labels"].astype(np.int64)
        has_teacher_prompt = bool(self.teacher_lengths[index])
        teacher_prompt = row["teacher_prompt"].astype(np.int64) if has_teacher_prompt else None
        sample = Sample(input_ids, labels, FROM_DATASET, int(index), teacher_prompt, str(row["tag"]) or None)
        if self._images is None:
            return sample
        found = self._images[int(index)]
        images, teacher_images = (tuple(map(from_record, found[name])) for name in IMAGES)
        return replace(sample, images=images, teacher_images=teacher_images if has_teacher_prompt else None)


def build_dataset(
    section: DataSection,
    split: Literal["train", "validation"],
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions | None = None,
    nodes: Nodes | None = None,
) -> tuple[TokenizedDataset, DataReport]:
    """Read, check and tokenize the rows of a split, or open them from the cache where nothing has changed.

    All ranks must call it. Rank 0 builds the cache while the others wait; then one rank of each node that does not see
    rank 0's cache builds its own; then all open it. The failure of one rank is raised in all.

    Args:
        section: the recipe's data section.
        split: "train" reads `section.dataset`, "validation" `section.val_dataset`.
        tokenizer: the student's, a fast one.
        options: what the run requires of its rows; None for the defaults.
        nodes: the ranks; None for one process.

    Raises:
        UserError: a file cannot be read, a row is bad and `data_errors` is "raise", a source has no usable row, or a
            node has other rows than rank 0.
    """
    files = section.dataset if split == "train" else section.val_dataset
    if not files:
        raise UserError(f"data.{'dataset' if split == 'train' else 'val_dataset'} names no file")
    root = Path(section.dataset_cache_dir).expanduser() if section.dataset_cache_dir else default_cache_dir()
    nodes = nodes or Nodes.alone()
    tokenization = _Tokenization(section, tokenizer, options or RowOptions())
    # The key has the time of change of rank 0's files; copies on other nodes may have another.
    paths = [file.path for file in files]
    keys = nodes.on_main(lambda: tokenization.keys(paths))
    caches = [CacheFolder(root / key) for key in keys]

    def build() -> list[str]:
        for path, cache in zip(paths, caches, strict=True):
            cache.build(partial(tokenization.write, path, is_main=True))
        return [_read_report(cache).digest for cache in caches]

    def build_unseen() -> None:
        until = time.monotonic() + VISIBLE_WITHIN_S
        for path, cache, digest in zip(paths, caches, digests, strict=True):
            if not cache.is_visible(until):
                cache.build(partial(tokenization.write, path, digest=digest))

    digests = nodes.on_main(build)
    with phase("Waiting for the other nodes to tokenize the rows", is_main=nodes.is_main):
        nodes.on_leaders(build_unseen)
    return nodes.on_all(lambda: _open(paths, caches, digests))


def _open(
    paths: Sequence[str], caches: Sequence[CacheFolder], digests: Sequence[str]
) -> tuple[TokenizedDataset, DataReport]:
    """Open the caches of the sources at `paths`, whose rows must have the `digests`."""
    until = time.monotonic() + VISIBLE_WITHIN_S
    for path, cache, digest in zip(paths, caches, digests, strict=True):
        if not cache.is_visible(until):
            raise UserError(
                f"data.dataset_cache_dir = {cache.folder.parent}: {cache.folder.name} is missing, although a rank of "
                "this node has written it; name a folder that all ranks of a node see"
            )
        if _read_report(cache).digest != digest:
            raise UserError(f"{_different_rows(path)}. Remove {cache.folder} on this node before the next start")
    dataset = TokenizedDataset([datasets.load_from_disk(str(cache.folder / _ROWS)) for cache in caches])
    return dataset, DataReport.merge(_read_report(cache).report for cache in caches)


def _different_rows(path: str) -> str:
    return (
        f"{path}: gives other rows on this node than on rank 0's; all nodes need the same file, plugins and versions "
        "of the packages"
    )


@dataclass(frozen=True)
class _StoredReport:
    """The counts and the hash of a source's rows, which are stored beside them."""

    report: DataReport
    digest: str


def _read_report(cache: CacheFolder) -> _StoredReport:
    stored = json.loads((cache.folder / _REPORT).read_text(encoding="utf-8"))
    return _StoredReport(DataReport(**stored["report"]), stored["digest"])


@dataclass(frozen=True)
class _Tokenization:
    """How the rows of a split become samples. The attributes are arguments of `build_dataset`."""

    section: DataSection
    tokenizer: PreTrainedTokenizerBase
    options: RowOptions

    def keys(self, paths: Sequence[str]) -> list[str]:
        """Return the cache keys of the sources at `paths`."""
        tokenizer_hash, plugins = hash_tokenizer(self.tokenizer), list(self.section.external_plugins)
        return [fingerprint(path, tokenizer_hash, self._key_options(), plugins) for path in paths]

    def _key_options(self) -> dict[str, Any]:
        """Return all that determines a source's samples beside the file, the tokenizer and the plugins."""
        options = self.options
        names = ("max_length", "teacher_max_length", "truncation_strategy", "loss_on", "data_errors", "preprocessor")
        return {name: getattr(self.section, name) for name in (*names, "chat_template_kwargs")} | {
            "prompts": options.allows_prompts,
            "prompt_limits": None if options.prompt_limits is None else asdict(options.prompt_limits),
            "tag_key": options.tag_key,
            "vocab_size": options.vocab_size,
            "images": None if options.images is None else options.images.settings,
        }

    def write(self, path: str, parts: Path, out: Path, *, is_main: bool = False, digest: str | None = None) -> None:
        """Write the samples of the source at `path`, and its report, into `out`.

        Args:
            path: file or folder of rows.
            parts: folder of the finished shards, which stay if this process is killed.
            out: an empty folder.
            is_main: whether this rank shows its progress.
            digest: the hash that the samples must have; None: any.

        Raises:
            UserError: a row is bad and may not be skipped, no row is used, or the samples have another hash.
        """
        section = self.section
        load_plugins(section.external_plugins)
        if section.preprocessor:
            find_preprocessor(section.preprocessor)  # an unknown name is an error here, not in each worker
        name = Path(path).name
        with _without_progress_bars():
            with phase(f"Reading {name}", is_main=is_main):
                source = open_source(path, str(parts.parent / "source"))
            if len(source.table) == 0:
                raise UserError(f"{path}: yields nothing to train on: it has no rows")
            # `out` is a folder in that of the unfinished cache, which is beside the cache folders.
            root = Path(path).resolve()
            store = ImageStore(root if root.is_dir() else root.parent, out.parents[1] / _STORED_IMAGES)
            writer = ShardWriter(
                source.table, RowTokenizer(self.tokenizer, source.is_json, section, self.options, store), parts
            )
            with phase(f"Tokenizing {name}", is_main=is_main, unit="rows") as shown:
                summaries = tokenize_shards(writer, section.preprocessing_num_workers, shown.update)
            try:
                report = _report(source, summaries, section.data_errors)
                stored = _StoredReport(report, hash_texts(summary.digest for summary in summaries))
                if digest is not None and stored.digest != digest:
                    raise UserError(_different_rows(path))
            except UserError:
                shutil.rmtree(parts)  # the same file gives the same rows again, so the shards are of no use
                parts.mkdir()
                raise
            used = [writer.path(shard) for shard, summary in enumerate(summaries) if summary.used]
            rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in used])
            rows.save_to_disk(str(out / _ROWS))
        (out / _REPORT).write_text(json.dumps(asdict(stored)), encoding="utf-8")


def _report(source: Source, summaries: Sequence[ShardSummary], data_errors: str) -> DataReport:
    """Count the rows.

    Raises:
        UserError: a row is bad and may not be skipped, or no row is used.
    """
    first_bad = next((summary.first_bad for summary in summaries if summary.first_bad is not None), None)
    first = None if first_bad is None else f"{source.locate(first_bad[0])}: {first_bad[1]}"
    if first and data_errors == "raise":
        bad = sum(summary.bad for summary in summaries)
        raise UserError(f"{first} ({bad} bad rows in all; data_errors: skip drops them)")
    dropped = sum((Counter(summary.dropped) for summary in summaries), Counter[str]())
    used = sum(summary.used for summary in summaries)
    shortened = sum(summary.shortened for summary in summaries)
    images = sum(summary.images for summary in summaries)
    report = DataReport(used + dropped.total(), used, dict(sorted(dropped.items())), shortened, first, images)
    if used == 0:
        raise UserError(f"{source.path}: yields nothing to train on: {report.summary()}")
    return report


def _column(rows: datasets.Dataset, name: str) -> np.ndarray:
    return np.asarray(rows.with_format("arrow")[:][name], dtype=np.int64) if len(rows) else np.zeros(0, np.int64)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Disable the progress bars of `datasets`, which count its own batches."""
    hide = not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
