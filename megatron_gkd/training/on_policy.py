"""Microbatches whose responses the student has just sampled itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch.distributed as dist

from megatron_gkd.data.cutting import Cutting
from megatron_gkd.data.loader import SampleDataset, StepOrder, filler, require_responses
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.policy import OnPolicy
from megatron_gkd.data.prompt import answered, prompt_of
from megatron_gkd.data.sample import FROM_DATASET, FROM_STUDENT, Sample
from megatron_gkd.errors import UserError
from megatron_gkd.rollout.base import Completion, RolloutEngine, Sampling

Truncated = Literal["keep", "mask", "drop"]


@dataclass(frozen=True)
class RolloutReport:
    """What sampling was like in one step, over all data-parallel ranks."""

    student_rows: int
    dataset_rows: int
    seconds: float
    tokens: int
    truncated: int
    log_prob: float  # sum over the student's tokens that are trained on, in nats, as the engine has it

    def record(self) -> dict[str, float | int | str]:
        """As a step's record shows it."""
        source = {(False, True): FROM_DATASET, (True, False): FROM_STUDENT}.get(
            (self.student_rows > 0, self.dataset_rows > 0), "mixed"
        )
        return {
            "source": source,
            "student_rows": self.student_rows,
            "dataset_rows": self.dataset_rows,
            "rollout_time_s": self.seconds,
            "rollout_tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "mean_completion_length": self.tokens / max(self.student_rows, 1),
            "truncated_share": self.truncated / max(self.student_rows, 1),
        }


class Rollouts:
    """Makes the steps in which the student answers.

    Args:
        engine: samples completions. Its ranks of one replica are asked together; replicas share the prompts out.
        policy: which rows of which step the student answers.
        dataset, order: where prompts and the other rows come from.
        cutting: how the global batch becomes this rank's microbatches.
        sampling: `max_completion_length` is cut to what a sequence of `cutting.max_length` tokens leaves.
        truncated: completions without an end are trained on ("keep"), kept without labels ("mask"), or left out.
        dp: the data-parallel group.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: OnPolicy,
        dataset: SampleDataset,
        order: StepOrder,
        cutting: Cutting,
        sampling: Sampling,
        *,
        global_batch_size: int,
        truncated: Truncated,
        dp: dist.ProcessGroup,
    ):
        self.engine, self.policy, self.dataset, self.order = engine, policy, dataset, order
        self.cutting, self.sampling, self.global_batch_size = cutting, sampling, global_batch_size
        self.truncated, self.dp = truncated, dp

    def due(self, step: int) -> bool:
        """Whether the student answers any row of `step`, counted from 0. The same on every rank."""
        return self.policy.any(step, self.global_batch_size)

    def microbatches(self, step: int) -> tuple[list[Microbatch], RolloutReport]:
        """Sample, exchange between the data-parallel ranks, and cut. All ranks must call it together.

        Raises:
            UserError: a prompt leaves no room for an answer, or a row that the student does not answer has no response.
        """
        rows = self.order.rows_of_step(step, self.global_batch_size)
        mine = self.policy.rows(step, len(rows))
        samples: dict[int, Sample] = {}
        start = time.perf_counter()
        completions = self._complete(step, rows, [int(i) for i in np.flatnonzero(mine)])
        seconds = time.perf_counter() - start
        log_prob = 0.0
        for position, completion in completions.items():
            sample, trained = self._sample(rows[position], completion)
            samples[position] = sample
            log_prob += sum(completion.log_probs) if trained else 0.0
        require_responses(self.dataset, [rows[position] for position in np.flatnonzero(~mine)], step)
        lengths = [
            len(samples[i].input_ids) if i in samples else int(self.dataset.lengths[row]) for i, row in enumerate(rows)
        ]
        cut = self.cutting.microbatches(lengths, lambda i: samples[i] if i in samples else self.dataset[rows[i]])
        found = list(completions.values())
        return cut, RolloutReport(
            student_rows=len(found),
            dataset_rows=len(rows) - len(found),
            seconds=seconds,
            tokens=sum(len(completion.token_ids) for completion in found),
            truncated=sum(completion.finish_reason == "length" for completion in found),
            log_prob=log_prob,
        )

    def _complete(self, step: int, rows: list[int], positions: list[int]) -> dict[int, Completion]:
        """The completion of every position, whichever data-parallel rank sampled it."""
        mine = positions[self.dp.rank() :: self.dp.size()]
        prompts = [self._prompt(rows[position]) for position in mine]
        seeds = [self._seed(step, position) for position in mine]
        with self.engine.resident():
            completions = self.engine.generate([prompt.tolist() for prompt in prompts], self.sampling, seeds)
        found = [
            (position, self._within_length(prompt, completion))
            for position, prompt, completion in zip(mine, prompts, completions, strict=True)
        ]
        everything: list[list] = [[] for _ in range(self.dp.size())]
        dist.all_gather_object(everything, found, group=self.dp)
        return {position: completion for part in everything for position, completion in part}

    def _prompt(self, row: int) -> np.ndarray:
        prompt = prompt_of(self.dataset[row])
        if len(prompt) >= self.cutting.max_length:
            raise UserError(
                f"row {row} of the dataset: its prompt of {len(prompt)} tokens leaves no room for an answer in "
                f"data.max_length = {self.cutting.max_length}"
            )
        return prompt

    def _within_length(self, prompt: np.ndarray, completion: Completion) -> Completion:
        room = self.cutting.max_length - len(prompt)
        if len(completion.token_ids) <= room:
            return completion
        return Completion(completion.token_ids[:room], completion.log_probs[:room], "length", completion.version)

    def _seed(self, step: int, position: int) -> int:
        """Of one row of one step: whatever rank samples it, and in whatever company."""
        return int(np.random.SeedSequence([self.policy.seed, step, position]).generate_state(1, np.uint64)[0] >> 1)

    def _sample(self, row: int, completion: Completion) -> tuple[Sample, bool]:
        """The sample, and whether it is trained on."""
        trained = completion.finish_reason == "stop" or self.truncated == "keep"
        if not trained and self.truncated == "drop":
            return filler(self.cutting.pad_token_id), False
        return answered(self.dataset[row], completion.token_ids, trained=trained), trained
