"""What a run reports about its samples."""

from __future__ import annotations

import pytest

from megatron_gkd.training.metrics import MismatchWarning, TruncationWarning, describe_rollouts
from megatron_gkd.training.rollout_report import RolloutReport


def test_a_mismatch_warns_at_growing_intervals():
    warning = MismatchWarning(0.1)
    assert [warning.of_step(step, value) for step, value in enumerate((None, 0.0, 0.1, -0.1), start=1)] == [None] * 4
    warned = [step for step in range(5, 25) if warning.of_step(step, -0.2 if step % 2 else 0.2)]
    assert warned == [5, 6, 8, 12, 20]
    text = MismatchWarning(0.1).of_step(9, 0.25)
    assert "step 9: mismatch_kl = 0.25" in text and "rollout.mismatch_kl_threshold = 0.1" in text


def test_without_a_threshold_there_is_no_warning():
    assert MismatchWarning(None).of_step(1, 5.0) is None


def test_truncated_completions_warn_once():
    warning = TruncationWarning("<|endoftext|> (0)")
    assert warning.of_step(1, None) is None
    text = warning.of_step(2, 0.9)
    assert text is not None and text.startswith(
        "step 2: 90% of the completions were truncated at rollout.max_completion_length; they end at <|endoftext|> (0)"
    )
    assert warning.of_step(3, 1.0) is None
    healthy = TruncationWarning("")
    assert healthy.of_step(1, 0.89) is None and healthy.of_step(2, 1.0) is None, "the first sampled step alone"


def report(staleness: float) -> RolloutReport:
    counts = {"student_rows": 2, "dataset_rows": 0, "tokens": 10, "truncated": 0}
    return RolloutReport(
        **counts,
        seconds=1.0,
        generated_tokens=24,
        generation_seconds=1.0,
        staleness=staleness,
        log_prob=-20.0,
        sampled={},
        bins=[],
    )


@pytest.mark.parametrize(
    ("staleness", "mismatch", "stale"), [(0.0, 0.5, None), (1.0, None, 0.5)], ids=["of these weights", "of older ones"]
)
def test_samples_of_older_weights_have_staleness_kl(staleness, mismatch, stale):
    totals = {"tokens": 10.0, "dataset_tokens": 0.0, "dropped_tokens": 0.0, "student_cross_entropy": 25.0}
    record = describe_rollouts(report(staleness), totals, 0.0)
    assert (record["mismatch_kl"], record["staleness_kl"]) == (mismatch, stale)
    for unknown in ({"tokens": 0.0}, {"dropped_tokens": 1.0}):
        record = describe_rollouts(report(staleness), totals | unknown, 0.0)
        assert record["mismatch_kl"] is record["staleness_kl"] is None
