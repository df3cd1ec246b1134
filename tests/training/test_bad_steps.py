"""Steps that must not change the student: a gradient that is not finite, and no labels."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoints import tiny_checkpoint
from rows import RandomRows
from training_layouts import build, trainer_of, weights_of

LAYOUTS = {
    "one process": (1, {}),
    "no clipping": (1, {"train": {"clip_grad": 0.0}}),
    "DP2, optimizer not distributed": (2, {"parallel": {"distributed_optimizer": False}}),
    "DP2, gather overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "TP2": (2, {"parallel": {"tensor_model_parallel_size": 2}}),
    "PP2": (2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    "EP2": (2, {"parallel": {"expert_model_parallel_size": 2}}),
}


def train_with_bad_gradients(rank, world_size, model, changes, directory, bad_steps, max_bad_steps=10):
    """Trains with a NaN in the last rank's gradient in `bad_steps`.

    Returns what ended the run, the records, and the names of the weights that each step changed.
    """
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, teacher, batches = build(model, model, changes)
    trainer, records = trainer_of(student, teacher, batches, directory, max_bad_steps=max_bad_steps)
    weights, changed = [weights_of(student)], []
    compute, steps = student.compute_gradients, iter(range(1, 9))

    def compute_gradients(*arguments, **options):
        totals = compute(*arguments, **options)
        if next(steps) in bad_steps and rank == world_size - 1:
            for buffer in student.chunks[-1].buffers + student.chunks[-1].expert_parallel_buffers:
                buffer.grad_data.fill_(math.nan)
        return totals

    update = student.update

    def update_and_compare():
        norm = update()
        weights.append(weights_of(student))
        changed.append([name for name, new in weights[-1].items() if not torch.equal(new, weights[-2][name])])
        return norm

    student.compute_gradients, student.update = compute_gradients, update_and_compare
    ending = None
    try:
        trainer.run()
    except Exception as error:
        ending = (type(error).__name__, str(error))
    finite = all(tensor.isfinite().all() for tensor in weights[-1].values())
    destroy_mesh()
    return ending, records, changed, finite


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(layout, gloo_world, tmp_path):
    size, changes = LAYOUTS[layout]
    model = tiny_checkpoint("qwen3_moe" if layout == "EP2" else "qwen3", seed=2, num_hidden_layers=2)
    results = gloo_world(size).run(train_with_bad_gradients, model, changes, tmp_path, bad_steps=[2])
    for ending, records, changed, finite in results:
        assert ending is None and finite
        assert len(changed[0]) == len(changed[2]) > 10 and changed[1] == []
        assert [record["skipped_steps"] for record in records] == [0, 1, 1]
        assert [math.isfinite(record["grad_norm"]) for record in records] == [True, False, True]
        assert records[2]["grad_norm"] > 0
    dumped = json.loads((tmp_path / "bad_steps/step_000002.json").read_text())
    assert dumped["step"] == 2 and dumped["grad_norm"] == "nan" and math.isfinite(float(dumped["loss"]))
    assert len(dumped["rows"]) == 4 and len({row["row"] for row in dumped["rows"]}) == 4
    assert [path.name for path in (tmp_path / "bad_steps").iterdir()] == ["step_000002.json"]


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_last_good_student(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    results = gloo_world(2).run(train_with_bad_gradients, model, {}, tmp_path, bad_steps=[2, 3], max_bad_steps=2)
    for (kind, message), records, _, finite in results:
        assert kind == "RunStopped" and finite and len(records) == 3
        assert message.startswith(
            "stopped after step 3 of 3: step 3: the gradient's norm is not finite, for 2 steps in a row "
            f"(train.max_bad_steps = 2). Their rows are in {tmp_path / 'bad_steps'}"
        )
        assert f"The student of step 3 is in {tmp_path / 'hf-step-000003'}" in message
    assert (tmp_path / "hf-step-000003/model.safetensors").exists()


def test_a_run_that_ends_in_bad_steps_fails(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    (((kind, message), _, _, _),) = gloo_world(1).run(train_with_bad_gradients, model, {}, tmp_path, bad_steps=[3])
    assert kind == "RunStopped" and "The last 1 steps had a loss or gradient that is not finite" in message
    assert (tmp_path / "hf/model.safetensors").exists()


class OneStepWithoutLabels(list):
    """Batches whose second step has rows, but no labels."""

    def __init__(self, batches, empty):
        steps = list(batches)
        super().__init__([steps[0], list(empty)[1], steps[2]])


def train_without_labels(rank, world_size, model, changes, directory):
    from megatron_gkd.runtime.mesh import destroy_mesh

    rows = RandomRows(count=24)
    empty = RandomRows(count=24, most_labels=0)
    empty.num_labels = rows.num_labels  # the loader refuses rows without a response; on-policy steps may have them
    _, student, teacher, batches = build(model, model, changes, rows)
    batches._dataset, plain = empty, batches._dataset
    without = list(batches)
    batches._dataset = plain
    trainer, records = trainer_of(student, teacher, OneStepWithoutLabels(batches, without), directory)
    weights = []
    write = trainer.write

    def write_and_keep(*arguments):
        write(*arguments)
        weights.append(weights_of(student))

    trainer.write = write_and_keep
    trainer.run()
    destroy_mesh()
    return records, [name for name, new in weights[1].items() if not torch.equal(new, weights[0][name])]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_step_without_labels_changes_nothing_and_has_no_loss(family, gloo_world, tmp_path):
    model = tiny_checkpoint(family, seed=2, num_hidden_layers=2)
    changes = {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
    for records, changed in gloo_world(2).run(train_without_labels, model, changes, tmp_path):
        assert changed == [], "weight decay, or a balancing loss that nothing divides"
        step = records[1]
        assert step["num_tokens"] == 0 and step["skipped_steps"] == 1
        for name in ("loss", "divergence", "student_entropy", "forward_kl", "grad_norm"):
            assert step[name] is None
        assert records[2]["loss"] > 0 and records[2]["grad_norm"] > 0
    assert not (tmp_path / "bad_steps").exists()
