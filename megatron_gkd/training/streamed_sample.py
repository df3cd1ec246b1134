"""The first rows of streams, for a report without a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.prompt import prompt_length
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.streams.opening import Streams
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.training.setup import Models, row_options

SAMPLED_ROWS = 1000


class StreamedSample:
    """Rows of streams that are drawn, with the same attributes as a `TokenizedDataset` has.

    Args:
        samples: the rows.
        places: where each of them is written.
    """

    def __init__(self, samples: Sequence[Sample], places: Sequence[str]) -> None:
        self._samples, self._places = samples, places
        self.lengths = np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
        self.num_labels = np.array([sample.num_labels for sample in samples], dtype=np.int64)
        self.teacher_lengths = np.array(
            [0 if sample.teacher_prompt is None else len(teacher_view(sample).input_ids) for sample in samples],
            dtype=np.int64,
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def measure_prompts(self) -> np.ndarray:
        """Return int64 [rows], the tokens of each sample's prompt."""
        starts = [
            prompt_length(sample.labels) if sample.response_start is None else sample.response_start
            for sample in self._samples
        ]
        return np.array(starts, dtype=np.int64)

    def locate(self, index: int) -> str:
        """Return the place of a row: `train.jsonl, line 3`."""
        return self._places[index]


def sample_streams(recipe: Recipe, models: Models, count: int) -> tuple[StreamedSample, DataReport]:
    """Return the first `count` rows that a run draws, at most one pass over the sources, and their counts.

    Raises:
        UserError: a source cannot be read, a row is bad, or no row is used.
    """
    streams = Streams.open(recipe.data, models.tokenizer, row_options(recipe, models, "train"))
    samples: list[Sample] = []
    places: list[str] = []
    with closing(streams.feed(streams.start(), seed=recipe.train.seed, rows_ahead=0)) as feed:
        for _ in range(count):
            report = feed.report()
            (row,) = feed.take(1)
            if row.epoch or row.sample is None:
                return StreamedSample(samples, places), report
            samples.append(row.sample)
            places.append(feed.locate(row))
        return StreamedSample(samples, places), feed.report()
