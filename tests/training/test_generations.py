"""Generations that several steps train on: what is sampled when, and runs that are resumed in the middle of one."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from batching import ONE_RANK
from checkpoints import tiny_checkpoint
from layouts import DENSE
from rows import RandomRows
from training_layouts import build, recipe_of, trainer_of, weights_of

from megatron_gkd.data.generation_order import GenerationOrder
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.sample import FROM_STUDENT
from megatron_gkd.rollout.base import Completion, Sampling
from megatron_gkd.training.on_policy import RolloutOptions, Rollouts
from megatron_gkd.training.step_prompts import StepPrompts

CONFIG = replace(ONE_RANK, max_length=64)


class CountingEngine:
    """An engine whose completions name the call that they are from, and their seed."""

    def __init__(self):
        self.calls, self.version = [], 0

    def resident(self):
        return contextlib.nullcontext()

    def load_weights(self, named_tensors, version):
        self.version = version

    def generate(self, prompts, sampling, seeds, images=None):
        self.calls.append((self.version, [tuple(prompt) for prompt in prompts], seeds))
        number = len(self.calls)
        return [Completion([4 + number, 4 + seed % 50], [-1.0, -2.0], "stop", self.version) for seed in seeds]


class BackgroundCounting(CountingEngine):
    """The same in the background: completions are announced at once."""

    def start(self, prompts, sampling, seeds, images=None, on_completion=None):
        completions = self.generate(prompts, sampling, seeds)
        for index, completion in enumerate(completions):
            if on_completion is not None:
                on_completion(index, completion)

        class Started:
            seconds = 2.0

            def result(self):
                return completions

        return Started()

    def close(self):
        pass


class SingleRank:
    def rank(self):
        return 0

    def size(self):
        return 1


@pytest.fixture
def rollouts_of(monkeypatch):
    """`rollouts_of(steps, per_prompt)`: rollouts in this process; `options` are those of `RolloutOptions`."""
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda into, value, group: into.__setitem__(0, value))

    def build_rollouts(
        steps, per_prompt, schedule=(1.0, "step"), engine=None, on_sample=None, rows=None, teachers=None, **options
    ):
        rows = rows or RandomRows(count=32)
        schedule = LambdaSchedule(*schedule, 3, steps, per_prompt)
        order = GenerationOrder(SampleOrder(rows.sizes, [1.0], seed=1, shuffle=False), schedule, 8)
        prompts = StepPrompts(rows, order, schedule, CONFIG, teacher_max_length=teachers)
        options = RolloutOptions(Sampling(max_completion_length=4), **options)
        return Rollouts(engine or CountingEngine(), prompts, options, SingleRank(), on_sample)

    return build_rollouts


def run_steps(rollouts, steps):
    """Each step's report, with the engine at the newest version."""
    reports = []
    for step in steps:
        rollouts.engine.version = step - 1
        reports.append(rollouts.microbatches(step)[1])
    return reports


def test_a_generation_is_sampled_once_for_all_its_steps(rollouts_of):
    rollouts = rollouts_of(3, 4)
    reports = run_steps(rollouts, range(1, 7))
    assert [(version, len(prompts)) for version, prompts, _ in rollouts.engine.calls] == [(0, 24), (3, 24)]
    assert [report.staleness for report in reports] == [0, 1, 2, 0, 1, 2]
    assert [report.generated_tokens for report in reports] == [48, 0, 0, 48, 0, 0]
    assert [report.record()["rollout_tokens_per_second"] is None for report in reports] == 2 * [False, True, True]
    for _, prompts, seeds in rollouts.engine.calls:
        assert len(set(seeds)) == 24 and {prompts.count(prompt) for prompt in prompts} == {4}
    rows = [row.row for report in reports[:3] for row in report.sampled.values()]
    assert sorted(rows) == sorted(4 * list(range(6))), "each of the first six rows has four completions"
    trained = [row.completion.token_ids for report in reports[:3] for row in report.sampled.values()]
    assert trained == [[5, 4 + seed % 50] for seed in rollouts.engine.calls[0][2]]


