"""The streams that a recipe names, opened on the rank that reads them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import DataSection
from megatron_gkd.data.cache import default_cache_dir, hash_plugin
from megatron_gkd.data.entries import EntryOptions, read_entries
from megatron_gkd.data.plugins import load_plugins
from megatron_gkd.data.streams.ahead import tokenize_chunks
from megatron_gkd.data.streams.feed import FindProblem, OnFirstRows, RowFeed, StreamState
from megatron_gkd.data.streams.raw_order import CHUNK_ROWS, ReadOrder, read_chunks
from megatron_gkd.data.streams.source import StreamSource, open_stream
from megatron_gkd.data.streams.tokenized import ChunkTokenizer
from megatron_gkd.data.tokenizing import RowOptions, RowTokenizer
from megatron_gkd.data.vision.files import ImageStore

STORED_IMAGES = "images"  # the folder of fetched images, in that of the tokenized rows


@dataclass(frozen=True)
class Streams:
    """The opened sources of the training rows, and what makes samples of their rows.

    Attributes:
        section: the recipe's data section.
        sources: those that it names.
        entries: what becomes of the rows of each.
        tokenizer: the student's, a fast one.
        options: what the run requires of its rows.
        scratch: folder of copies, which exists as long as this object.
    """

    section: DataSection
    sources: tuple[StreamSource, ...]
    entries: tuple[EntryOptions, ...]
    tokenizer: PreTrainedTokenizerBase
    options: RowOptions
    scratch: tempfile.TemporaryDirectory[str]

    @classmethod
    def open(cls, section: DataSection, tokenizer: PreTrainedTokenizerBase, options: RowOptions) -> Streams:
        """Open the sources; their rows are not read.

        Raises:
            UserError: a source or a plugin can't be read, or there is no such preprocessor.
        """
        load_plugins(section.external_plugins)
        entries = read_entries(section, "train", seed=options.seed, tag_key=options.tag_key)
        for entry in entries:
            entry.options.find_preprocessor()  # an unknown name is an error here, not in each worker
        folder = _cache_of(section)
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="streams.", dir=folder)
        sources = [
            open_stream(
                entry.name,
                Path(scratch.name) / f"{number:06}",
                use_hf=options.use_hf,
                columns=entry.options.columns,
            )
            for number, entry in enumerate(entries)
        ]
        return cls(section, tuple(sources), tuple(entry.options for entry in entries), tokenizer, options, scratch)

    def preparation(self) -> dict[str, Any]:
        """Return what becomes of the rows before they are tokenized, by the recipe's keys, as JSON values."""
        return {
            "data.columns (of each source)": [dict(entry.columns) for entry in self.entries],
            "data.preprocessor (of each source)": [entry.preprocessor or entry.dataset for entry in self.entries],
            "data.external_plugins (hash of each)": list(map(hash_plugin, self.section.external_plugins)),
        }

    def start(self) -> StreamState:
        """Return the state before the first row."""
        return StreamState.at_start(len(self.sources))

    def feed(
        self,
        state: StreamState,
        *,
        seed: int,
        rows_ahead: int,
        find_problem: FindProblem = lambda row: None,
        on_first: OnFirstRows = lambda rows, report: None,
    ) -> RowFeed:
        """Return what the rows are taken from.

        Args:
            state: where to go on.
            seed: of the order.
            rows_ahead: about as many rows are tokenized before they are taken, where there are workers.
            find_problem: of rows that this run can't use.
            on_first: see `RowFeed`.
        """
        section = self.section
        order = ReadOrder(
            tuple(entry.weight for entry in section.dataset),
            seed,
            section.shuffle_buffer_size if section.shuffle else None,
        )
        workers = section.dataloader_num_workers
        chunks = tokenize_chunks(
            read_chunks(self.sources, order, state.places),
            ChunkTokenizer(list(map(self._row_tokenizer, self.sources, self.entries))),
            workers=workers,
            ahead=workers + -(-rows_ahead // CHUNK_ROWS),
        )
        is_skipping = section.data_errors == "skip"
        return RowFeed(
            chunks, state, self.sources, is_skipping=is_skipping, find_problem=find_problem, on_first=on_first
        )

    def _row_tokenizer(self, source: StreamSource, entry: EntryOptions) -> RowTokenizer:
        store = ImageStore(source.base, _cache_of(self.section) / STORED_IMAGES)
        return RowTokenizer(self.tokenizer, source.is_json, self.section, self.options, store, entry)


def _cache_of(section: DataSection) -> Path:
    return Path(section.dataset_cache_dir).expanduser() if section.dataset_cache_dir else default_cache_dir()
