"""What is measured of the sampling in one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_gkd.data.sample import FROM_DATASET, FROM_STUDENT
from megatron_gkd.rollout.base import Completion


@dataclass(frozen=True)
class SampledRow:
    """A row of the dataset with the student's completion.

    Attributes:
        row: its number in the dataset.
        prompt: int64 [P].
        completion: what the student generated.
        is_trained_on: false for a truncated completion that is masked or dropped.
    """

    row: int
    prompt: np.ndarray
    completion: Completion
    is_trained_on: bool


@dataclass(frozen=True)
class RolloutReport:
    """Numbers of one step's sampling, over all data-parallel ranks.

    Attributes:
        student_rows: number of rows that the student generated.
        dataset_rows: number of the other rows.
        seconds: for which the step waited for the samples.
        generated_tokens: of the whole generation, in the first step that trains on it; 0 in later ones.
        generation_seconds: for which the engine generated them; 0 where this is not known.
        staleness: number of updates since the weights that sampled, on average.
        tokens: of this step's completions.
        truncated: number of completions that reached the maximal length.
        log_prob: sum over the generated tokens that are trained on, in nats, as the engine computes it.
        sampled: by position in the global batch.
        bins: the positions in each microbatch of this data-parallel rank.
    """

    student_rows: int
    dataset_rows: int
    seconds: float
    generated_tokens: int
    generation_seconds: float
    staleness: float
    tokens: int
    truncated: int
    log_prob: float
    sampled: dict[int, SampledRow]
    bins: list[list[int]]

    def record(self) -> dict[str, float | int | str | None]:
        """Return the fields that a step's record has."""
        seconds = self.generation_seconds
        source = {(False, True): FROM_DATASET, (True, False): FROM_STUDENT}.get(
            (self.student_rows > 0, self.dataset_rows > 0), "mixed"
        )
        return {
            "source": source,
            "student_rows": self.student_rows,
            "dataset_rows": self.dataset_rows,
            "rollout_time_s": self.seconds,
            "rollout_tokens_per_second": self.generated_tokens / seconds if seconds else None,
            "mean_completion_length": self.tokens / max(self.student_rows, 1),
            "truncated_share": self.truncated / max(self.student_rows, 1),
            "staleness": self.staleness,
        }
