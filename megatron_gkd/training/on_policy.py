"""Microbatches whose responses the student has just sampled itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch import Tensor

from megatron_gkd.data.loader import padding_sample
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.microbatch_planner import MicrobatchPlanner
from megatron_gkd.data.prompt import replace_response
from megatron_gkd.data.sample import Sample
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.rollout.base import (
    BackgroundEngine,
    Completion,
    Generation,
    OnCompletion,
    RolloutEngine,
    RolloutFailed,
    Sampling,
)
from megatron_gkd.training.completion_sampler import CompletionSampler, SampleRequest
from megatron_gkd.training.mismatch_probe import MismatchProbe
from megatron_gkd.training.rollout_report import RolloutReport, SampledRow
from megatron_gkd.training.step_prompts import StepPrompts

if TYPE_CHECKING:
    from megatron_gkd.training.student import Student

TruncatedMode = Literal["keep", "mask", "drop"]
OnSample = Callable[[Sample], None]


@dataclass(frozen=True)
class RolloutOptions:
    """How the steps' samples are made.

    Attributes:
        sampling: `max_completion_length` is cut to what the models' sequences leave.
        truncated: completions without an end are trained on ("keep"), kept without labels ("mask"), or left out.
        steps_ahead: 1 lets a `BackgroundEngine` sample a step while the one before it trains.
        num_steps: of the whole run; later steps are not started. None: there is no end.
        tensors: yields the student's tensors that the engine loads.
    """

    sampling: Sampling
    truncated: TruncatedMode = "keep"
    steps_ahead: int = 0
    num_steps: int | None = None
    tensors: Callable[[MegatronModel], Iterable[tuple[str, Tensor]]] = MegatronModel.named_tensors


@dataclass
class CompletedGeneration:
    """A `Generation` whose completions are known."""

    completions: list[Completion]
    seconds: float = 0.0

    def result(self) -> list[Completion]:
        """Return the completions."""
        return self.completions


class Rollouts:
    """Make the microbatches of the steps in which the student responds.

    Args:
        engine: samples completions. All ranks of a replica call it together; replicas share the prompts out.
        prompts: of each step.
        options: how the samples are made.
        dp: the data-parallel group.
        on_sample: called by the threads of a `BackgroundEngine` for each sample that is ready while others are not, on
            one rank of each replica: a teacher may score it already.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: StepPrompts,
        options: RolloutOptions,
        dp: dist.ProcessGroup,
        on_sample: OnSample | None = None,
    ) -> None:
        self.engine, self.prompts, self.options, self.on_sample = engine, prompts, options, on_sample
        self._sampler = CompletionSampler(engine, options.sampling, dp)
        self._probe = MismatchProbe(prompts, self._sampler)
        self._begun: dict[int, Generation] = {}
        self._version: int | None = None

    def load_weights(self, student: Student, version: int) -> float:
        """Load the student's weights, those after `version` updates, into the engine, unless it has them.

        Returns:
            The seconds that it took.
        """
        start = time.perf_counter()
        if version != self._version:
            student.gather_parameters()
            self.engine.load_weights(self.options.tensors(student.model), version)
            self._version = version
        return time.perf_counter() - start

    def is_early(self, step: int) -> bool:
        """Return whether `step` is to be sampled while the step before it trains. The same on every rank."""
        steps_ahead, num_steps = self.options.steps_ahead, self.options.num_steps
        return steps_ahead > 0 and (num_steps is None or step <= num_steps) and self.prompts.is_on_policy(step)

    def probe_mismatch(self, student: Student, step: int) -> float | None:
        """Return what `MismatchProbe.measure` returns. All ranks must call it together."""
        return self._probe.measure(student, step)

    def has_begun(self, step: int) -> bool:
        """Return whether `step` is being sampled already."""
        return step in self._begun

    def begin(self, step: int) -> None:
        """Sample `step` in the background, from the weights that are loaded; ``microbatches`` waits for the end."""
        requests = self.prompts.requests(step)
        on_completion = None if self.on_sample is None else self._build_callback(step, requests, self.on_sample)
        self._begun[step] = self._sampler.start(list(requests.values()), on_completion)

    def _build_callback(self, step: int, requests: Mapping[int, SampleRequest], on_sample: OnSample) -> OnCompletion:
        rows, positions = self.prompts.rows(step), self._sampler.share(list(requests))
        sources = [self.prompts.dataset[rows[position]] for position in positions]  # threads must not read the dataset
        limits = [requests[position].max_response_length for position in positions]

        def on_completion(index: int, completion: Completion) -> None:
            sample, is_trained_on = self._build_sample(sources[index], completion.truncate(limits[index]))
            if is_trained_on:
                on_sample(sample)

        return on_completion

    def progress(self) -> dict[str, Any]:
        """Return the completions of later steps that `begin` has started, waiting for them. All ranks must call it.

        Without them a resumed run would sample these steps from newer weights than this one. Steps are counted from 0
        in the result, as in the checkpoints of every release.
        """
        begun = {}
        for step in sorted(self._begun):
            requests, generation = self.prompts.requests(step), self._begun[step]
            completions = self._sampler.gather(list(requests.values()), generation.result())
            self._begun[step] = CompletedGeneration(list(self._sampler.share(completions)), generation.seconds)
            by_position = zip(requests, completions, strict=True)
            begun[str(step - 1)] = {str(position): asdict(completion) for position, completion in by_position}
        return {"begun": begun, "probe_calls": self._probe.calls}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Continue from what `progress` returned, under any layout."""
        self._probe.calls = progress["probe_calls"]
        for key, completions in progress["begun"].items():
            step = int(key) + 1
            own = self._sampler.share(list(self.prompts.requests(step)))
            restored = [Completion(**completions[str(position)]) for position in own]
            self._begun[step] = CompletedGeneration(restored)

    def close(self) -> None:
        """Stop what the engine does in the background."""
        if isinstance(self.engine, BackgroundEngine):
            self.engine.close()

    def microbatches(self, step: int) -> tuple[list[Microbatch], RolloutReport]:
        """Sample `step`, and return this rank's microbatches and a report. All ranks must call it together.

        Raises:
            UserError: see `StepPrompts.requests` and `StepPrompts.build_microbatches`.
            RolloutFailed: the engine fails, or its samples are of other weights than they should be.
        """
        prompts, rows = self.prompts, self.prompts.rows(step)
        requests = prompts.requests(step)
        start = time.perf_counter()
        completions, generation_seconds = self._complete(step, requests)
        seconds = time.perf_counter() - start
        samples: dict[int, Sample] = {}
        sampled: dict[int, SampledRow] = {}
        for position, completion in completions.items():
            row = rows[position]
            samples[position], is_trained_on = self._build_sample(prompts.dataset[row], completion)
            sampled[position] = SampledRow(row, requests[position].prompt, completion, is_trained_on)
        lengths = [
            len(samples[i].input_ids) if i in samples else int(prompts.dataset.lengths[row])
            for i, row in enumerate(rows)
        ]
        bins = MicrobatchPlanner(prompts.config).plan(lengths, prompts.count_patches(rows, samples))
        microbatches = prompts.build_microbatches(
            bins, lambda i: samples[i] if i in samples else prompts.dataset[rows[i]]
        )
        return microbatches, RolloutReport(
            student_rows=len(completions),
            dataset_rows=len(rows) - len(completions),
            seconds=seconds,
            generation_seconds=generation_seconds,
            staleness=sum(step - 1 - one.version for one in completions.values()) / max(len(completions), 1),
            tokens=sum(len(one.token_ids) for one in completions.values()),
            truncated=sum(one.finish_reason == "length" for one in completions.values()),
            log_prob=sum((sum(one.completion.log_probs) for one in sampled.values() if one.is_trained_on), 0.0),
            sampled=sampled,
            bins=bins,
        )

    def _complete(self, step: int, requests: Mapping[int, SampleRequest]) -> tuple[dict[int, Completion], float]:
        """Return the completions of all data-parallel ranks by position, and the seconds that generating them took."""
        start = time.perf_counter()
        if step not in self._begun and isinstance(self.engine, BackgroundEngine):
            self.begin(step)
        if step in self._begun:
            generation = self._begun.pop(step)
            share, seconds = generation.result(), generation.seconds
        else:
            share = self._sampler.generate_share(list(requests.values()))
            seconds = time.perf_counter() - start
        completions = self._sampler.gather(list(requests.values()), share)
        newest = step - 1  # updates before this step
        oldest = newest - self.options.steps_ahead
        for completion in completions:
            if not oldest <= completion.version <= newest:
                raise RolloutFailed(
                    f"step {step}: a sample is of the student after {completion.version} updates; allowed are "
                    f"{oldest} to {newest}"
                )
        return dict(zip(requests, completions, strict=True)), seconds

    def _build_sample(self, source: Sample, completion: Completion) -> tuple[Sample, bool]:
        """Return the sample, and whether it is trained on."""
        is_trained_on = completion.finish_reason == "stop" or self.options.truncated == "keep"
        if not is_trained_on and self.options.truncated == "drop":
            return padding_sample(self.prompts.config.pad_token_id), False
        return replace_response(source, completion.token_ids, trained=is_trained_on), is_trained_on
