"""The student as its own teacher: equal under every layout, to transformers, and to a teacher of the same weights."""

from __future__ import annotations

import functools

import pytest
import torch
from checkpoints import tiny_checkpoint
from layouts import DENSE, MOE, PP2
from rows import RandomRows
from training.test_layouts import assert_equal_runs
from training.test_on_policy import train_on_policy
from training.test_one_process import STUDENT, assert_equals_oracle, oracle
from training_layouts import RECIPE, build, train_steps

KINDS = {
    "dynamic": {"teacher_kind": "self", "teacher_model": None},
    "fixed": {"teacher_kind": "self", "teacher_model": "student"},
    "ema": {"teacher_kind": "self", "teacher_model": None, "teacher_ema": 0.6},
}
ROWS = RandomRows(count=24, privileged=True)


def changes_of(kind: str, changes: dict | None = None, **distill) -> dict:
    return (changes or {}) | {"teacher": KINDS[kind], "distill": RECIPE["distill"] | distill}


@functools.cache
def mixture():
    return tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2)


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(kind, student):
        return gloo_world(1).run(train_steps, student, None, changes_of(kind), rows=ROWS)[0]

    return of


# The average has what the other kinds have: weights that change, and others that take their place.
CASES = [
    *(("ema", name) for name in ("TP2+SP", "PP2", "PP2xVPP2", "CP2", "DP2", "TP2+SPxCP2", "CP2xDP2, packed")),
    *(("dynamic", name) for name in ("TP2+SP", "PP2xVPP2", "CP2", "DP2")),
    *(("fixed", name) for name in ("TP2+SP", "PP2", "CP2", "DP2")),
]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_every_layout_equals_one_process(layout, kind, gloo_world, one_process):
    world_size, changes = DENSE[layout]
    found = gloo_world(world_size).run(train_steps, STUDENT(), None, changes_of(kind, changes), rows=ROWS)[0]
    assert_equal_runs(found, one_process(kind, STUDENT()))


@pytest.mark.parametrize(("layout", "kind"), [("EP2", "dynamic"), ("EP2", "ema"), ("CP2xEP2", "fixed")])
def test_mixture_of_experts(layout, kind, gloo_world, one_process):
    world_size, changes = MOE[layout]
    found = gloo_world(world_size).run(train_steps, mixture(), None, changes_of(kind, changes), rows=ROWS)[0]
    assert_equal_runs(found, one_process(kind, mixture()))


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_equals_transformers(kind, one_process):
    """In the first step all kinds have the same weights."""
    assert_equals_oracle(one_process(kind, STUDENT())[0], *oracle(STUDENT(), STUDENT(), 0.5, 0.9, 0.3, rows=ROWS))


def test_the_kinds_differ_after_the_first_step(one_process):
    losses = {kind: one_process(kind, STUDENT())[2]["totals"]["divergence"] for kind in KINDS}
    assert losses["dynamic"] < 0.99 * losses["ema"] and losses["ema"] < 0.99 * losses["fixed"], losses


@pytest.mark.parametrize("layout", [None, "CP2xDP2, packed"])
def test_fixed_equals_a_local_teacher_of_the_same_checkpoint(layout, gloo_world, one_process):
    world_size, changes = DENSE[layout] if layout else (1, {})
    found = gloo_world(world_size).run(
        train_steps, STUDENT(), STUDENT(), changes | {"distill": RECIPE["distill"]}, rows=ROWS
    )
    assert_equal_runs(found[0], one_process("fixed", STUDENT()))


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2xVPP2", "CP2"])
def test_without_privileged_information_the_divergence_is_zero(layout, gloo_world):
    world_size, changes = DENSE[layout]
    changes = changes_of("dynamic", changes, sft_alpha=0.0)
    for record in gloo_world(world_size).run(train_steps, STUDENT(), None, changes)[0]:
        assert abs(record["totals"]["divergence"]) / record["totals"]["tokens"] < 1e-7
        assert max(gradient.abs().max() for gradient in record["gradient"].values()) < 1e-7


