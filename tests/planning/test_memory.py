"""What a rank holds in each phase, from costs written by hand."""

from dataclasses import replace

import pytest
from planning.handmade import CLUSTER, EXACT, FORWARD, GIB, SIZES, STUDENT, TEACHER, load_plan, rank
from recipe_workspace import Workspace

from megatron_gkd.planning.memory import MemoryModel
from megatron_gkd.planning.rollout import plan_rollouts

ON_POLICY = ("--lmbda", "1", "--engine", "vllm", "--vllm_kv_cache_gib", "4")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def phases(recipe, costs):
    rollouts = plan_rollouts(recipe, CLUSTER, SIZES, EXACT)
    of_rank = MemoryModel(recipe, CLUSTER, SIZES, EXACT, rollouts).of_rank(costs)
    return {one.phase: {part: size / GIB for part, size in one.parts.items()} for one in of_rank.phases}


RESIDENT = {"student_weights": 2, "student_gradients": 4, "optimizer": 3, "reserve": 1}


def test_the_phases_of_an_offline_step(workspace):
    found = phases(load_plan(workspace), rank(teacher_states=2 * GIB))
    assert list(found) == ["teacher", "student", "update", "export"]
    assert found["teacher"] == RESIDENT | {"teacher_weights": 20, "teacher_states": 2, "transient": 3}
    # Of an offloaded teacher the head stays; three microbatches of 2 GiB are kept at once.
    assert found["student"] == RESIDENT | {
        "teacher_weights": 1,
        "teacher_states": 2,
        "activations": 6,
        "transient": 1,
    }
    assert found["update"] == RESIDENT | {"teacher_weights": 1, "update": 0.5}
    assert found["export"] == RESIDENT | {"teacher_weights": 1, "gathered_weights": 1}


def test_the_loss_is_shown_where_it_needs_more_than_the_layers(workspace):
    forward = replace(FORWARD, loss=2 * GIB, peak=8 * GIB)
    student = phases(load_plan(workspace), rank(student=replace(STUDENT, forward=forward)))["student"]
    assert (student["activations"], student["loss"]) == (6, 2) and "transient" not in student


def test_states_on_the_host_leave_two_microbatches_on_the_device(workspace):
    recipe = load_plan(workspace, "--teacher_states", "host")
    costs = rank(teacher_states=8 * GIB)
    assert phases(recipe, costs)["student"]["teacher_states"] == 4
    model = MemoryModel(recipe, CLUSTER, SIZES, EXACT, None)
    assert model.of_nodes([costs]) == {"teacher_weights": 8 * 19 * GIB, "teacher_states": 8 * 8 * GIB}


def test_teachers_are_resident_one_after_another(workspace):
    small = replace(TEACHER, weights=10 * GIB, weights_resident=10 * GIB)
    costs = rank(teachers={"a": TEACHER, "b": small})
    rollouts = MemoryModel(load_plan(workspace), CLUSTER, SIZES, EXACT, None).of_rank(costs)
    weights = [one.parts["teacher_weights"] // GIB for one in rollouts.phases]
    assert [one.phase for one in rollouts.phases][:3] == ["teacher", "teacher", "student"]
    assert weights[:3] == [20 + 10, 10 + 1, 11]


def test_colocated_vllm_is_there_while_it_samples_and_gets_weights(workspace):
    found = phases(load_plan(workspace, *ON_POLICY), rank())
    weights = SIZES.parameters * 2 / GIB
    assert found["rollout"] == RESIDENT | {
        "teacher_weights": 1,
        "rollout_weights": pytest.approx(weights),
        "kv_cache": 4,
    }
    assert found["weight_sync"]["rollout_weights"] == pytest.approx(weights) and "kv_cache" not in found["weight_sync"]
    assert "rollout_weights" not in found["student"]


def test_what_is_offloaded_while_vllm_samples_is_in_host_memory(workspace):
    recipe = load_plan(workspace, *ON_POLICY, "--offload_model", "--offload_optimizer")
    assert phases(recipe, rank())["rollout"].keys() == {"teacher_weights", "rollout_weights", "kv_cache", "reserve"}
    rollouts = plan_rollouts(recipe, CLUSTER, SIZES, EXACT)
    host = MemoryModel(recipe, CLUSTER, SIZES, EXACT, rollouts).of_nodes([rank()])
    assert (host["student_weights"], host["optimizer"]) == (8 * 2 * GIB, 8 * 3 * GIB)
    alone = phases(load_plan(workspace, *ON_POLICY, "--offload_optimizer"), rank())["rollout"]
    assert "student_weights" in alone and "student_gradients" not in alone, "gradients leave with either"


def test_vllm_that_does_not_sleep_stays_in_every_phase(workspace):
    found = phases(load_plan(workspace, *ON_POLICY, "--sleep_level", "0"), rank())
    assert all(parts["kv_cache"] == 4 for phase, parts in found.items())
    recipe = load_plan(workspace, *ON_POLICY, "--sleep_level", "1")
    rollouts = plan_rollouts(recipe, CLUSTER, SIZES, EXACT)
    host = MemoryModel(recipe, CLUSTER, SIZES, EXACT, rollouts).of_nodes([rank()])
    assert host["rollout_weights"] == 8 * SIZES.parameters * 2


def test_the_share_of_vllm_is_of_the_whole_memory(workspace):
    recipe = load_plan(workspace, "--lmbda", "1", "--engine", "vllm", "--vllm_gpu_memory_utilization", "0.5")
    rollouts = plan_rollouts(recipe, CLUSTER, SIZES, EXACT)
    assert rollouts.weights + rollouts.kv_cache == 40 * GIB


def test_the_embedded_engine_has_a_cache_of_its_rows(workspace):
    recipe = load_plan(workspace, "--lmbda", "1", "--max_completion_length", "112", "--global_batch_size", "16")
    rollouts = plan_rollouts(recipe, CLUSTER, SIZES, EXACT)
    # 16 rows over 8 replicas; 512 tokens of which the last is never read; 1024 values of 2 bytes over TP2.
    assert rollouts.sampling.at_once == 2 and rollouts.kv_cache == 2 * 511 * 1024
    parts = phases(recipe, rank())["rollout"]
    assert parts["kv_cache"] == pytest.approx(rollouts.kv_cache / GIB)
    assert parts["transient"] == 1 * 8192 / 256, "prompts of 8192 tokens in one pass"


def test_the_optimizer_leaves_for_the_embedded_engine_too(workspace):
    recipe = load_plan(workspace, "--lmbda", "1", "--offload_optimizer")
    parts = phases(recipe, rank())["rollout"]
    assert "student_weights" in parts and not {"optimizer", "student_gradients"} & set(parts)
    rollouts = plan_rollouts(recipe, CLUSTER, SIZES, EXACT)
    host = MemoryModel(recipe, CLUSTER, SIZES, EXACT, rollouts).of_nodes([rank()])
    assert host["optimizer"] == 8 * 3 * GIB and "student_weights" not in host
