"""Tokenization of one source into a cache folder, and what such a folder has."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import DataSection
from megatron_gkd.config.system_text import read_system
from megatron_gkd.data.cache import CacheFolder, fingerprint, hash_texts, hash_tokenizer
from megatron_gkd.data.dataset import read_column
from megatron_gkd.data.entries import Entry
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.selection import Chosen
from megatron_gkd.data.shards import ShardSummary, ShardWriter, tokenize_shards
from megatron_gkd.data.sources import Part, Source, describe_source, open_source
from megatron_gkd.data.sources.columns import require_columns
from megatron_gkd.data.tokenizing import RowOptions, RowTokenizer
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.errors import UserError
from megatron_gkd.reporting.phases import phase

_ROWS, _REPORT, _ORDER = "rows", "report.json", "order.npy"  # names in a cache folder
_STORED_IMAGES = "images"  # the folder of fetched images, beside the cache folders


def open_samples(cache: CacheFolder) -> datasets.Dataset:
    """Open the samples of a source, those that are repeated as often as they are."""
    rows, order = datasets.load_from_disk(str(cache.folder / _ROWS)), cache.folder / _ORDER
    return rows.select(np.load(order)) if order.exists() else rows


def describe_other_rows(name: str) -> str:
    """Return that the source of this name gives other rows on this node than on rank 0's."""
    return (
        f"{name}: gives other rows on this node than on rank 0's; all nodes need the same file, plugins and versions "
        "of the packages"
    )


@dataclass(frozen=True)
class StoredReport:
    """The counts and the hash of a source's rows, and its files, which are stored beside them."""

    report: DataReport
    digest: str
    files: tuple[Part, ...]


def read_report(cache: CacheFolder) -> StoredReport:
    """Return what is stored beside the rows of a cache."""
    stored = json.loads((cache.folder / _REPORT).read_text(encoding="utf-8"))
    files = tuple(Part(**part) for part in stored["files"])
    return StoredReport(DataReport(**stored["report"]), stored["digest"], files)


@dataclass(frozen=True)
class SourceTokenization:
    """How the rows of a split become samples. The attributes are arguments of `build_dataset`."""

    section: DataSection
    tokenizer: PreTrainedTokenizerBase
    options: RowOptions

    def keys(self, entries: Sequence[Entry]) -> list[str]:
        """Return the cache keys of the sources."""
        tokenizer_hash, plugins = hash_tokenizer(self.tokenizer), list(self.section.external_plugins)
        keys = []
        for entry in entries:
            name = entry.name
            with _quiet_datasets(), phase(f"Opening {name.text}", is_main=True):
                state = describe_source(name, use_hf=self.options.use_hf)
            shown = str(Path(name.location).resolve()) if name.kind == "path" else name.location
            key = [shown, *name.parts, name.hub or "", "HF" if self.options.use_hf else "MS"]
            keys.append(fingerprint(json.dumps(key), state, tokenizer_hash, self._key_options(entry), plugins))
        return keys

    def _key_options(self, entry: Entry) -> dict[str, Any]:
        """Return all that determines a source's samples beside the files, the tokenizer and the plugins."""
        options = self.options
        names = ("max_length", "teacher_max_length", "truncation_strategy", "loss_scale", "data_errors")
        return {name: getattr(self.section, name) for name in (*names, "chat_template_kwargs")} | {
            "prompts": [options.allows_prompts, options.skips_prompts, options.has_unused_responses],
            "system": read_system(self.section.system),
            "prompt_limits": None if options.prompt_limits is None else asdict(options.prompt_limits),
            "tag_key": options.tag_key,
            "vocab_size": options.vocab_size,
            "images": None if options.images is None else options.images.settings,
            "entry": asdict(entry.options),
            "selection": entry.selection.key,
        }

    def write(self, entry: Entry, parts: Path, out: Path, *, is_main: bool = False, digest: str | None = None) -> None:
        """Write the samples of a source, and its report, into `out`.

        Args:
            entry: of the source.
            parts: folder of the finished shards, which stay if this process is killed.
            out: an empty folder.
            is_main: whether this rank shows its progress.
            digest: the hash that the samples must have; None: any.

        Raises:
            UserError: a row is bad and may not be skipped, no row is used, or the samples have another hash.
        """
        section = self.section
        name = Path(entry.name.text).name
        with _quiet_datasets():
            with phase(f"Reading {name}", is_main=is_main):
                source, chosen = self._choose(entry, parts.parent / "source")
            # `out` is a folder in that of the unfinished cache, which is beside the cache folders.
            store = ImageStore(source.base, out.parents[1] / _STORED_IMAGES)
            writer = ShardWriter(
                source, RowTokenizer(self.tokenizer, source.is_json, section, self.options, store, entry.options), parts
            )
            with phase(f"Tokenizing {name}", is_main=is_main, unit="rows") as shown:
                summaries = tokenize_shards(writer, section.preprocessing_num_workers, shown.update)
            try:
                report = _report(source, summaries, section.data_errors)
                stored = StoredReport(report, hash_texts(summary.digest for summary in summaries), source.parts)
                if digest is not None and stored.digest != digest:
                    raise UserError(describe_other_rows(source.name))
            except UserError:
                shutil.rmtree(parts)  # the same file gives the same rows again, so the shards are of no use
                parts.mkdir()
                raise
            used = [writer.path(shard) for shard, summary in enumerate(summaries) if summary.used]
            rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in used])
            rows.save_to_disk(str(out / _ROWS))
            source_rows = read_column(rows, "source_row")
            order = chosen.order(source_rows)
            if order is not None:
                np.save(out / _ORDER, order)
                again = len(np.unique(source_rows[np.isin(source_rows, chosen.rest)]))
                report = replace(report, drawn=chosen.passes * report.rows_used + again)
                stored = replace(stored, report=report)
        (out / _REPORT).write_text(json.dumps(asdict(stored)), encoding="utf-8")

    def _choose(self, entry: Entry, scratch: Path) -> tuple[Source, Chosen]:
        """Open a source, and choose the rows of the split."""
        columns = entry.options.columns
        source = open_source(entry.name, scratch, use_hf=self.options.use_hf, columns=columns)
        selection = entry.selection
        rows = np.arange(len(source)) if selection.key is None else source.find_rows()
        if len(rows) == 0:
            raise UserError(f"{source.name}: yields nothing to train on: it has no rows")
        require_columns(source, columns)
        try:
            chosen = selection.choose(rows)
        except ValueError as error:
            raise UserError(f"data.split_dataset_ratio = {selection.ratio}: {source.name}: {error}") from error
        return source.select(chosen.rows), chosen


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
    pieces = sum(summary.pieces for summary in summaries)
    used -= pieces  # rows, not samples
    first_special = next((summary.first_special for summary in summaries if summary.first_special is not None), None)
    forms = sum((Counter(summary.forms) for summary in summaries), Counter[str]())
    report = DataReport(
        used + dropped.total(),
        used,
        dict(sorted(dropped.items())),
        shortened,
        first,
        images=sum(summary.images for summary in summaries),
        pieces=pieces,
        conversations=sum(summary.conversations for summary in summaries),
        forms=dict(forms),
        truncated=sum(summary.truncated for summary in summaries),
        special=sum(summary.special for summary in summaries),
        first_special=None if first_special is None else f"{source.locate(first_special[0])}: {first_special[1]}",
    )
    if used == 0:
        raise UserError(f"{source.name}: yields nothing to train on: {report.summary()}")
    return report


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Disable what `datasets` prints: progress bars that count its own batches, and logs of errors that it raises."""
    hide, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if hide:
            datasets.enable_progress_bars()
