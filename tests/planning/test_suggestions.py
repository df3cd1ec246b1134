"""Layouts that are suggested: allowed, within memory, and the fastest of those that were measured."""

from dataclasses import replace

import pytest
from planning.handmade import CLUSTER, EXACT, FORWARD, GIB, SIZES, STUDENT, TEACHER, load_plan, rank
from recipe_workspace import MIXTURE, Workspace

from megatron_gkd.planning.candidates import LayoutSearch
from megatron_gkd.planning.plan import make_plan
from megatron_gkd.planning.settings import apply_settings, are_valid, as_overrides, changes
from megatron_gkd.planning.suggestion_report import suggestion_blocks
from megatron_gkd.planning.suggestions import Sweeper

SMALL = replace(SIZES, parameters=10**9, embedding=10**7)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def invented(recipe):
    """Return costs that shrink with the ranks that share them."""
    p, gpus = recipe.parallel, CLUSTER.gpus
    shared = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    rows = recipe.train.micro_batch_size
    kept = 40 * GIB * rows // shared // p.context_parallel_size
    kept = kept // 20 if p.recompute_granularity else kept
    flops = 8e12 * rows / shared / p.context_parallel_size
    microbatches = recipe.num_microbatches(gpus)
    forward = replace(
        FORWARD,
        kept=kept,
        in_flight=1,
        transient=0,
        peak=kept,
        forward_flops=flops,
        backward_flops=flops * (3 if p.recompute_granularity else 2),
        microbatches=microbatches,
    )
    size = 16 * GIB // shared
    student = replace(STUDENT, weights=size, gradients=2 * size, optimizer=size, forward=forward)
    teacher = replace(
        TEACHER,
        weights=2 * size,
        weights_resident=0,
        forward=replace(TEACHER.forward, peak=GIB, forward_flops=flops, microbatches=microbatches),
    )
    stages = range(p.pipeline_model_parallel_size)
    return [rank(stage, student=student, teachers={"teacher": teacher}) for stage in stages]


def sweep(recipe, *, count=5, limit=40, memory=80, measure=invented, report=lambda done, total: None):
    cluster = replace(CLUSTER, gpu_memory=memory * GIB)
    search = LayoutSearch(recipe, cluster, EXACT, SMALL, (SMALL,))
    found = Sweeper(search, lambda recipes: [measure(one) for one in recipes], limit, report).run(count)
    naive = make_plan(recipe, cluster, EXACT, invented(recipe), SMALL)
    return found, naive


def test_suggestions_are_valid_fit_and_are_no_slower_than_the_recipe(workspace):
    recipe = load_plan(workspace, "--global_batch_size", "32")
    found, naive = sweep(recipe)
    assert len(found.suggestions) == 5 and found.measured <= 40
    for one in found.suggestions:
        changed = apply_settings(recipe, one.settings)
        assert are_valid(changed, CLUSTER.gpus) and one.plan.fits and one.peak <= 80 * GIB
    seconds = [one.seconds for one in found.suggestions]
    assert seconds == sorted(seconds) and seconds[0] <= naive.time.mean
    assert len({str(one.settings) for one in found.suggestions}) == 5


def test_overrides_make_the_recipe_of_a_suggestion(workspace):
    recipe = load_plan(workspace, "--global_batch_size", "32")
    for one in sweep(recipe)[0].suggestions:
        arguments = as_overrides(changes(recipe, one.settings)).split()
        again = load_plan(workspace, "--global_batch_size", "32", *arguments)
        assert again == apply_settings(recipe, one.settings)


def test_less_memory_brings_recomputing_and_the_teacher_to_the_host(workspace):
    recipe = load_plan(workspace, "--global_batch_size", "32")
    roomy, tight = (sweep(recipe, memory=memory)[0].suggestions[0] for memory in (300, 8))
    assert not roomy.settings["recompute_granularity"] and not roomy.settings["offload_teacher_model"]
    assert tight.settings["recompute_granularity"] == "full" or tight.settings["offload_teacher_model"]
    assert tight.peak <= 8 * GIB