def test_a_generation_starts_with_its_first_on_policy_step_and_samples_no_other_rows(rollouts_of):
    rollouts = rollouts_of(3, 1, schedule=(0.1, "row"))
    prompts = rollouts.prompts
    on_policy = [step for step in range(1, 31) if prompts.is_on_policy(step)]
    reports = dict(zip(on_policy, run_steps(rollouts, on_policy), strict=True))
    firsts = {prompts.lambda_schedule.generation_steps(step).start: step for step in reversed(on_policy)}
    assert any(start < step for start, step in firsts.items()), "the first step of a generation may be the dataset's"
    assert [version + 1 for version, *_ in rollouts.engine.calls] == sorted(firsts.values())
    for step, report in reports.items():
        first = firsts[prompts.lambda_schedule.generation_steps(step).start]
        assert report.staleness == step - first
        assert report.student_rows == prompts.lambda_schedule.rows(step, 8).sum()


def test_no_step_after_the_last_is_sampled_unless_the_run_gets_more_steps(rollouts_of):
    rollouts = rollouts_of(4, 1, num_steps=2)
    run_steps(rollouts, [1, 2])
    assert [len(prompts) for _, prompts, _ in rollouts.engine.calls] == [16]
    longer = rollouts_of(4, 1, num_steps=9)
    longer.restore(json.loads(json.dumps(rollouts.progress(2))))
    reports = run_steps(longer, [3, 4, 5])
    assert [(version, len(prompts)) for version, prompts, _ in longer.engine.calls] == [(2, 16), (4, 32)]
    assert [report.staleness for report in reports] == [0, 1, 0]


def test_a_step_that_fails_is_repeated_with_its_completions(rollouts_of):
    rollouts = rollouts_of(3, 2)
    first, second = run_steps(rollouts, [1, 2])
    saved = json.loads(json.dumps(rollouts.progress(1)))  # step 2 has begun and not ended
    assert sorted(saved["begun"]) == ["1", "2"]
    assert sorted(json.loads(json.dumps(rollouts.progress(2)))["begun"]) == ["2"]
    resumed = rollouts_of(3, 2)
    resumed.restore(saved)
    again, third = run_steps(resumed, [2, 3])
    assert not resumed.engine.calls
    assert [row.completion for row in again.sampled.values()] == [row.completion for row in second.sampled.values()]
    assert [third.staleness, again.staleness, first.staleness] == [2, 1, 0]


def test_a_generation_ahead_starts_in_the_last_step_of_the_one_before(rollouts_of):
    announced, trained = [], []
    rollouts = rollouts_of(
        3, 2, engine=BackgroundCounting(), on_sample=lambda sample: announced.append(sample), steps_ahead=1, num_steps=9
    )
    for step in range(1, 10):
        rollouts.engine.version = step - 1
        microbatches, report = rollouts.microbatches(step)
        trained += [sample for microbatch in microbatches for sample in microbatch.samples]
        assert report.staleness == (step - 1 if step <= 3 else (step - 1) % 3 + 1)
        assert rollouts.is_early(step + 1) == (step in (3, 6))
        if rollouts.is_early(step + 1):
            rollouts.begin(step + 1)
        of_next = announced[len(trained) :]
        assert len(of_next) == (0 if step == 9 else 8), "a teacher gets the samples of one step ahead"
    assert len(rollouts.engine.calls) == 3
    assert sorted(one.input_ids.tolist() for one in announced) == sorted(one.input_ids.tolist() for one in trained)


class EndlessEngine(CountingEngine):
    """An engine that ignores the longest completion."""

    def generate(self, prompts, sampling, seeds, images=None):
        return [Completion([5] * 99, [-1.0] * 99, "length", self.version) for _ in prompts]


@pytest.mark.parametrize("truncated", ["keep", "mask", "drop"])
def test_no_sample_exceeds_the_sequences_of_student_and_teacher(truncated, rollouts_of):
    """In a run that ends within a generation; a step may have no completion that is trained on."""
    rows = RandomRows(count=32, longest=15)
    rows.teacher_prompts = [np.arange(4, 21)] * 16 + [None] * 16
    options = {"engine": EndlessEngine(), "rows": rows, "teachers": 20, "truncated": truncated, "num_steps": 5}
    rollouts = rollouts_of(3, 4, (0.5, "row"), **options)
    for step in filter(rollouts.prompts.is_on_policy, range(1, 6)):
        rollouts.engine.version = step - 1
        microbatches, report = rollouts.microbatches(step)
        samples = [sample for one in microbatches for sample in one.samples if sample.source == FROM_STUDENT]
        assert len(samples) == (0 if truncated == "drop" else report.student_rows)
        assert sum(sample.num_labels for sample in samples) == -report.log_prob
        assert (report.log_prob == 0) == (truncated != "keep")
        for sample in samples:
            length, prompt = len(sample.input_ids), rows.prompt_lengths[sample.row_id] + 1
            limits = [64] if sample.teacher_prompt is None else [64, prompt + 20 - 17]
            assert length == min(limits)


