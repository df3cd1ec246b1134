from __future__ import annotations

import pytest
from checkpoints import tiny_checkpoint
from training_layouts import build

from megatron_gkd.training.exports import Exports


def train_on_an_infinite_teacher(rank, world_size, model, directory):
    from megatron_gkd.errors import UserError
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.trainer import Trainer

    mesh, student, teacher, batches = build(model, model, {"parallel": {"pipeline_model_parallel_size": world_size}})
    if teacher.head_weight is not None:
        teacher.head_weight[5] = float("nan")
    before = {name: tensor.clone() for name, tensor in student.model.named_tensors()}
    trainer = Trainer(
        student, teacher, batches, None, None, train_iters=3, eval_interval=None, exports=Exports(directory)
    )
    with pytest.raises(UserError, match="step 1: the loss is nan"):
        trainer.run()
    unchanged = all((tensor == before[name]).all() for name, tensor in student.model.named_tensors())
    destroy_mesh()
    return unchanged


def test_a_loss_that_is_not_finite_ends_the_run_on_every_rank_before_the_update(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2)
    assert gloo_world(2).run(train_on_an_infinite_teacher, model, tmp_path) == [True, True]


def test_exports_are_due_at_their_interval():
    exports = Exports("x", save_interval=3)
    assert [step for step in range(1, 10) if exports.is_due(step)] == [3, 6, 9]
    assert not any(Exports("x").is_due(step) for step in range(1, 10))


def test_only_the_newest_step_exports_are_kept(tmp_path):
    exports = Exports(tmp_path, save_interval=1, save_total_limit=2)
    for step in (8, 9, 10, 11):
        exports.step_directory(step).mkdir()
    exports.final_directory.mkdir()
    exports.forget_old(is_main=False)
    assert len(list(tmp_path.iterdir())) == 5
    exports.forget_old(is_main=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "hf-step-000010", "hf-step-000011"]
