from __future__ import annotations

import weakref

import pytest
import torch
from checkpoints import tiny_checkpoint
from safetensors.torch import load_file
from training_layouts import build, trainer_of

from megatron_gkd.training.exports import Exports


def train_on_an_infinite_teacher(rank, world_size, model, directory):
    from megatron_gkd.errors import RunStopped
    from megatron_gkd.runtime.mesh import destroy_mesh

    _mesh, student, teacher, batches = build(model, model, {"parallel": {"pipeline_model_parallel_size": world_size}})
    if teacher.head is not None:
        teacher.head.weight[5] = float("nan")
    before = {name: tensor.clone() for name, tensor in student.model.named_tensors()}
    trainer, _ = trainer_of(student, teacher, batches, directory, reporter=None)
    with pytest.raises(RunStopped, match="step 1: the loss is nan"):
        trainer.run()
    unchanged = all((tensor == before[name]).all() for name, tensor in student.model.named_tensors())
    destroy_mesh()
    return unchanged


def test_a_loss_that_is_not_finite_ends_the_run_on_every_rank_before_the_update(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2)
    assert gloo_world(2).run(train_on_an_infinite_teacher, model, tmp_path) == [True, True]


def signals_at_each_microbatch(rank, world_size, model, directory):
    """Return how many signals exist when each microbatch's loss is computed, with its own, and the number of losses."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    _mesh, student, teacher, batches = build(model, model, {})
    score, objective = teacher.score, student.objective
    scored, left = [], []

    def keep(microbatches):
        signals = score(microbatches)
        scored[:] = map(weakref.ref, signals)
        return signals

    def count(*args):
        left.append(sum(signal() is not None for signal in scored))
        return objective(*args)

    count.vocab_size = objective.vocab_size
    teacher.score, student.objective = keep, count
    trainer, _ = trainer_of(student, teacher, batches, directory)
    microbatches = next(iter(batches))
    trainer.train_step(1, microbatches)
    destroy_mesh()
    return left, len(microbatches)


def test_the_signal_of_a_finished_microbatch_takes_no_memory(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2)
    ((left, count),) = gloo_world(1).run(signals_at_each_microbatch, model, tmp_path)
    assert count > 1 and left == list(range(count, 0, -1))


def train_until_the_teacher_fails(rank, world_size, model, directory, scorings):
    """Return each rank's message, and the student's weights at that time."""
    from megatron_gkd.config.schema import OutputSection
    from megatron_gkd.errors import GkdError
    from megatron_gkd.reporting.reporter import open_reporter
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.teachers.base import TeacherFailed

    mesh, student, teacher, batches = build(model, model, {"parallel": {"pipeline_model_parallel_size": world_size}})
    score, left = teacher.score, iter(range(scorings))

    def score_until(microbatches):
        if next(left, None) is None:
            raise TeacherFailed("http://teacher:8000: no answer for 300 s")
        return score(microbatches)

    teacher.score = score_until
    output = OutputSection(output_dir=str(directory), tensorboard=False)
    with open_reporter(output, 3, is_main=mesh.is_main) as reporter:
        trainer, _ = trainer_of(student, teacher, batches, directory, reporter=reporter)
        with pytest.raises(GkdError) as error:
            trainer.run()
    weights = {name: tensor.clone() for name, tensor in student.model.named_tensors()}
    destroy_mesh()
    return str(error.value), weights


def test_a_teacher_that_fails_ends_the_run_on_every_rank_and_the_student_is_exported(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2)
    (message, weights), (other_message, _) = gloo_world(2).run(train_until_the_teacher_fails, model, tmp_path, 2)
    export = tmp_path / "hf-step-000002"
    assert (
        message
        == other_message
        == (
            "stopped after step 2 of 3: http://teacher:8000: no answer for 300 s\n"
            f"The student of step 2 is in {export}. A run with --model {export} and another --output_dir starts from "
            "its weights, but otherwise anew: at step 1, with a new optimizer and learning-rate schedule, and with the "
            "same rows in the same order unless train.seed is another"
        )
    )
    exported = load_file(export / "model.safetensors")
    assert exported.keys() == weights.keys() and all(torch.equal(exported[name], weights[name]) for name in weights)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 and (tmp_path / "curves.png").exists()


def test_before_the_first_step_there_is_nothing_to_export(gloo_world, tmp_path):
    (message, _), _ = gloo_world(2).run(
        train_until_the_teacher_fails, tiny_checkpoint("qwen3", seed=2), tmp_path, scorings=0
    )
    assert message.startswith("stopped after step 0 of 3: ") and message.endswith("so nothing is exported")
    assert not list(tmp_path.glob("hf*"))


def test_exports_are_due_at_their_interval():
    exports = Exports("x", interval=3)
    assert [step for step in range(1, 10) if exports.is_due(step)] == [3, 6, 9]
    assert not any(Exports("x").is_due(step) for step in range(1, 10))


def test_only_the_newest_step_exports_are_kept(tmp_path):
    exports = Exports(tmp_path, interval=1, total_limit=2)
    for step in (8, 9, 10, 11):
        exports.claim(exports.of_step(step), is_main=True)
        exports.of_step(step).checkpoint.mkdir()
    exports.claim(exports.final(), is_main=True)
    exports.final().checkpoint.mkdir()
    exports.remove_old(is_main=False)
    assert len(list(tmp_path.iterdir())) == 5
    exports.remove_old(is_main=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "hf-step-000010", "hf-step-000011"]


def test_a_resumed_run_deletes_old_exports_of_its_own(tmp_path):
    first = Exports(tmp_path, interval=1, total_limit=1)
    first.claim(first.of_step(1), is_main=True)
    first.of_step(1).checkpoint.mkdir()
    resumed = Exports(tmp_path, interval=1, total_limit=1)
    resumed.restore(first.made)
    resumed.claim(resumed.of_step(2), is_main=True)
    resumed.of_step(2).checkpoint.mkdir()
    resumed.remove_old(is_main=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf-step-000002"]


def test_adapters_and_merged_checkpoints_are_kept_alike(tmp_path):
    exports = Exports(tmp_path, interval=1, total_limit=1, has_adapters=True)
    for folders in (exports.of_step(1), exports.of_step(2), exports.final()):
        exports.claim(folders, is_main=True)
        for folder in folders:
            folder.mkdir()
    exports.remove_old(is_main=True)
    names = ["adapters", "adapters-step-000002", "hf", "hf-step-000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    adapters, hf = tmp_path / "adapters", tmp_path / "hf"
    assert str(exports.final()) == f"{adapters} (PEFT adapters) and {hf} (adapters merged)"
    assert exports.final().start_option == f"--adapters {adapters}"


def export_some_steps(rank, world_size, model, directory, steps):
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, _, batches = build(model, None, {"teacher": {"teacher_kind": "none"}})
    exports = Exports(directory, interval=1, total_limit=1)
    trainer, _ = trainer_of(student, None, batches, directory, exports=exports)
    for step in steps:
        trainer.export(exports.of_step(step))
        exports.remove_old(is_main=student.mesh.is_main)
    trainer.export(exports.final())
    destroy_mesh()


def test_an_earlier_runs_exports_stay(gloo_world, tmp_path):
    """Whatever the numbers of their steps are; one in the place of a new one has another name afterwards."""
    earlier = ["hf", "hf-step-000002", "hf-step-000900"]
    for name in earlier:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    (tmp_path / "base").symlink_to(tmp_path / "hf-step-000900")
    model = tiny_checkpoint("qwen3", seed=2)
    gloo_world(2).run(export_some_steps, model, tmp_path, [1, 2, 3])
    assert (tmp_path / "hf.1/model.safetensors").read_text() == "hf"
    assert (tmp_path / "hf-step-000002.1/model.safetensors").read_text() == "hf-step-000002"
    assert (tmp_path / "hf-step-000900/model.safetensors").read_text() == "hf-step-000900"
    before = load_file(model / "model.safetensors")
    for name in ("hf", "hf-step-000003"):
        after = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(after[key], before[key]) for key in before)
    assert not (tmp_path / "hf-step-000001").exists() and not (tmp_path / "hf-step-000002").exists()
