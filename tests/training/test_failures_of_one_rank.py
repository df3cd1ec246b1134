"""A failure after the first step, of one rank alone, is raised in all, so that the student is saved."""

from __future__ import annotations

import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
from checkpoints import tiny_checkpoint
from training_layouts import build, trainer_of

STEPS = 8


class Reporter(SimpleNamespace):
    """A reporter whose method `fails_in` raises an error in the main rank, from step 2 on."""

    def __init__(self, fails_in, error):
        super().__init__(fails_in=fails_in, error=error)

    def step(self, record):
        self._report("step", record)

    def validation(self, record):
        self._report("validation", record)

    def completions(self, records):
        pass

    def plot(self):
        pass

    def _report(self, kind, record):
        if kind == self.fails_in and record["step"] >= 2:
            raise self.error


def kill_worker(trainer, rank):
    """Kill the process that prepares the batches of rank 1, while step 2 trains."""
    compute, calls = trainer.student.compute_gradients, []

    def compute_gradients(*arguments, **options):
        calls.append(None)
        if rank == 1 and len(calls) == 2:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            worker.join(10)  # DataLoader's own handler would raise it here, between collectives
        return compute(*arguments, **options)

    trainer.student.compute_gradients = compute_gradients


def break_row(trainer, rank):
    loader = trainer.data.batches._loader
    step = loader.step

    def fail(number):
        if rank == 1 and number == 3:
            raise KeyError("a user's preprocessor")
        return step(number)

    loader.step = fail


def break_report(kind, error):
    def prepare(trainer, rank):
        trainer.reporter = Reporter(kind if rank == 0 else None, error)

    return prepare


def break_rename(trainer, rank):
    """Rank 0 can't rename what an earlier run has left in place of the export that is due after step 2."""
    claim, calls = trainer.exports.claim, []

    def fail(folders, *, is_main):
        claim(folders, is_main=is_main)
        calls.append(folders)
        if is_main and len(calls) == 1:
            raise PermissionError(13, "Permission denied")

    object.__setattr__(trainer.exports, "claim", fail)


def break_prompt(trainer, rank):
    """One replica has a prompt that the rollout engine refuses."""
    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.rollout.megatron.engine import MegatronEngine

    engine = MegatronEngine(trainer.student.model, [2])
    compute, calls = trainer.student.compute_gradients, []

    def compute_gradients(*arguments, **options):
        calls.append(None)
        prompts = [[10**6 if rank == 1 and len(calls) == 3 else 5]]
        engine.generate(prompts, Sampling(max_completion_length=2), [0])
        return compute(*arguments, **options)

    trainer.student.compute_gradients = compute_gradients


FAILURES = {
    "killed worker": (kill_worker, {"num_workers": 1}, "exited unexpectedly"),
    "preprocessor": (break_row, {}, "a user's preprocessor"),
    "full disk": (break_report("step", OSError(28, "No space left on device")), {}, "No space left on device"),
    "TensorBoard": (break_report("step", ValueError("not a scalar")), {}, "not a scalar"),
    "validation": (break_report("validation", OSError(5, "Input/output error")), {}, "Input/output error"),
    "earlier export": (break_rename, {}, "Permission denied"),
    "refused prompt": (break_prompt, {}, "prompt 0 has the token id 1000000"),
}


def fail_in_one_rank(rank, world_size, model, directory):
    """Return each rank's error after each failure of the table, and the newest step."""
    from megatron_gkd.data.loader import StepLoader
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.batches import AgreedBatches
    from megatron_gkd.training.exports import Exports

    multiprocessing.current_process()._config["daemon"] = False  # which may have no processes of its own
    _, student, teacher, batches = build(model, model, {})
    compute, found = student.compute_gradients, {}
    for name, (prepare, options, _) in FAILURES.items():
        student.compute_gradients = compute
        loader = StepLoader(batches._dataset, batches._order, batches._config, range(1, STEPS + 1), **options)
        exports = Exports(directory / name, interval=2 if name == "earlier export" else None)
        trainer, _ = trainer_of(
            student, teacher, AgreedBatches(loader), directory, exports=exports, train_iters=STEPS, eval_interval=2
        )
        object.__setattr__(trainer.data, "validation", [next(iter(batches))])
        trainer.reporter = Reporter(None, None)
        prepare(trainer, rank)
        try:
            trainer.run()
        except Exception as error:
            text = "\n".join([str(error), *getattr(error, "__notes__", [])])
            found[name] = text, trainer.state.step
    destroy_mesh()
    return found


@pytest.fixture(scope="module")
def failures(gloo_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=1)
    return gloo_world(2).run(fail_in_one_rank, model, folder, timeout=180), folder


@pytest.mark.parametrize("name", FAILURES)
def test_the_student_is_saved(name, failures):
    found, folder = failures
    reason = FAILURES[name][2]
    steps = {of_rank[name][1] for of_rank in found}
    assert len(steps) == 1 and 2 <= min(steps) < STEPS
    export = folder / name / f"hf-step-{min(steps):06d}"
    for text, _ in (of_rank[name] for of_rank in found):
        assert reason in text and f"The student of step {min(steps)} is in {export}" in text
    assert (export / "model.safetensors").is_file()
