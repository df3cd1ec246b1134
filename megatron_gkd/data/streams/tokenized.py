"""Tokenization of rows that come from streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from megatron_gkd.data.columns import SOURCE_ROW, STATUS
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.streams.raw_order import Place, RawChunk
from megatron_gkd.data.tokenizing import RowTokenizer

_KEPT_STATUS = ("form", "truncated", "shortened", "conversation", "special", "dropped", "error")


@dataclass(frozen=True)
class StreamedRow:
    """A row of a stream, tokenized.

    Attributes:
        source: number of its source.
        epoch: passes over the source before this one.
        index: number in the source, from 0.
        sample: its tokens; None for a row that is not used.
        num_patches: patches of the images that the student or the teacher reads, whichever are more.
        num_videos: videos among these images.
        form: that the row is written in; empty for one that is not used.
        is_piece: whether another sample of the same row comes before this one.
        truncated: whether the row has lost tokens.
        shortened: whether the prompt lost its start.
        conversation: whether the row is a turn of a chat template.
        special: a special token in a message; see `SpecialTexts.find`.
        dropped: why the row is not used; empty for one that is.
        error: what is wrong with the row; empty unless it is a bad row.
    """

    source: int
    epoch: int
    index: int
    sample: Sample | None = None
    num_patches: int = 0
    num_videos: int = 0
    form: str = ""
    is_piece: bool = False
    truncated: bool = False
    shortened: bool = False
    conversation: bool = False
    special: str = ""
    dropped: str = ""
    error: str = ""


@dataclass(frozen=True)
class TokenizedChunk:
    """The rows of a `RawChunk` in the same order. A row may become several, which follow each other."""

    start: tuple[Place, ...]
    rows: list[StreamedRow]


@dataclass(frozen=True)
class ChunkTokenizer:
    """Tokenize chunks. `tokenizers`: one for each source, all with the same features."""

    tokenizers: Sequence[RowTokenizer]

    def __call__(self, chunk: RawChunk) -> TokenizedChunk:
        """Return the tokenized chunk."""
        records: list[dict[str, Any]] = []
        rows: list[StreamedRow] = []
        for raw in chunk.rows:
            columns = self.tokenizers[raw.source]({name: [value] for name, value in raw.values.items()})
            for number, values in enumerate(zip(*columns.values(), strict=True)):
                record = dict(zip(columns, values, strict=True))
                records.append(record)
                status = {name: record[name] for name in _KEPT_STATUS}
                rows.append(StreamedRow(raw.source, raw.epoch, raw.index, is_piece=number > 0, **status))
        used = self._samples([record for record in records if not record["dropped"]])
        return TokenizedChunk(chunk.start, [row if row.dropped else _with_sample(row, *next(used)) for row in rows])

    def _samples(self, records: Sequence[dict[str, Any]]) -> Iterator[tuple[Sample, int, int]]:
        """Yield the sample of each record, as a `TokenizedDataset` has it, with its patches and videos."""
        if not records:
            return
        features = {name: kind for name, kind in self.tokenizers[0].features.items() if name not in STATUS}
        columns = {name: [record[name] for record in records] for name in features}
        columns |= {name: [0] * len(records) for name in SOURCE_ROW}  # a row's place is known by its number
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features | SOURCE_ROW))
        rows = TokenizedDataset([table], [""])
        for index in range(len(rows)):
            yield rows[index], int(rows.num_patches[index]), int(rows.num_videos[index])


def _with_sample(row: StreamedRow, sample: Sample, num_patches: int, num_videos: int) -> StreamedRow:
    return replace(row, sample=sample, num_patches=num_patches, num_videos=num_videos)
