"""The student is saved when an error ends a run after its first step, if all ranks have failed."""

from __future__ import annotations

import time

import pytest
import torch
from checkpoints import tiny_checkpoint
from safetensors.torch import load_file
from training_layouts import build, trainer_of, weights_of

from megatron_gkd.errors import RunStopped, ServiceError, UserError

ERRORS = {
    "memory": torch.OutOfMemoryError("out of memory"),
    "disk": OSError(28, "No space left on device"),
    "program": KeyError("missing"),
    "input": UserError("train.jsonl:3: not JSON"),
}


def train_until_an_error(rank, world_size, model, directory, kind, failing_step):
    """Return each rank's error, and its weights at that time."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, teacher, batches = build(model, model, {"parallel": {"pipeline_model_parallel_size": world_size}})
    trainer, _ = trainer_of(student, teacher, batches, directory)
    steps = iter(range(1, 9))
    compute = student.compute_gradients

    def compute_gradients(*arguments, **options):
        step = next(steps)
        totals = compute(*arguments, **options)
        if step == failing_step:
            raise ERRORS[kind]
        return totals

    student.compute_gradients = compute_gradients
    try:
        trainer.run()
    except Exception as error:
        failure = (type(error).__name__, str(error), "".join(getattr(error, "__notes__", [])))
    weights = weights_of(student)
    destroy_mesh()
    return failure, weights


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_in_all_ranks_saves_the_student(kind, gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    results = gloo_world(2).run(train_until_an_error, model, tmp_path, kind, 3)
    export = tmp_path / "hf-step-000002"
    for (name, message, note), _ in results:
        text = message if kind == "input" else note
        assert name == ("RunStopped" if kind == "input" else type(ERRORS[kind]).__name__)
        assert "stopped after step 2 of 3" in text and f"The student of step 2 is in {export}" in text
        assert "starts from its weights, but otherwise anew: at step 1" in text
    exported, weights = load_file(export / "model.safetensors"), results[0][1]
    assert exported.keys() == weights.keys() and all(torch.equal(exported[name], weights[name]) for name in weights)


def test_an_error_in_the_first_step_has_nothing_to_save(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    (((name, message, _), _),) = gloo_world(1).run(train_until_an_error, model, tmp_path, "input", 1)
    assert name == "RunStopped" and message.endswith("Nothing has been learned yet, so nothing is exported")
    assert not list(tmp_path.glob("hf*"))


def end_alone(rank, world_size, seconds):
    from megatron_gkd.runtime.agreement import FailureMeeting

    meeting = FailureMeeting.create()
    started = time.monotonic()
    if rank == 1:
        return meeting.join("KeyError: 'missing'", seconds), time.monotonic() - started
    time.sleep(3 * seconds)
    return None


def test_a_rank_that_fails_alone_has_a_time_limit(gloo_world):
    _, (failures, waited) = gloo_world(2).run(end_alone, 1.0)
    assert failures is None and 0.9 < waited < 2.5


@pytest.mark.parametrize(
    ("broken", "limit"),
    [
        (UserError("broken"), 5.0),
        (ServiceError("broken"), 30.0),
        (RunStopped("broken", exit_code=69), 30.0),
        (ServiceError("broken: Connection refused"), 30.0),  # by a server, not by another rank
    ],
)
def test_the_message_names_a_rank_that_failed_alone(broken, limit):
    from megatron_gkd.training.rescue import Rescue, RunState, stop

    class Alone:
        def join(self, failure, seconds):
            assert (failure, seconds) == (f"{type(broken).__name__}: {broken}", limit)

    def export():
        raise AssertionError("a collective that the other ranks do not join")

    with pytest.raises(
        RunStopped, match=f"stopped after step 7 of 9: {broken}\nNot every rank failed within {limit:g} s of this one"
    ) as error:
        stop(broken, Alone(), RunState(9, step=7, updates=7), Rescue(export, export))
    assert not error.value.is_shared, "it is shown on any rank"
    assert error.value.exit_code == broken.exit_code


def test_a_checkpoint_that_can_not_be_saved_leaves_the_export(tmp_path):
    from megatron_gkd.training.exports import ExportFolders
    from megatron_gkd.training.rescue import Rescue, RunState, stop

    class All:
        def join(self, failure, seconds):
            return [failure, failure]

    def fail():
        raise UserError("the samples of the next step have failed, too")

    rescue = Rescue(fail, lambda: ExportFolders(tmp_path / "hf"))
    with pytest.raises(RunStopped, match=r"step 7 is in .*/hf\. A run with --model"):
        stop(UserError("broken"), All(), RunState(9, step=7, updates=7), rescue)
