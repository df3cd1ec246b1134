"""The validation in a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import megatron_gkd.runtime.preload  # noqa: F401  (before Megatron-Core)
from megatron_gkd.training.checkpointing.run_checkpoints import RunCheckpoints
from megatron_gkd.training.loss import SUMS
from megatron_gkd.training.trainer import Trainer


def saved_run(validation, step=4):
    runs = []
    saver = SimpleNamespace(save=lambda step, state, run: runs.append(run) or True)
    saved = SimpleNamespace(description=dict, to_write=dict)
    checkpoints = RunCheckpoints(saver, saved, interval=2, identity={})
    checkpoints.validation = validation
    assert checkpoints.save(step, dict)
    return runs[0]


@pytest.mark.parametrize(
    ("validation", "expected"),
    [((4, 0.5), 0.5), ((2, 0.5), None), ((4, None), None), ((4, float("nan")), None), ((4, float("inf")), None)],
)
def test_only_a_finite_validation_of_the_same_step_counts(validation, expected):
    assert saved_run(validation)["validation"] == expected


@pytest.mark.parametrize(("teacher", "expected"), [(None, 2.5), ("some", 0.5)])
def test_it_is_the_divergence_or_the_loss_without_a_teacher(teacher, expected):
    totals = dict.fromkeys(SUMS, 0.0) | {"tokens": 4.0, "loss": 10.0, "divergence": 2.0}
    trainer = SimpleNamespace(
        data=SimpleNamespace(validation=[[]]),
        teacher=teacher,
        score=lambda microbatches: [],
        student=SimpleNamespace(evaluate=lambda microbatches, signals: totals),
        reporter=SimpleNamespace(validation=lambda record: None),
        checkpoints=SimpleNamespace(validation=(0, None)),
        _report=lambda report: report(),
    )
    Trainer.validate(trainer, 6)
    assert trainer.checkpoints.validation == (6, expected)
