"""A tokenized dataset, read from memory-mapped Arrow files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np

from megatron_gkd.data.columns import IMAGES
from megatron_gkd.data.loss_weights import read_weights
from megatron_gkd.data.prompt import prompt_length
from megatron_gkd.data.sample import FROM_DATASET, Sample
from megatron_gkd.data.sources import Part
from megatron_gkd.data.sources.source import locate
from megatron_gkd.data.vision.image import from_record

_SCANNED_ROWS = 1000  # rows of one reading where all are looked at


class TokenizedDataset:
    """Samples of one or more sources, one after the other, read from memory-mapped Arrow files.

    Args:
        parts: the samples of each source.
        digests: a hash of each source's samples.
        files: the files of each source, for messages.

    Attributes:
        sizes: number of samples of each source.
        digests: a hash of each source's samples.
        source_rows: int64 [rows], the number, in the files of its source, of the row that each sample was made of.
        lengths: int64 [rows], tokens of each sample.
        num_labels: int64 [rows], labels of each sample that are not -100.
        teacher_lengths: int64 [rows], tokens of each sample as the teacher reads it, where that has a prompt of its
            own; else 0.
        num_patches: int64 [rows], patches of the images that each sample has for the student or the teacher, whichever
            are more.
        num_videos: int64 [rows], videos among these images.
        tags: the tags that rows have.
    """

    def __init__(
        self,
        parts: Sequence[datasets.Dataset],
        digests: Sequence[str],
        files: Sequence[tuple[Part, ...]] = (),
    ) -> None:
        self.digests, self._files = list(digests), list(files)
        rows = datasets.concatenate_datasets(list(parts))
        has_images = "images" in rows.column_names
        self.num_patches = read_column(rows, "num_patches") if has_images else np.zeros(len(rows), np.int64)
        self.num_videos = read_column(rows, "num_videos") if has_images else np.zeros(len(rows), np.int64)
        self._images = rows.select_columns(list(IMAGES)).with_format(None) if has_images else None
        self._rows = rows.remove_columns(list(IMAGES) if has_images else []).with_format("numpy")
        self.sizes = [len(part) for part in parts]
        self.lengths = read_column(self._rows, "length")
        self.num_labels = read_column(self._rows, "num_labels")
        self.teacher_lengths = read_column(self._rows, "teacher_length")
        self.source_rows = read_column(self._rows, "source_row")
        self.tags = frozenset(tag for tag in _arrow_column(self._rows, "tag").unique().to_pylist() if tag)

    def __len__(self) -> int:
        return len(self._rows)

    def measure_prompts(self) -> np.ndarray:
        """Return int64 [rows], the tokens of each sample's prompt: see ``extract_prompt``."""
        found = np.zeros(len(self), np.int64)
        table = self._rows.with_format("arrow")
        for first in range(0, len(self), _SCANNED_ROWS):
            columns = table[first : first + _SCANNED_ROWS]
            pairs = zip(columns["labels"], columns["response_start"].to_pylist(), strict=True)
            for offset, (labels, start) in enumerate(pairs):
                found[first + offset] = prompt_length(labels.values.to_numpy()) if start < 0 else start
        return found

    def locate(self, index: int) -> str:
        """Return the place of the row that a sample was made of, for messages: `train.jsonl, line 3`."""
        ends = np.cumsum(self.sizes)
        source = int(np.searchsorted(ends, index, side="right"))
        return locate(self._files[source], int(self.source_rows[index]))

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
        tag = str(row["tag"]) or None
        sample = Sample(input_ids, labels, FROM_DATASET, int(index), teacher_prompt, tag, **read_weights(row))
        if self._images is None:
            return sample
        found = self._images[int(index)]
        images, teacher_images = (tuple(map(from_record, found[name])) for name in IMAGES)
        return replace(sample, images=images, teacher_images=teacher_images if has_teacher_prompt else None)


def read_column(rows: datasets.Dataset, name: str) -> np.ndarray:
    """Return a column of numbers as int64 [rows]."""
    return np.asarray(_arrow_column(rows, name), dtype=np.int64) if len(rows) else np.zeros(0, np.int64)


def _arrow_column(rows: datasets.Dataset, name: str) -> Any:
    """Return a column alone: of rows that are repeated, reading some copies them."""
    return rows.select_columns([name]).with_format("arrow")[:][name]
