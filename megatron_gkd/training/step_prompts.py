"""The rows of each step, and the prompts among them that the student responds to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.loader import IndexedSamples, StepOrder, require_responses
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.microbatch_planner import MicrobatchPlanner
from megatron_gkd.data.packing import Bin
from megatron_gkd.data.prompt import max_response_length
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.vision.inputs import count_patches
from megatron_gkd.runtime.agreement import run_on_all
from megatron_gkd.training.completion_sampler import SampleRequest


@dataclass(frozen=True)
class StepPrompts:
    """Rows and prompts of the steps, the same on every rank.

    Attributes:
        dataset: where prompts and the other rows come from.
        order: which rows a step has.
        lambda_schedule: to which of them the student responds.
        config: sizes of the batch.
        teacher_max_length: tokens of a row's `teacher_prompt` and the response together; None: `config.max_length`,
            which is that limit for the row's own prompt.
    """

    dataset: IndexedSamples
    order: StepOrder
    lambda_schedule: LambdaSchedule
    config: BatchConfig
    teacher_max_length: int | None = None

    def is_on_policy(self, step: int) -> bool:
        """Return whether the student responds to any row of `step`."""
        return self.lambda_schedule.any(step, self.config.global_batch_size)

    def rows(self, step: int) -> list[int]:
        """Return the dataset's rows by position in the global batch of `step`."""
        return self.order.rows_of_step(step, self.config.global_batch_size)

    def requests(self, step: int) -> dict[int, SampleRequest]:
        """Return what the student is to sample in `step`, by position in the global batch.

        Raises:
            UserError: in all ranks; a prompt leaves no room for a response, or a row that the student does not respond
                to has no response.
        """
        rows = self.rows(step)
        is_sampled = self.lambda_schedule.rows(step, len(rows))
        require_responses(self.dataset, [rows[position] for position in np.flatnonzero(~is_sampled)], step)
        return {
            position: self._build_request(step, position, self.dataset[rows[position]])
            for position in np.flatnonzero(is_sampled).tolist()
        }

    def steps_to_sample(self, step: int, num_steps: int | None) -> list[int]:
        """Return the on-policy steps from `step` to the end of its generation, and of the run.

        Args:
            step: an on-policy step.
            num_steps: of the whole run; None: there is no end.
        """
        stop = self.lambda_schedule.generation_steps(step).stop
        last = stop - 1 if num_steps is None else min(stop - 1, num_steps)
        return [step, *filter(self.is_on_policy, range(step + 1, last + 1))]

    def count_patches(self, rows: Sequence[int], samples: Mapping[int, Sample]) -> list[int]:
        """Return the patches of the images at each position of a batch; nothing where they are not limited.

        Args:
            rows: of the dataset, by position.
            samples: those that take the place of their row, by position.
        """
        if self.config.max_patches is None:
            return []
        return [
            count_patches(samples[position], self.config.images)
            if position in samples
            else int(self.dataset.num_patches[row])
            for position, row in enumerate(rows)
        ]

    def build_microbatches(self, bins: Sequence[Bin], sample_at: Callable[[int], Sample]) -> list[Microbatch]:
        """Build this rank's microbatches; see `MicrobatchPlanner.build`. All ranks must call it together.

        Raises:
            UserError: in all ranks; an image cannot be read, or is not the one that was tokenized.
        """
        planner = MicrobatchPlanner(self.config)
        if self.config.images is None:
            return planner.build(bins, sample_at)
        return run_on_all(lambda: planner.build(bins, sample_at))

    def _build_request(self, step: int, position: int, sample: Sample) -> SampleRequest:
        limit = self.config.max_length
        max_length = max_response_length(sample, limit, self.teacher_max_length or limit)
        # The seed depends neither on the rank that samples the row nor on the other rows.
        first = self.lambda_schedule.generation_steps(step).start
        place = (step - first) * self.config.global_batch_size + position
        sequence = np.random.SeedSequence([self.lambda_schedule.seed, first - 1, place])
        return SampleRequest.from_sample(sample, int(sequence.generate_state(1, np.uint64)[0] >> 1), max_length)
