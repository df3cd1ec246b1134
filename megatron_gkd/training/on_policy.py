"""Microbatches whose responses the student has just sampled itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from megatron_gkd.training.completion_sampler import CompletionSampler, MakeRoom, SampleRequest
from megatron_gkd.training.mismatch_probe import MismatchProbe
from megatron_gkd.training.rollout_report import RolloutReport, SampledRow
from megatron_gkd.training.step_prompts import StepPrompts
from megatron_gkd.training.waiting_completions import WaitingCompletions

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
        steps_ahead: 1 lets a `BackgroundEngine` sample a generation while the step before it trains.
        num_steps: of the whole run; later steps are not started. None: there is no end.
        tensors: yields the student's tensors that the engine loads.
        make_room: frees device memory of the student while the engine samples; see ``StudentOffload.away``.
    """

    sampling: Sampling
    truncated: TruncatedMode = "keep"
    steps_ahead: int = 0
    num_steps: int | None = None
    tensors: Callable[[MegatronModel], Iterable[tuple[str, Tensor]]] = MegatronModel.named_tensors
    make_room: MakeRoom = contextlib.nullcontext


@dataclass(frozen=True)
class _PromptBatch:
    """The prompts that are completed together.

    Attributes:
        steps: that they belong to, rising.
        requests: by step and position in its global batch.
    """

    steps: list[int]
    requests: dict[tuple[int, int], SampleRequest]


@dataclass(frozen=True)
class _Generated:
    """What the report of the first step after a generation counts: all its tokens, and the seconds they took."""

    tokens: int = 0
    seconds: float = 0.0


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
        self._sampler = CompletionSampler(engine, options.sampling, dp, options.make_room)
        self._probe = MismatchProbe(prompts, self._sampler)
        self._begun: tuple[_PromptBatch, Generation] | None = None
        self._waiting = WaitingCompletions()
        self._unreported = _Generated()
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
        is_due = steps_ahead > 0 and (num_steps is None or step <= num_steps) and self.prompts.is_on_policy(step)
        return is_due and not self.has_begun(step)

    def probe_mismatch(self, student: Student, step: int) -> float | None:
        """Return what `MismatchProbe.measure` returns. All ranks must call it together."""
        return self._probe.measure(student, step)

    def has_begun(self, step: int) -> bool:
        """Return whether `step` is sampled already, or being sampled."""
        return step in self._waiting or (self._begun is not None and step in self._begun[0].steps)

    def begin(self, step: int) -> None:
        """Sample the generation of `step`, from that step on, in the background from the weights that are loaded.

        ``microbatches`` waits for the end.
        """
        batch = self._build_batch(step)
        on_completion = None if self.on_sample is None else self._build_callback(batch, self.on_sample)
        self._begun = batch, self._sampler.start(list(batch.requests.values()), on_completion)

    def _build_batch(self, step: int) -> _PromptBatch:
        """Build the batch of what is to be sampled for `step` and the later steps of its generation."""
        steps = self.prompts.steps_to_sample(step, self.options.num_steps)
        steps = [one for one in steps if one not in self._waiting]
        requests = {
            (one, position): request for one in steps for position, request in self.prompts.requests(one).items()
        }
        return _PromptBatch(steps, requests)

    def _build_callback(self, batch: _PromptBatch, on_sample: OnSample) -> OnCompletion:
        """Build the function that passes on the samples of the batch's first step; see `_announce` for later ones."""
        share = self._sampler.share(list(batch.requests.items()))
        rows = self.prompts.rows(batch.steps[0])
        sources = {  # threads must not read the dataset
            index: self.prompts.dataset[rows[position]]
            for index, ((step, position), _) in enumerate(share)
            if step == batch.steps[0]
        }
        limits = [request.max_response_length for _, request in share]

        def on_completion(index: int, completion: Completion) -> None:
            if index not in sources:
                return
            sample, is_trained_on = self._build_sample(sources[index], completion.truncate(limits[index]))
            if is_trained_on:
                on_sample(sample)

        return on_completion

    def _announce(self, step: int) -> None:
        """Pass on this rank's share of the samples of `step`, if they wait already."""
        if self.on_sample is None or step not in self._waiting:
            return
        rows = self.prompts.rows(step)
        for position, completion in self._sampler.share(list(self._waiting[step].items())):
            sample, is_trained_on = self._build_sample(self.prompts.dataset[rows[position]], completion)
            if is_trained_on:
                self.on_sample(sample)

    def progress(self, last_step: int) -> dict[str, Any]:
        """Return the completions of the steps after `last_step`, waiting for them. All ranks must call it.

        Without them a resumed run would sample these steps from newer weights than this one.
        """
        self._receive()
        return {"begun": self._waiting.to_plain(last_step), "probe_calls": self._probe.calls}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Continue from what `progress` returned, under any layout."""
        self._probe.calls = progress["probe_calls"]
        self._waiting.restore(progress["begun"])

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
        completions = self._complete(step)
        seconds = time.perf_counter() - start
        self._announce(step + 1)
        generated, self._unreported = self._unreported, _Generated()
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
            generated_tokens=generated.tokens,
            generation_seconds=generated.seconds,
            staleness=sum(step - 1 - one.version for one in completions.values()) / max(len(completions), 1),
            tokens=sum(len(one.token_ids) for one in completions.values()),
            truncated=sum(one.finish_reason == "length" for one in completions.values()),
            log_prob=sum((sum(one.completion.log_probs) for one in sampled.values() if one.is_trained_on), 0.0),
            sampled=sampled,
            bins=bins,
        )

    def _complete(self, step: int) -> dict[int, Completion]:
        """Return the completions of all data-parallel ranks by position; sample them unless that is done."""
        if not self.has_begun(step):
            if isinstance(self.engine, BackgroundEngine):
                self.begin(step)
            else:
                batch, start = self._build_batch(step), time.perf_counter()
                share = self._sampler.generate_share(list(batch.requests.values()))
                self._keep(batch, share, time.perf_counter() - start)
        if step not in self._waiting:
            self._receive()
        completions = self._waiting[step]
        self._waiting.forget_before(step)
        newest = step - 1  # updates before this step
        oldest = self.prompts.lambda_schedule.generation_steps(step).start - 1 - self.options.steps_ahead
        for completion in completions.values():
            if not oldest <= completion.version <= newest:
                raise RolloutFailed(
                    f"step {step}: a sample is of the student after {completion.version} updates; allowed are "
                    f"{oldest} to {newest}"
                )
        return completions

    def _receive(self) -> None:
        """Wait for the generation that `begin` has started, if there is one. All ranks must call it."""
        if self._begun is not None:
            (batch, generation), self._begun = self._begun, None
            self._keep(batch, generation.result(), generation.seconds)

    def _keep(self, batch: _PromptBatch, share: Sequence[Completion], seconds: float) -> None:
        """Keep the completions of all data-parallel ranks; `share`: this rank's."""
        completions = self._sampler.gather(list(batch.requests.values()), share)
        self._waiting.add(batch.requests, completions)
        self._unreported = _Generated(sum(len(one.token_ids) for one in completions), seconds)

    def _build_sample(self, source: Sample, completion: Completion) -> tuple[Sample, bool]:
        """Return the sample, and whether it is trained on."""
        is_trained_on = completion.finish_reason == "stop" or self.options.truncated == "keep"
        if not is_trained_on and self.options.truncated == "drop":
            return padding_sample(self.prompts.config.pad_token_id), False
        return replace_response(source, completion.token_ids, trained=is_trained_on), is_trained_on