@pytest.mark.parametrize(("layout", "kind"), [("TP2+SP", "dynamic"), ("CP2xDP2, packed", "ema")])
def test_sampled_responses_have_equal_scores_under_every_layout(layout, kind, gloo_world):
    world_size, changes = DENSE[layout]
    student = tiny_checkpoint("qwen3_tied", seed=2, num_hidden_layers=2)

    def run(size, changes):
        world = gloo_world(size)
        return world.run(train_on_policy, student, None, changes_of(kind, changes), 1.0, "step", rows=ROWS)[0]

    found, expected = run(world_size, changes), run(1, {})
    assert all(record["totals"]["dataset_tokens"] == 0 < record["totals"]["divergence"] for record in expected)
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    # Of two models that are as near as these, the gradient is a small difference, with a larger share of rounding.
    assert_equal_runs(found, expected, tolerance=5e-5)


def state_of(student) -> list[torch.Tensor]:
    """All that scoring must leave alone: weights, gradients, and what the optimizer keeps of each."""
    parameters = [parameter for chunk in student.model.chunks for parameter in chunk.parameters()]
    state = [parameter.data for parameter in parameters] + [parameter.main_grad for parameter in parameters]
    for optimizer in student.optimizer.chained_optimizers:
        slots = optimizer.optimizer.state
        assert slots
        state += [value for owner in slots for value in (owner.data, *slots[owner].values()) if torch.is_tensor(value)]
    return [value.detach().clone() for value in state]


def score_between_steps(rank, world_size, student, changes):
    """After every step: the weights inside, and what they should be; whether all else has stayed is asserted here."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    _mesh, student, teacher, batches = build(student, None, changes, ROWS)
    parameters = [parameter for chunk in student.model.chunks for parameter in chunk.parameters()]
    modules = [module for chunk in student.model.chunks for module in chunk.modules()]
    decay = {"dynamic": 0.0, "fixed": 1.0, "ema": 0.6}[next(k for k, v in KINDS.items() if v == changes["teacher"])]
    expected = [parameter.detach().double() for parameter in parameters]
    records = []
    for microbatches in batches:
        with teacher.resident():
            signals = teacher.score(microbatches)
        student.compute_gradients(microbatches, signals)
        student.update()
        student.gather_parameters()
        teacher.after_update()
        expected = [decay * a + (1 - decay) * p.detach().double() for a, p in zip(expected, parameters, strict=True)]
        before, modes = state_of(student), [module.training for module in modules]
        with teacher.resident():
            signals = teacher.score(microbatches)
            records.append(([parameter.detach().clone() for parameter in parameters], expected))
        assert not any(
            signal.states.shard.requires_grad or signal.head.weight.requires_grad for signal in signals if signal
        )
        assert modes == [module.training for module in modules] and any(modes)
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(student), strict=True))
    destroy_mesh()
    return records


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", [{"overlap_grad_reduce": True, "overlap_param_gather": True}, PP2])
def test_scoring_leaves_the_student_as_it_was(parallel, kind, gloo_world):
    """Bit by bit. Inside, the weights are the current ones, the initial ones, or an average that is made by hand."""
    for records in gloo_world(2).run(score_between_steps, STUDENT(), changes_of(kind, {"parallel": parallel})):
        assert len(records) == 3
        for found, expected in records:
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6 if kind == "ema" else 0)


def average_of(student, teacher):
    names = {parameter: name for chunk in student.model.chunks for name, parameter in chunk.named_parameters()}
    return {names[parameter]: value for parameter, value in teacher.weights.by_parameter().items()}


def resume_average(rank, world_size, student, changes):
    from megatron_gkd.runtime.mesh import destroy_mesh

    _mesh, student, teacher, batches = build(student, None, changes, ROWS)
    state = average_of(student, teacher)
    microbatches = next(iter(batches))
    with teacher.resident():
        student.compute_gradients(microbatches, teacher.score(microbatches))
    student.update()
    teacher.after_update()
    moved = average_of(student, teacher)
    names = {name: parameter for chunk in student.model.chunks for name, parameter in chunk.named_parameters()}
    teacher.weights.replace({names[name]: value for name, value in state.items()})
    back = average_of(student, teacher)
    destroy_mesh()
    return state, moved, back


def test_the_average_is_saved_and_restored(gloo_world):
    state, moved, back = gloo_world(1).run(resume_average, STUDENT(), changes_of("ema"))[0]
    assert all(torch.equal(state[name], back[name]) for name in state)
    assert not any(torch.equal(state[name], moved[name]) for name in state)
