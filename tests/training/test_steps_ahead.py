"""Steps that are sampled while the step before them trains, with a server engine whose servers are fakes."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from unittest import mock

import httpx
import pytest
import torch
from checkpoints import tiny_checkpoint
from fake_vllm import FakeVllm, transport
from layouts import DENSE, PP2, TP2
from rows import RandomRows
from training_layouts import build, recipe_of, trainer_of

from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.sample import FROM_STUDENT

STEPS = 4
SEED = 29  # with lambda 0.6 steps 1, 3 and 4 are on-policy


def rollouts_over_fake_servers(mesh, student, changes, folder, before, on_sample=None):
    from megatron_gkd.data.batch_config import BatchConfig
    from megatron_gkd.data.order import SampleOrder
    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.rollout.vllm.server import VllmServerEngine
    from megatron_gkd.rollout.vllm.server_options import RolloutServerOptions
    from megatron_gkd.training.on_policy import RolloutOptions, Rollouts
    from megatron_gkd.training.step_prompts import StepPrompts

    rows = RandomRows(count=24)
    fakes = {"one": FakeVllm(before), "two": FakeVllm(before)}
    with mock.patch.object(httpx, "Client", return_value=httpx.Client(transport=transport(fakes))):
        options = RolloutServerOptions(("http://one:1", "http://two:1"), folder, max_length=64)
        engine = VllmServerEngine(mesh, student.model.checkpoint, options)
    prompts = StepPrompts(
        rows,
        SampleOrder(rows.sizes, [1.0], seed=1234, shuffle=True),
        LambdaSchedule(0.6, "step", SEED),
        BatchConfig.from_recipe(recipe_of(changes), mesh, pad_token_id=0),
    )
    options = RolloutOptions(Sampling(max_completion_length=9), steps_ahead=1, num_steps=STEPS)
    return Rollouts(engine, prompts, options, mesh.dp, on_sample)


def train_ahead(rank, world_size, student, teacher, changes, folder):
    """The steps' records; the samples that were announced, and on one rank of each replica those that it trained on.

    No server completes prompts that were sent ahead before the step in between trains.
    """
    from megatron_gkd.runtime.mesh import destroy_mesh

    mesh, student, teacher, batches = build(student, teacher, changes)
    gate = threading.Event()
    gate.set()
    announced = []
    rollouts = rollouts_over_fake_servers(
        mesh,
        student,
        changes,
        folder,
        lambda path: path != "/v1/completions" or gate.wait(60),
        lambda sample: announced.append(sample.input_ids.tolist()),
    )
    begin, compute_gradients = rollouts.begin, student.compute_gradients

    def begin_behind_gate(step):
        if step > 1:
            gate.clear()
        begin(step)

    def open_gate(microbatches, signals):
        gate.set()
        samples = [sample for microbatch in microbatches for sample in microbatch.samples]
        trained.extend(sample.input_ids.tolist() for sample in samples if sample.source == FROM_STUDENT)
        return compute_gradients(microbatches, signals)

    rollouts.begin, student.compute_gradients = begin_behind_gate, open_gate
    trained = []
    trainer, records = trainer_of(student, teacher, batches, folder, rollouts=rollouts, train_iters=STEPS)
    for step in range(1, STEPS + 1):
        trainer.train_step(step, None if rollouts.prompts.is_on_policy(step) else batches.step(step))
    rollouts.close()
    is_leader = rollouts.engine.mesh.is_leader
    destroy_mesh()
    return records, announced, trained if is_leader else []


def train_by_hand(rank, world_size, student, teacher, changes, folder):
    """The same one after another: each step's samples are made before the update that precedes it."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    mesh, student, teacher, batches = build(student, teacher, changes)
    rollouts = rollouts_over_fake_servers(mesh, student, changes, folder, lambda path: None)

    def sample(step):
        rollouts.engine.load_weights(student.model.named_tensors(), version=min(updates, step - 1))
        return rollouts.microbatches(step)[0]

    records, waiting = [], {}
    for step in range(1, STEPS + 1):
        updates = step - 1
        if step == 1:
            waiting[1] = sample(1)
        if step < STEPS and rollouts.prompts.is_on_policy(step + 1):
            waiting[step + 1] = sample(step + 1)
        microbatches = waiting[step] if rollouts.prompts.is_on_policy(step) else batches.step(step)
        with teacher.resident():
            signals = teacher.score(microbatches)
        totals = student.compute_gradients(microbatches, signals)
        records.append({"loss": totals["loss"] / totals["tokens"], "grad_norm": student.update()})
    destroy_mesh()
    return records


