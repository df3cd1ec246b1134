"""The record of a step, from its totals."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_gkd.training.rollout_report import RolloutReport

_NEARLY_ALL = 0.9  # share of truncated completions that is worth a warning


def summarize(totals: Mapping[str, float], *, has_teacher: bool) -> dict[str, float | None]:
    """Return the means of `training.loss.SUMS` over the response tokens, in nats.

    Means over no tokens, and those that need a teacher where there is none, are None.
    """
    tokens, dataset_tokens = totals["tokens"], totals["dataset_tokens"]

    def mean(name: str, *, is_known: bool = True) -> float | None:
        return totals[name] / tokens if tokens and is_known else None

    return {
        "loss": mean("loss"),
        "divergence": mean("divergence", is_known=has_teacher),
        "sft_loss": totals["cross_entropy"] / dataset_tokens if dataset_tokens else None,
        "num_tokens": int(tokens),
        "dropped_tokens": int(totals["dropped_tokens"]),
        "teacher_entropy": mean("teacher_entropy", is_known=has_teacher),
        "student_entropy": mean("student_entropy"),
        "forward_kl": mean("forward_kl", is_known=has_teacher),
        "reverse_kl": mean("reverse_kl", is_known=has_teacher),
        "top1_agreement": mean("top1_agreement", is_known=has_teacher),
    }


def describe_rollouts(
    report: RolloutReport, totals: Mapping[str, float], sync_seconds: float
) -> dict[str, float | int | str | None]:
    """Return what a step with sampled rows adds to its record.

    Both KL values estimate KL(engine || trainer) in nats per token, at temperature 1: the mean of
    ln p_engine - ln p_trainer over the sampled tokens. One of them is None:

    - `mismatch_kl` is of samples from the weights that this step trains. It is near 0 where engine and trainer compute
      the same distribution.
    - `staleness_kl` is of samples from older weights (``steps_ahead``). It includes the effect of the updates in
      between. ``Rollouts.probe_mismatch`` measures `mismatch_kl` in some of these steps.

    The trainer's probabilities are over the ids that student and teacher share. vLLM's are over all ids of the student:
    with it both values include the logarithm of the student's probability mass on the shared ids.

    Args:
        report: of the sampling.
        totals: `training.loss.SUMS` of the step.
        sync_seconds: time that the engine took to get the weights.
    """
    tokens = totals["tokens"] - totals["dataset_tokens"]
    is_known = tokens and not totals["dropped_tokens"]  # the engine's sum includes dropped tokens
    value = (report.log_prob + totals["student_cross_entropy"]) / tokens if is_known else None
    is_stale = report.staleness > 0
    return {
        **report.record(),
        "sync_time_s": sync_seconds,
        "mismatch_kl": None if is_stale else value,
        "staleness_kl": value if is_stale else None,
    }


class MismatchWarning:
    """Warn where the engine does not sample from the student: the first time, the second, the fourth, and so on.

    Args:
        threshold: largest allowed absolute value of `mismatch_kl`, in nats per token; None never warns.

    Attributes:
        count: steps so far that exceeded the threshold.
    """

    def __init__(self, threshold: float | None) -> None:
        self.threshold, self.count = threshold, 0

    def of_step(self, step: int, mismatch_kl: float | None) -> str | None:
        """Return the warning that is due after `step`, if there is one."""
        if self.threshold is None or mismatch_kl is None or not abs(mismatch_kl) > self.threshold:  # NaN is no mismatch
            return None
        self.count += 1
        if self.count & (self.count - 1):
            return None
        return (
            f"step {step}: mismatch_kl = {mismatch_kl:.4g} nats per token exceeds rollout.mismatch_kl_threshold = "
            f"{self.threshold:g} (steps so far: {self.count}): the rollout engine samples from another distribution "
            "than the student's; check its weights, dtype and attention, or raise the threshold if the difference is "
            "intended"
        )


class TruncationWarning:
    """Warn where nearly all completions of the first sampled step have no end.

    Args:
        ends: what ends completions, for people.
    """

    def __init__(self, ends: str) -> None:
        self._ends, self._is_first = ends, True

    def of_step(self, step: int, truncated_share: float | None) -> str | None:
        """Return the warning that is due after `step`, if there is one. `truncated_share`: None without completions."""
        if truncated_share is None or not self._is_first:
            return None
        self._is_first = False
        if truncated_share < _NEARLY_ALL:
            return None
        return (
            f"step {step}: {truncated_share:.0%} of the completions were truncated at rollout.max_completion_length; "
            f"they end at {self._ends}: increase max_completion_length, or name what ends the student's responses in "
            "rollout.stop_token_ids or rollout.stop_words"
        )
