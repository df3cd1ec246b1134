"""Measure whether the rollout engine computes what the trainer computes, while samples are made ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_gkd.data.loader import padding_sample
from megatron_gkd.data.microbatch_planner import MicrobatchPlanner
from megatron_gkd.data.prompt import replace_response
from megatron_gkd.runtime import portability
from megatron_gkd.training.completion_sampler import CompletionSampler
from megatron_gkd.training.step_prompts import StepPrompts

if TYPE_CHECKING:
    from megatron_gkd.training.student import Student

_INTERVAL, _MAX_TOKENS = 10, 64  # calls from one measurement to the next; most tokens of a row in one


class MismatchProbe:
    """Measure `mismatch_kl` in some of the steps whose samples are made ahead (see ``metrics.describe_rollouts``).

    These samples are older than the weights that could score them, so their steps do not measure it.

    Attributes:
        calls: number of calls of `measure` so far, from which a resumed run continues.
    """

    def __init__(self, prompts: StepPrompts, sampler: CompletionSampler) -> None:
        self._prompts, self._sampler = prompts, sampler
        self.calls = 0

    def measure(self, student: Student, step: int) -> float | None:
        """Return the mismatch of a few rows that are sampled from the newest weights, in nats a token.

        In every tenth call, from the second on, the engine samples the beginnings of some responses of `step`, which
        the student scores before it changes; other calls return None, and so does one without a sampled token. All
        ranks must call it together, once the student's weights are loaded and before `step` starts.
        """
        self.calls += 1
        if self.calls % _INTERVAL != 2:
            return None
        prompts, config, sampling = self._prompts, self._prompts.config, self._sampler.sampling
        count = config.micro_batch_size * config.dp_size * config.microbatch_multiple
        requests = dict(list(prompts.requests(step).items())[:count])
        short = replace(sampling, max_completion_length=min(_MAX_TOKENS, sampling.max_completion_length))
        completions = self._sampler.generate(list(requests.values()), short)
        rows = prompts.rows(step)
        samples = [
            replace_response(prompts.dataset[rows[position]], completion.token_ids)
            for position, completion in zip(requests, completions, strict=True)
        ]
        samples += [padding_sample(config.pad_token_id)] * (count - len(samples))
        lengths = [len(sample.input_ids) for sample in samples]
        patches = prompts.count_patches(range(count), dict(enumerate(samples)))
        bins = MicrobatchPlanner(config).plan(lengths, patches)
        microbatches = prompts.build_microbatches(bins, samples.__getitem__)
        microbatches = [microbatch.to(portability.device()) for microbatch in microbatches]
        totals = student.evaluate(microbatches, [None] * len(microbatches))
        log_prob = sum(sum(completion.log_probs) for completion in completions)
        return (log_prob + totals["student_cross_entropy"]) / totals["tokens"] if totals["tokens"] else None
