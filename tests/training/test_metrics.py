"""What a run says about its samples."""

from __future__ import annotations

from megatron_gkd.training.metrics import MismatchWarning


def test_a_mismatch_is_told_once_in_a_while():
    warning = MismatchWarning(0.1)
    assert [warning.of_step(step, value) for step, value in enumerate((None, 0.0, 0.1, -0.1), start=1)] == [None] * 4
    told = [step for step in range(5, 25) if warning.of_step(step, -0.2 if step % 2 else 0.2)]
    assert told == [5, 6, 8, 12, 20]
    text = MismatchWarning(0.1).of_step(9, 0.25)
    assert "step 9: mismatch_kl = 0.25" in text and "rollout.mismatch_kl_threshold = 0.1" in text


def test_without_a_threshold_nothing_is_told():
    assert MismatchWarning(None).of_step(1, 5.0) is None