STEPS, SAVED = 4, 2
GENERATIONS = (4, 2)


def run_trainer(rank, world_size, model, changes, directory, is_resumed):
    """Train to the end and save after the second step, in the middle of a generation; or train from there on.

    Returns the records of the steps after it, the weights, and how often the engine sampled.
    """
    from megatron_gkd.data.batch_config import BatchConfig
    from megatron_gkd.data.loader import StepLoader
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing import loader
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder, read_run
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds

    apply_workarounds()
    rows = RandomRows(count=24, privileged=True)
    mesh, student, teacher, _ = build(model, None, changes, rows)
    schedule = LambdaSchedule(0.6, "row", 7, *GENERATIONS)
    order = GenerationOrder(SampleOrder(rows.sizes, [1.0], seed=1234, shuffle=True), schedule, global_batch_size=4)
    config = BatchConfig.from_recipe(recipe_of(changes), mesh, pad_token_id=0)
    prompts, engine = StepPrompts(rows, order, schedule, config), MegatronEngine(student.model, [3])
    options = RolloutOptions(Sampling(max_completion_length=9), num_steps=STEPS)
    rollouts = Rollouts(engine, prompts, options, mesh.dp)
    generate, calls = engine.generate, []
    engine.generate = lambda *arguments: calls.append(0) or generate(*arguments)
    batches = StepLoader(rows, order, config, range(1, STEPS + 1))
    trainer, records = trainer_of(student, teacher, batches, directory, rollouts=rollouts, train_iters=STEPS)
    saved, folder = Saved(student), CheckpointFolder(directory)
    if is_resumed:
        loader.load(saved, folder.final(SAVED), SAVED)
        trainer.restore(read_run(folder.final(SAVED))["progress"])
    saver = Saver(folder, is_asynchronous=False)
    for step in range(trainer.state.step + 1, STEPS + 1):
        trainer.train_step(step, None if prompts.is_on_policy(step) else batches.step(step))
        if step == SAVED and not is_resumed:
            run = saved.description() | {"identity": {}, "progress": trainer.progress()}
            assert saver.save(step, saved.to_write(), run)
    weights = weights_of(student)
    destroy_mesh()
    times = ("teacher_time_s", "step_time_s", "rollout_time_s", "sync_time_s", "rollout_tokens_per_second")
    return [{k: v for k, v in one.items() if k not in times} for one in records if one["step"] > SAVED], weights, calls


CHANGES = {
    "teacher": {"teacher_kind": "self", "teacher_model": None},
    "train": {"lr_decay_style": "constant"},
}


@pytest.fixture(scope="module")
def whole_run(gloo_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generations")
    model = tiny_checkpoint("qwen3_tied", seed=2, num_hidden_layers=2)
    return folder, model, gloo_world(1).run(run_trainer, model, CHANGES, folder, False)[0]


def test_a_run_that_is_resumed_in_a_generation_goes_on_bit_by_bit(whole_run, gloo_world):
    """With a self-teacher, which scores with the student's weights of each step."""
    folder, model, (records, weights, calls) = whole_run
    found, resumed, no_calls = gloo_world(1).run(run_trainer, model, CHANGES, folder, True)[0]
    assert [record["staleness"] for record in records] == [2, 3] and len(calls) == 1 and not no_calls
    assert found == records and all(record["student_rows"] for record in records)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("layout", ["TP2xPP2", "CP2xDP2, packed"])
def test_a_run_that_is_resumed_in_a_generation_under_another_layout(layout, whole_run, gloo_world):
    folder, model, (records, weights, _) = whole_run
    world_size, changes = DENSE[layout]
    changes = {name: changes.get(name, {}) | CHANGES.get(name, {}) for name in changes | CHANGES}
    for found, resumed, no_calls in gloo_world(world_size).run(run_trainer, model, changes, folder, True):
        assert not no_calls
        for record, expected in zip(found, records, strict=True):
            for name in ("loss", "grad_norm", "mean_completion_length", "staleness", "num_tokens", "staleness_kl"):
                assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
        for name, weight in weights.items():
            torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-6)
