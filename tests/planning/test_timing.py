"""Estimated times, from costs written by hand and a device of round figures."""

from dataclasses import replace

import pytest
from planning.handmade import CLUSTER, EXACT, FORWARD, GIB, SIZES, STUDENT, TEACHER, load_plan, rank, traffic
from recipe_workspace import Workspace

from megatron_gkd.planning.cluster import GB
from megatron_gkd.planning.model_sizes import ModelSizes
from megatron_gkd.planning.placement import Placement
from megatron_gkd.planning.rollout import plan_rollouts
from megatron_gkd.planning.timing import TimeModel

TFLOP = 1e12


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def estimate(recipe, *ranks, sizes=SIZES):
    placement = Placement.of(recipe.parallel, CLUSTER.gpus, CLUSTER.gpus_per_node)
    rollouts = plan_rollouts(recipe, CLUSTER, sizes, EXACT)
    return TimeModel(recipe, CLUSTER, placement, sizes, EXACT, rollouts).estimate(ranks)


def by_phase(step):
    return {one.phase: one for one in step.phases}


def test_computing_is_flops_over_the_rate(workspace):
    step = estimate(load_plan(workspace), rank())
    phases = by_phase(step)
    assert phases["student"].compute == pytest.approx(4 * 3 / 100) and phases["student"].bubble == 0
    assert phases["teacher"].compute == pytest.approx(4 * 1 / 100)
    assert phases["teacher"].transfers == pytest.approx(19 * GIB / (20 * GB)), "offloaded weights come back"
    read = 2 * STUDENT.optimizer + 2 * STUDENT.gradients + STUDENT.weights
    assert phases["update"].compute == pytest.approx(read / (1000 * GB))
    assert step.tokens == 4 * 256 * 8 and step.flops == pytest.approx(8 * (12 + 4) * TFLOP)
    assert step.mean == pytest.approx(sum(one.total for one in step.phases))
    assert step.flops_utilization == pytest.approx(step.flops / (16 * 100 * TFLOP * step.mean))


def test_the_slowest_stage_and_the_bubble_set_the_pace(workspace):
    recipe = load_plan(workspace, "--pipeline_model_parallel_size", "2")
    slow = replace(STUDENT, forward=replace(FORWARD, loss_flops=1e12))
    student = by_phase(estimate(recipe, rank(0), rank(1, student=slow)))["student"]
    assert student.compute == pytest.approx(4 * 4 / 100) and student.bubble == pytest.approx(4 / 100)
    virtual = load_plan(
        workspace,
        "--pipeline_model_parallel_size",
        "2",
        "--virtual_pipeline_model_parallel_size",
        "2",
        "--global_batch_size",
        "16",
    )
    assert by_phase(estimate(virtual, rank(0), rank(1, student=slow)))["student"].bubble == pytest.approx(2 / 100)


def test_gradients_hide_behind_the_backward_pass_where_they_are_overlapped(workspace):
    costs = rank(traffic=(traffic("update", "dp", 8, "reduce_scatter", 8 * GB),))
    shown = by_phase(estimate(load_plan(workspace), costs))["update"].communication
    # 8 of 16 ranks, 4 on each node: a ring leaves the node once for 4 GPUs, and NVLink carries the rest.
    assert shown == pytest.approx(max(7 * 3 / 4 / 100, 7 / 4 / 10))
    hidden = load_plan(workspace, "--overlap_grad_reduce")
    assert by_phase(estimate(hidden, costs))["update"].communication == pytest.approx(shown - 0.12)


def test_tensor_parallel_traffic_is_not_hidden(workspace):
    costs = rank(traffic=(traffic("student", "tp", 2, "all_gather", 2 * GB, 4),))
    assert by_phase(estimate(load_plan(workspace), costs))["student"].communication == pytest.approx(0.04)


def test_decoding_reads_the_weights_for_each_token(workspace):
    recipe = load_plan(
        workspace,
        *("--lmbda", "0.5", "--engine", "vllm", "--vllm_kv_cache_gib", "1", "--max_completion_length", "100"),
        *("--global_batch_size", "32"),
    )
    step = estimate(recipe, rank())
    rollout = by_phase(step)["rollout"]
    cache = 2 * (412 + 50) * 1024 * 2  # of 2 rows
    decoding = 100 * (2 * (SIZES.parameters - SIZES.embedding) + cache) / (1000 * GB)
    prefill = 2 * SIZES.active * 2 * 412 / (100 * TFLOP)
    assert rollout.compute == pytest.approx(decoding + prefill)
    assert step.mean == pytest.approx(step.without_rollout + 0.5 * step.rollout)
    assert by_phase(step)["weight_sync"].communication > 0


def test_a_generation_of_several_steps_is_sampled_once(workspace):
    overrides = ("--lmbda", "0.5", "--engine", "vllm", "--vllm_kv_cache_gib", "1", "--global_batch_size", "32")
    one = estimate(load_plan(workspace, *overrides), rank())
    several = estimate(load_plan(workspace, *overrides, "--steps_per_generation", "4"), rank())
    assert several.mean == pytest.approx(several.without_rollout + 0.5 * several.rollout / 4)
    assert one.rollout < several.rollout < 4 * one.rollout and several.mean < one.mean


def test_a_small_cache_takes_several_rounds(workspace):
    overrides = ["--lmbda", "1", "--engine", "vllm", "--global_batch_size", "64", "--vllm_kv_cache_gib"]
    small, large = (
        plan_rollouts(load_plan(workspace, *overrides, gib), CLUSTER, SIZES, EXACT) for gib in ("0.002", "1")
    )
    assert (small.sampling.at_once, small.sampling.rounds) == (2, 2) and large.sampling.rounds == 1
    assert small.seconds > 1.5 * large.seconds


def test_servers_elsewhere_take_no_time(workspace):
    recipe = load_plan(workspace, "--lmbda", "1", "--engine", "vllm_server", "--vllm_server_urls", "http://a:1")
    step = estimate(recipe, rank())
    assert "rollout" not in by_phase(step) and by_phase(step)["weight_sync"].communication > 0


def test_experts_are_read_where_a_token_chooses_them():
    sizes = ModelSizes(1000, 800, 0, 1, 1, 1, 1, 1, num_experts=8, experts_per_token=2, kv_values=1, kv_heads=1)
    assert sizes.active == 200 + 200 and sizes.parameters_read(0) == 200
    assert sizes.parameters_read(1) == 400 and 990 < sizes.parameters_read(100) <= 1000


def test_an_optimizer_in_host_memory_takes_transfers(workspace):
    model = replace(STUDENT, optimizer=0, optimizer_host=12 * GB)
    update = by_phase(estimate(load_plan(workspace), rank(student=model)))["update"]
    assert update.transfers == pytest.approx(30 / 20)


def test_teachers_add_up(workspace):
    costs = rank(teachers={"a": TEACHER, "b": TEACHER})
    assert by_phase(estimate(load_plan(workspace), costs))["teacher"].compute == pytest.approx(0.08)