def test_nothing_that_fits_is_said(workspace):
    recipe = load_plan(workspace)
    found, naive = sweep(recipe, memory=1, limit=4)
    assert found.suggestions == ()
    (block,) = suggestion_blocks(recipe, found, naive)
    assert f"None of the {found.measured} variants measured" in block.plain()


def test_layouts_that_models_refuse_are_left_out(workspace):
    def refuse(recipe):
        return None if recipe.parallel.tensor_model_parallel_size == 1 else invented(recipe)

    found, _ = sweep(load_plan(workspace, "--global_batch_size", "32"), measure=refuse)
    assert found.suggestions and found.refused > 0
    assert all(one.settings["tensor_model_parallel_size"] > 1 for one in found.suggestions)


def test_no_more_is_measured_than_allowed(workspace):
    seen, progress = [], []

    def count(recipe):
        seen.append(recipe)
        return invented(recipe)

    recipe = load_plan(workspace, "--global_batch_size", "32")
    found, _ = sweep(recipe, limit=7, measure=count, report=lambda done, total: progress.append((done, total)))
    assert len(seen) == found.measured <= 7 and found.allowed > 7
    assert [done for done, _ in progress] == list(range(1, found.measured + 1)) and progress[-1][1] == 7


def test_larger_microbatches_and_virtual_stages_are_tried(workspace):
    seen = []

    def with_overhead(recipe):
        seen.append(recipe)
        costs = invented(recipe)
        extra = replace(costs[0].student.forward, forward_flops=costs[0].student.forward.forward_flops + 1e13)
        return [replace(one, student=replace(one.student, forward=extra)) for one in costs]

    sweep(load_plan(workspace, "--global_batch_size", "64"), memory=300, measure=with_overhead)
    assert max(one.train.micro_batch_size for one in seen) > 1
    sweep(load_plan(workspace, "--packing"), memory=300, measure=with_overhead)
    assert all(one.train.micro_batch_size == 1 for one in seen if one.data.packing)


def test_layouts_respect_the_models(workspace):
    """4 heads for keys, 8 layers and experts: nothing else divides them."""
    workspace.model("student", {**MIXTURE, "num_experts": 8, "num_experts_per_tok": 2})
    recipe = load_plan(workspace, "--global_batch_size", "32")
    sizes = replace(SMALL, experts=8 * 10**8, num_experts=8, experts_per_token=2)
    found = LayoutSearch(recipe, CLUSTER, EXACT, sizes, (SMALL,)).candidates()
    found = [one.settings for one in found]
    experts = {one["expert_model_parallel_size"] for one in found}
    assert experts == {1, 2, 4, 8} and {one["tensor_model_parallel_size"] for one in found} == {1, 2, 4, 8}
    assert all(one["sequence_parallel"] for one in found if one["tensor_model_parallel_size"] > 1)
    assert all(one["context_parallel_size"] == 1 for one in found), "512 tokens are not worth sharing"
    assert len({str(one) for one in found}) == len(found)


def test_weights_that_can_not_fit_are_not_measured(workspace):
    recipe = load_plan(workspace, "--global_batch_size", "32")
    large = replace(SIZES, parameters=60 * 10**9)
    found = LayoutSearch(recipe, CLUSTER, EXACT, SMALL, (large,)).candidates()
    found = [one.settings for one in found]
    shared = [one["tensor_model_parallel_size"] * one["pipeline_model_parallel_size"] for one in found]
    assert found and min(shared) == 2, "120 GB of weights over two GPUs at least"


def test_the_table_has_the_recipe_beside_them(workspace):
    recipe = load_plan(workspace, "--global_batch_size", "32")
    found, naive = sweep(recipe, count=2)
    table, overrides = suggestion_blocks(recipe, found, naive)
    assert [row[0] for row in table.rows] == ["1", "2", "recipe"]
    assert overrides.plain().splitlines()[1].startswith("  1: ")
