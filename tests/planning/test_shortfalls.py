"""What does not fit, by how much, and what helps."""

from dataclasses import replace

import pytest
from planning.handmade import CLUSTER, EXACT, FORWARD, GIB, SIZES, STUDENT, TEACHER, load_plan, rank
from recipe_workspace import Workspace

from megatron_gkd.planning.plan import make_plan
from megatron_gkd.planning.report import blocks_of
from megatron_gkd.planning.settings import apply_settings, are_valid


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def plan_of(recipe, *ranks, gib=80):
    return make_plan(recipe, replace(CLUSTER, gpu_memory=int(gib * GIB)), EXACT, ranks, SIZES)


def text_of(plan):
    return "\n\n".join(block.plain() for block in blocks_of(plan))


def test_what_fits_says_how_much_is_needed(workspace):
    plan = plan_of(load_plan(workspace), rank())
    assert plan.fits and plan.peak == (2 + 4 + 3 + 1 + 20 + 3) * GIB
    assert "Fits: at most 33.0 of 80.0 GiB, with the reserve." in text_of(plan)


def test_the_bytes_over_and_the_part_to_blame_are_named(workspace):
    plan = plan_of(load_plan(workspace), rank(), gib=25)
    (one,) = plan.shortfalls
    assert (one.phase, one.over, one.part, one.part_bytes) == ("teacher", 8 * GIB, "teacher_weights", 20 * GIB)
    expected = "Does not fit: the phase teacher needs 33.0 of 25.0 GiB on stage 0, 8.00 GiB too much; the largest part "
    assert expected + "is teacher weights with 20.0 GiB" in text_of(plan)
    assert "parallel.tensor_model_parallel_size = 4" in str(one.remedies[0])


def test_each_phase_is_reported_on_its_worst_stage(workspace):
    recipe = load_plan(workspace, "--pipeline_model_parallel_size", "2")
    large = replace(STUDENT, forward=replace(FORWARD, in_flight=2, peak=20 * GIB))
    plan = plan_of(recipe, rank(0, teachers={}), rank(1, student=large, teachers={}), gib=20)
    (one,) = plan.shortfalls
    assert (one.phase, one.stage, one.needed) == ("student", 1, 30 * GIB)


def test_activations_are_recomputed_first(workspace):
    recipe = load_plan(workspace)
    plan = plan_of(recipe, rank(teachers={}), gib=14)
    assert "recompute_granularity" in plan.shortfalls[0].remedies[0].settings
    again = plan_of(apply_settings(recipe, plan.shortfalls[0].remedies[0].settings), rank(teachers={}), gib=14)
    assert all("recompute_granularity" not in one.settings for one in again.shortfalls[0].remedies)


def test_the_teacher_leaves_the_device_where_the_student_needs_it(workspace):
    recipe = load_plan(workspace, "--offload_teacher_model", "false")
    resident = replace(TEACHER, weights_resident=TEACHER.weights, weights_host=0)
    plan = plan_of(recipe, rank(teachers={"teacher": resident}), gib=34)
    (student,) = [one for one in plan.shortfalls if one.phase == "student"]
    assert student.remedies[0].settings == {"offload_teacher_model": True}


def test_a_colocated_engine_makes_room(workspace):
    overrides = ("--lmbda", "1", "--engine", "vllm", "--vllm_gpu_memory_utilization", "0.9")
    plan = plan_of(load_plan(workspace, *overrides), rank(teachers={}), gib=80)
    (one,) = [one for one in plan.shortfalls if one.phase == "rollout"]
    settings = [remedy.settings for remedy in one.remedies]
    assert one.part == "kv_cache" and settings[0] == {"vllm_gpu_memory_utilization": 0.68}
    assert {"offload_model": True} in settings and {"offload_optimizer": True} in settings


@pytest.mark.parametrize("gib", [5, 14, 25])
def test_every_remedy_passes_the_recipes_checks(workspace, gib):
    recipe = load_plan(workspace, "--micro_batch_size", "1", "--global_batch_size", "32")
    plan = plan_of(recipe, rank(teacher_states=2 * GIB), gib=gib)
    remedies = [remedy for one in plan.shortfalls for remedy in one.remedies]
    assert remedies and all(are_valid(apply_settings(recipe, one.settings), CLUSTER.gpus) for one in remedies)
    # 8 heads: tensor parallelism of 16 is no remedy.
    widest = load_plan(workspace, "--tensor_model_parallel_size", "8", "--global_batch_size", "32")
    settings = [one.settings for shortfall in plan_of(widest, rank(), gib=gib).shortfalls for one in shortfall.remedies]
    assert not any("tensor_model_parallel_size" in one for one in settings)


def test_remedies_are_keys_of_the_recipe(workspace):
    plan = plan_of(load_plan(workspace), rank(teacher_states=20 * GIB), gib=25)
    lines = [str(remedy) for one in plan.shortfalls for remedy in one.remedies]
    assert "teacher.teacher_states = host: the teacher's hidden states wait in host memory" in lines
