"""Microbatches whose responses the student has just sampled itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.loader import SampleDataset, StepOrder, filler, require_responses
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.microbatch_planner import MicrobatchPlanner
from megatron_gkd.data.prompt import answered, prompt_of, room_for_answer
from megatron_gkd.data.sample import FROM_DATASET, FROM_STUDENT, Sample
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.rollout.base import (
    BackgroundEngine,
    Completion,
    Generation,
    OnCompletion,
    RolloutEngine,
    RolloutFailed,
    Sampling,
    check_completions,
)
from megatron_gkd.runtime import portability

if TYPE_CHECKING:
    from megatron_gkd.training.student import Student

Truncated = Literal["keep", "mask", "drop"]

_PROBE_INTERVAL, _PROBE_TOKENS = 10, 64  # steps sampled ahead from one probe to the next; most tokens of a row in one


@dataclass(frozen=True)
class Answer:
    """What the student said to the prompt (int64 [P]) of one row of the dataset.

    `is_trained_on` is false for a truncated one that is masked or dropped.
    """

    row: int
    prompt: np.ndarray
    completion: Completion
    is_trained_on: bool


@dataclass(frozen=True)
class RolloutReport:
    """What sampling was like in one step, over all data-parallel ranks.

    Attributes:
        answers: by position in the global batch.
        bins: the positions in each microbatch of this data-parallel rank.
        seconds: that the step waited for it; generation_seconds: that it took.
        staleness: how many updates old the weights were, on average.
    """

    student_rows: int
    dataset_rows: int
    seconds: float
    generation_seconds: float
    staleness: float
    tokens: int
    truncated: int
    log_prob: float  # sum over the student's tokens that are trained on, in nats, as the engine has it
    answers: dict[int, Answer]
    bins: list[list[int]]

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
            "rollout_tokens_per_second": self.tokens / max(self.generation_seconds, 1e-9),
            "mean_completion_length": self.tokens / max(self.student_rows, 1),
            "truncated_share": self.truncated / max(self.student_rows, 1),
            "staleness": self.staleness,
        }


@dataclass
class Finished:
    """A `Generation` whose completions are there."""

    completions: list[Completion]
    seconds: float = 0.0

    def result(self) -> list[Completion]:
        return self.completions


class Rollouts:
    """Makes the steps in which the student answers.

    Args:
        engine: samples completions. Its ranks of one replica are asked together; replicas share the prompts out.
        lambda_schedule: which rows of which step the student answers.
        dataset, order: where prompts and the other rows come from.
        config: how the global batch becomes this rank's microbatches.
        sampling: `max_completion_length` is cut to what a sequence of `config.max_length` tokens leaves.
        teacher_max_length: the same of a row's `teacher_prompt` with the answer behind it; None: `config.max_length`.
        truncated: completions without an end are trained on ("keep"), kept without labels ("mask"), or left out.
        dp: the data-parallel group.
        steps_ahead: 1 has a `BackgroundEngine` sample a step while the one before it trains.
        num_steps: of the whole run; steps behind it are not begun.
        tensors: what of the student the engine is given.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        lambda_schedule: LambdaSchedule,
        dataset: SampleDataset,
        order: StepOrder,
        config: BatchConfig,
        sampling: Sampling,
        *,
        truncated: Truncated,
        dp: dist.ProcessGroup,
        steps_ahead: int = 0,
        num_steps: int | None = None,
        teacher_max_length: int | None = None,
        tensors: Callable[[MegatronModel], Iterable[tuple[str, Tensor]]] = MegatronModel.named_tensors,
    ):
        self.engine, self.lambda_schedule, self.dataset, self.order = engine, lambda_schedule, dataset, order
        self.config, self.sampling, self.global_batch_size = config, sampling, config.global_batch_size
        self.truncated, self.dp = truncated, dp
        self.steps_ahead, self.num_steps, self.tensors = steps_ahead, num_steps, tensors
        self.on_sample: Callable[[Sample], None] | None = None
        """Called by a `BackgroundEngine`'s threads for each sample that is ready while others are not, where one rank
        of each replica asks for them: a teacher may begin with it."""
        self._begun: dict[int, Generation] = {}
        self._probe_calls = 0
        self._version: int | None = None
        self.teacher_max_length = teacher_max_length or config.max_length

    def due(self, step: int) -> bool:
        """Whether the student answers any row of `step`, counted from 0. The same on every rank."""
        return self.lambda_schedule.any(step, self.global_batch_size)

    def load_weights(self, student: Student, version: int) -> float:
        """Sample from the student as it is, after `version` updates. Nothing to do the second time.

        Returns the seconds it took.
        """
        start = time.perf_counter()
        if version != self._version:
            student.gather_parameters()
            self.engine.load_weights(self.tensors(student.model), version)
            self._version = version
        return time.perf_counter() - start

    def is_early(self, step: int) -> bool:
        """Whether `step` is to begin while the step before it trains. The same on every rank."""
        return self.steps_ahead > 0 and (self.num_steps is None or step < self.num_steps) and self.due(step)

    def probe_mismatch(self, student: Student, step: int) -> float | None:
        """Return `mismatch_kl` (see ``metrics.describe_rollouts``) of a few rows, sampled from the newest weights.

        Samples that are made ahead are older than the weights that could score them, so steps of them do not measure
        it. Every tenth call, from the second on, the engine samples the beginnings of some answers of `step`, which the
        student scores before it changes; None in other calls, or where no token was sampled. All ranks must call it
        together, once the student's weights are loaded and before `step` begins.
        """
        self._probe_calls += 1
        if self._probe_calls % _PROBE_INTERVAL != 2:
            return None
        rows = self.order.rows_of_step(step, self.global_batch_size)
        config = self.config
        count = config.micro_batch_size * config.dp_size * config.microbatch_multiple
        positions = [int(position) for position in np.flatnonzero(self.lambda_schedule.rows(step, len(rows)))][:count]
        short = replace(self.sampling, max_completion_length=min(_PROBE_TOKENS, self.sampling.max_completion_length))
        completions = self._sample_now(step, positions, short)
        samples = [answered(self.dataset[rows[position]], done.token_ids) for position, done in completions.items()]
        samples += [filler(config.pad_token_id)] * (count - len(samples))
        lengths = [len(sample.input_ids) for sample in samples]
        microbatches = MicrobatchPlanner(config).make_microbatches(lengths, samples.__getitem__)
        microbatches = [microbatch.to(portability.device()) for microbatch in microbatches]
        totals = student.evaluate(microbatches, [None] * len(microbatches))
        log_prob = sum(sum(done.log_probs) for done in completions.values())
        return (log_prob + totals["student_cross_entropy"]) / totals["tokens"] if totals["tokens"] else None

    def _sample_now(self, step: int, positions: list[int], sampling: Sampling) -> dict[int, Completion]:
        """Sample these positions of a step, shared out over the data-parallel ranks; in rising order on all of them."""
        rows = self.order.rows_of_step(step, self.global_batch_size)
        mine = positions[self.dp.rank() :: self.dp.size()]
        prompts = [self._prompt(rows[position]).tolist() for position in mine]
        with self.engine.resident():
            found = self.engine.generate(prompts, sampling, [self._seed(step, position) for position in mine])
        return dict(sorted(self._exchange(rows, mine, found).items()))

    def _exchange(self, rows: list[int], mine: list[int], completions: list[Completion]) -> dict[int, Completion]:
        """Return the completions of all data-parallel ranks by position, within the room that their rows leave."""
        found = [
            (position, completion.within(self._room(self.dataset[rows[position]])))
            for position, completion in zip(mine, completions, strict=True)
        ]
        everything: list[list] = [[] for _ in range(self.dp.size())]
        dist.all_gather_object(everything, found, group=self.dp)
        return {position: completion for part in everything for position, completion in part}

    def has_begun(self, step: int) -> bool:
        return step in self._begun

    def begin(self, step: int) -> None:
        """Sample `step` in the background, from the weights that are loaded; ``microbatches`` waits for the end."""
        mine, prompts, seeds = self._questions(step)
        on_completion = None if self.on_sample is None else self._announcing(step, mine)
        prompts = [prompt.tolist() for prompt in prompts]
        self._begun[step] = self.engine.start(prompts, self.sampling, seeds, on_completion)

    def _announcing(self, step: int, positions: list[int]) -> OnCompletion:
        rows = self.order.rows_of_step(step, self.global_batch_size)
        sources = [self.dataset[rows[position]] for position in positions]  # threads should not read the dataset

        def announce(index: int, completion: Completion) -> None:
            sample, trained = self._sample(sources[index], completion.within(self._room(sources[index])))
            if trained:
                self.on_sample(sample)

        return announce

    def progress(self) -> dict[str, Any]:
        """Return the completions that were begun for later steps, waiting for them. All ranks must call it together.

        Otherwise a resumed run would sample them from newer weights than this one.
        """
        begun = {}
        for step in sorted(self._begun):
            rows = self.order.rows_of_step(step, self.global_batch_size)
            mine, _, _ = self._questions(step)
            generation = self._begun[step]
            completions = self._exchange(rows, mine, generation.result())
            self._begun[step] = Finished([completions[position] for position in mine], generation.seconds)
            begun[str(step)] = {str(position): asdict(one) for position, one in sorted(completions.items())}
        return {"begun": begun, "probe_calls": self._probe_calls}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go on from what `progress` returned, under any layout."""
        self._probe_calls = progress["probe_calls"]
        for step, completions in progress["begun"].items():
            mine, _, _ = self._questions(int(step))
            self._begun[int(step)] = Finished([Completion(**completions[str(position)]) for position in mine])

    def close(self) -> None:
        if isinstance(self.engine, BackgroundEngine):
            self.engine.close()

    def microbatches(self, step: int) -> tuple[list[Microbatch], RolloutReport]:
        """Sample, exchange between the data-parallel ranks, and cut. All ranks must call it together.

        Raises:
            UserError: a prompt leaves no room for an answer, or a row that the student does not answer has no response.
            RolloutFailed: there are no samples, or of other weights than it should be.
        """
        rows = self.order.rows_of_step(step, self.global_batch_size)
        samples: dict[int, Sample] = {}
        start = time.perf_counter()
        completions, generation_seconds = self._complete(step)
        seconds = time.perf_counter() - start
        log_prob, answers = 0.0, {}
        for position, completion in completions.items():
            sample, trained = self._sample(self.dataset[rows[position]], completion)
            samples[position] = sample
            log_prob += sum(completion.log_probs) if trained else 0.0
            answers[position] = Answer(rows[position], self._prompt(rows[position]), completion, trained)
        lengths = [
            len(samples[i].input_ids) if i in samples else int(self.dataset.lengths[row]) for i, row in enumerate(rows)
        ]
        planner = MicrobatchPlanner(self.config)
        bins = planner.plan(lengths)
        microbatches = planner.build(bins, lambda i: samples[i] if i in samples else self.dataset[rows[i]])
        found = list(completions.values())
        return microbatches, RolloutReport(
            student_rows=len(found),
            dataset_rows=len(rows) - len(found),
            seconds=seconds,
            generation_seconds=generation_seconds,
            staleness=sum(step - completion.version for completion in found) / max(len(found), 1),
            tokens=sum(len(completion.token_ids) for completion in found),
            truncated=sum(completion.finish_reason == "length" for completion in found),
            log_prob=log_prob,
            answers=answers,
            bins=bins,
        )

    def _complete(self, step: int) -> tuple[dict[int, Completion], float]:
        """The completion of every position, whichever data-parallel rank sampled it; and the seconds it took."""
        rows = self.order.rows_of_step(step, self.global_batch_size)
        mine, prompts, seeds = self._questions(step)
        start = time.perf_counter()
        if step not in self._begun and isinstance(self.engine, BackgroundEngine):
            self.begin(step)
        if step in self._begun:
            generation = self._begun.pop(step)
            completions, seconds = generation.result(), generation.seconds
        else:
            with self.engine.resident():
                completions = self.engine.generate([prompt.tolist() for prompt in prompts], self.sampling, seeds)
            seconds = time.perf_counter() - start
        together = self._exchange(rows, mine, completions)
        check_completions(together.values(), self.sampling.vocab_size)
        for completion in together.values():
            if not step - self.steps_ahead <= completion.version <= step:
                raise RolloutFailed(
                    f"step {step + 1}: a sample is of the student after {completion.version} updates; allowed are "
                    f"{step - self.steps_ahead} to {step}"
                )
        return together, seconds

    def _questions(self, step: int) -> tuple[list[int], list[np.ndarray], list[int]]:
        """Positions in the global batch that this data-parallel rank samples, and their prompts and seeds.

        Raises:
            UserError: in all ranks, as each checks the rows of all; see ``microbatches``.
        """
        rows = self.order.rows_of_step(step, self.global_batch_size)
        is_sampled = self.lambda_schedule.rows(step, len(rows))
        require_responses(self.dataset, [rows[position] for position in np.flatnonzero(~is_sampled)], step)
        prompts = {int(position): self._prompt(rows[position]) for position in np.flatnonzero(is_sampled)}
        mine = list(prompts)[self.dp.rank() :: self.dp.size()]
        return mine, [prompts[position] for position in mine], [self._seed(step, position) for position in mine]

    def _prompt(self, row: int) -> np.ndarray:
        sample = self.dataset[row]
        self._room(sample)
        return prompt_of(sample)

    def _room(self, sample: Sample) -> int:
        return room_for_answer(sample, self.config.max_length, self.teacher_max_length)

    def _seed(self, step: int, position: int) -> int:
        """Of one row of one step: whatever rank samples it, and in whatever company."""
        return int(
            np.random.SeedSequence([self.lambda_schedule.seed, step, position]).generate_state(1, np.uint64)[0] >> 1
        )

    def _sample(self, source: Sample, completion: Completion) -> tuple[Sample, bool]:
        """The sample, and whether it is trained on."""
        trained = completion.finish_reason == "stop" or self.truncated == "keep"
        if not trained and self.truncated == "drop":
            return filler(self.config.pad_token_id), False
        return answered(source, completion.token_ids, trained=trained), trained
