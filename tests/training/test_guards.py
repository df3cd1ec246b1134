"""What ends a run at once: totals that no teacher's distributions have, and a model that differs from itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from training_layouts import build, trainer_of

from megatron_gkd.config.schema import TeacherSection
from megatron_gkd.errors import UserError
from megatron_gkd.training.guards import Guards

TOTALS = {
    "loss": 30.0,
    "divergence": 30.0,
    "teacher_entropy": 40.0,
    "forward_kl": 20.0,
    "reverse_kl": 25.0,
    "tokens": 10.0,
    "dropped_tokens": 2.0,
}


def test_valid_totals_pass():
    Guards(99, has_teacher=True).check(3, TOTALS, [])
    Guards(99, has_teacher=True).check(3, TOTALS | {"teacher_entropy": 45.95, "forward_kl": -1e-4}, [])  # 10 ln 99
    Guards(99, has_teacher=True).check(3, dict.fromkeys(TOTALS, 0.0), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher_entropy": 47.0},
            "mean entropy is 4.7 nats, which no distribution over 99 tokens has .allowed are 0 to 4.595",
        ),
        ({"teacher_entropy": -1.0}, "mean entropy is -0.1 nats"),
        ({"teacher_entropy": float("nan")}, "mean entropy is nan nats"),
        (
            {"forward_kl": -1.0},
            "forward_kl is -0.1 nats, which is negative: the probabilities of the teacher or the student do not",
        ),
        ({"reverse_kl": -1.0}, "reverse_kl is -0.1 nats"),
        ({"tokens": 0.0, "dropped_tokens": 12.0}, "has no distribution for any of the 12 response tokens"),
    ],
)
def test_impossible_totals_are_refused(change, message):
    with pytest.raises(UserError, match=rf"step 3: .*{message}.*; the weights keep their values of step 2"):
        Guards(99, has_teacher=True).check(3, TOTALS | change, [])
    Guards(99, has_teacher=False).check(3, TOTALS | change, [])


def train_by_itself(rank, world_size, model, step, broken, prompted_rank):
    """What ends the step, if anything does, and the step's record."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, teacher, batches = build(model, model, {})
    if broken:
        teacher.head.weight[3:40] *= 0.5
    microbatches = next(iter(batches))
    if rank == prompted_rank:
        first = microbatches[0]
        sample = replace(first.samples[0], teacher_prompt=np.array([5]))
        microbatches[0] = replace(first, samples=(sample, *first.samples[1:]))
    trainer, records = trainer_of(student, teacher, batches, Path("unused"), teacher_is_student=True)
    try:
        trainer.train_step(step, microbatches)
    except UserError as error:
        return str(error)
    finally:
        destroy_mesh()
    return records


def test_a_teacher_that_is_the_student_must_agree_with_it_at_first(gloo_world):
    """In later steps the student has changed, and with a prompt of its own, on any rank, the teacher differs."""
    model = tiny_checkpoint("qwen3", seed=2)

    def run(step=1, broken=True, prompted_rank=None):
        return gloo_world(2).run(train_by_itself, model, step, broken, prompted_rank)

    messages = run()
    assert messages[0] == messages[1]
    assert "step 1: teacher and student are the same model, but diverge by" in messages[0]
    assert "(allowed are 0.0001)" in messages[0] and "dropout" in messages[0]
    (record,) = run(broken=False)[0]
    assert abs(record["divergence"]) < 1e-6
    for ranks in (run(step=2), run(prompted_rank=1)):
        assert all(len(records) == 1 and records[0]["divergence"] > 1e-3 for records in ranks)


def test_teachers_that_start_as_the_student(tmp_path):
    import megatron_gkd.runtime.preload  # noqa: F401  isort: skip
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.training.build_teacher import begins_as_student

    (tmp_path / "link").symlink_to(tmp_path)
    paths = (tmp_path, tmp_path / "link", tmp_path / "other")
    student, same, other = (Checkpoint(path, config=None, tensors={}) for path in paths)

    def begins(opened, **section):
        return begins_as_student(TeacherSection(**section), student, opened)

    assert begins({"teacher": same}, teacher_model="x")
    assert not begins({"teacher": other}, teacher_model="x")
    assert begins({}, teacher_kind="self")
    assert not begins({}, teacher_model_server="http://host:1") and not begins({}, teacher_kind="none")
    two = [{"tags": "a", "teacher_model": "x"}, {"tags": "b", "teacher_kind": "self"}]
    assert begins({"teacher.teachers[0]": same}, teachers=two)
    assert not begins({"teacher.teachers[0]": other}, teachers=two)


def test_the_tolerance_is_for_every_type_that_is_trained_in():
    import megatron_gkd.runtime.preload  # noqa: F401  isort: skip
    from megatron_gkd.training.build import DTYPES
    from megatron_gkd.training.guards import SAME_MODEL_TOLERANCE

    assert SAME_MODEL_TOLERANCE.keys() == set(DTYPES.values()) == {torch.float32, torch.bfloat16}