def test_one_step_ahead_equals_the_same_steps_in_sequence(gloo_world, tmp_path):
    """Under a layout in which every kind of rank waits for every other: nobody waits for ever."""
    student = tiny_checkpoint("qwen3_tied", seed=2, num_hidden_layers=2)
    teacher = tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, hidden_size=48)
    changes = {"parallel": TP2 | PP2, "train": {"lr_decay_style": "constant"}}
    ranks = gloo_world(8).run(train_ahead, student, teacher, changes, tmp_path / "ahead")
    by_hand = gloo_world(8).run(train_by_hand, student, teacher, changes, tmp_path / "by hand")[0]
    assert sorted(itertools.chain.from_iterable(announced for _, announced, _ in ranks)) == sorted(
        itertools.chain.from_iterable(trained for *_, trained in ranks)
    )
    assert [bool(announced) for _, announced, _ in ranks] == [bool(trained) for *_, trained in ranks]
    for records, *_ in ranks:
        assert [record["source"] for record in records] == ["student", "dataset", "student", "student"]
        assert [record.get("staleness") for record in records] == [0, None, 1, 1]
        assert [record.get("staleness_kl") is not None for record in records] == [False, False, True, True]
        # Of the first step's own samples; and of a few of the newest weights, before the last step begins.
        assert [record.get("mismatch_kl") is not None for record in records] == [True, False, True, False]
        for record, expected in zip(records, by_hand, strict=True):
            for name, value in expected.items():
                assert record[name] == pytest.approx(value, rel=1e-6), name


def probe(rank, world_size, student, changes, offset):
    """Mismatch of ten calls, while an engine that has a constant error in its log-probabilities samples."""
    from megatron_gkd.data.batch_config import BatchConfig
    from megatron_gkd.data.order import SampleOrder
    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.on_policy import RolloutOptions, Rollouts
    from megatron_gkd.training.step_prompts import StepPrompts

    mesh, student, _, _ = build(student, None, changes | {"teacher": {"teacher_kind": "none", "teacher_model": None}})
    rows, engine = RandomRows(count=24), MegatronEngine(student.model, [3])
    order = SampleOrder(rows.sizes, [1.0], seed=1234, shuffle=True)
    config = BatchConfig.from_recipe(recipe_of(changes), mesh, pad_token_id=0)
    prompts = StepPrompts(rows, order, LambdaSchedule(0.4, "row", SEED), config)
    options = RolloutOptions(Sampling(max_completion_length=9), steps_ahead=1, num_steps=STEPS)
    rollouts = Rollouts(engine, prompts, options, mesh.dp)
    generate, lengths = engine.generate, []

    def generate_with_error(*arguments):
        found = generate(*arguments)
        lengths.extend(len(one.token_ids) for one in found)
        return [replace(one, log_probs=[value + offset for value in one.log_probs]) for one in found]

    engine.generate = generate_with_error
    before = {name: tensor.clone() for name, tensor in student.model.named_tensors()}
    found = [rollouts.probe_mismatch(student, step) for step in range(1, 13)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.model.named_tensors())
    destroy_mesh()
    return found, lengths


@pytest.mark.parametrize("layout", ["micro batch 2", "TP2xPP2", "CP2xDP2, packed"])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_every_tenth_step_the_engine_is_compared_with_the_weights_that_it_samples_from(offset, layout, gloo_world):
    world_size, changes = DENSE[layout]
    student = tiny_checkpoint("qwen3_tied", seed=2, num_hidden_layers=2)
    ranks = gloo_world(world_size).run(probe, student, changes, offset)
    assert sum(lengths != [] for _, lengths in ranks) > 0
    for found, lengths in ranks:
        assert [value is not None for value in found] == [False, True] + 9 * [False] + [True]
        assert [found[1], found[11]] == pytest.approx([offset, offset], abs=1e-5)
        assert all(length <= 9 for length in lengths)
