"""Measure one rank of each pipeline stage."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_gkd.config.schema import Recipe
from megatron_gkd.errors import UserError
from megatron_gkd.planning.costs import MeasureOptions, RankCosts, Traffic
from megatron_gkd.planning.loss_kernels import replace_kernels
from megatron_gkd.planning.planned_student import PlannedStudent
from megatron_gkd.planning.planned_teachers import PlannedTeacher, TeacherPlanner, tensors_of_signal
from megatron_gkd.planning.recipe_models import RecipeModels
from megatron_gkd.planning.trace_cache import TraceCache
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import links_of_groups
from megatron_gkd.runtime.meta_device.assumptions import assuming
from megatron_gkd.runtime.meta_device.world import fake_world
from megatron_gkd.teachers.base import Part, Parts, TeacherSignal


def measure_stages(recipe: Recipe, world_size: int, options: MeasureOptions) -> list[RankCosts]:
    """Return the costs of one rank for each pipeline stage; see `measurement.measure`."""
    replace_kernels()
    models, cache = RecipeModels.open(recipe, world_size, options), TraceCache()
    stages = models.layout.pipeline
    if world_size % (stages * models.layout.tensor * models.layout.context):
        raise UserError(f"{world_size} ranks: must be a multiple of the ranks of one model")
    fused = options.transformer_engine
    assumptions = {
        "fused_norms": fused,
        "fused_attention": fused and recipe.train.attention_backend != "sdpa",
        "fused_optimizer": fused,
        "expert_imbalance": options.expert_imbalance,
    }
    with assuming(**assumptions):
        return [_measure_rank(models, cache, stage, world_size // stages) for stage in range(stages)]


def _measure_rank(models: RecipeModels, cache: TraceCache, stage: int, num_ranks: int) -> RankCosts:
    """Return the costs of the first rank of a stage, which the others of the stage equal or fall short of."""
    rank = stage * num_ranks
    with fake_world(models.layout, models.world_size, rank) as mesh:
        links = links_of_groups(mesh)
        student = PlannedStudent.build(models, mesh, links, cache)
        planner = TeacherPlanner(student, mesh, links, cache)
        measured = {place: planner.measure(place, one) for place, one in models.recipe.teacher.all.items()}
        teachers = {place: one for place, one in measured.items() if one is not None}
        costs, traffic = student.measure(*_join_signals(list(teachers.values())))
        # Each label of a step has one signal.
        states = max((one.states for one in teachers.values()), default=0)
        return RankCosts(
            rank=rank,
            stage=stage,
            num_ranks=num_ranks,
            student=costs,
            teachers={place: one.costs for place, one in teachers.items() if one.costs is not None},
            teacher_states=states * models.microbatches,
            traffic=_sum([*traffic, *(one for teacher in teachers.values() for one in teacher.traffic)]),
            notes=models.notes,
        )


def _join_signals(teachers: list[PlannedTeacher]) -> tuple[TeacherSignal | None, list[Tensor]]:
    """Return the signal of a microbatch, and its tensors; several teachers score equal parts of its labels."""
    signals = [one for one in teachers if one.signal is not None]
    if len(signals) < 2:
        return (signals[0].signal, list(signals[0].tensors)) if signals else (None, [])
    parts, tensors, first = [], [], 0
    for index, one in enumerate(signals):
        last = one.num_labels * (index + 1) // len(signals)
        rows = torch.arange(first, last, device=portability.device())
        signal = one.of_labels(last - first)
        parts.append(Part(rows, signal))
        tensors += [rows, *tensors_of_signal(signal)]
        first = last
    return Parts(tuple(parts)), tensors


def _sum(traffic: list[Traffic]) -> tuple[Traffic, ...]:
    """Return the traffic with equal operations joined."""
    counts: dict[Traffic, int] = {}
    for one in traffic:
        operation = replace(one, count=1)
        counts[operation] = counts.get(operation, 0) + one.count
    return tuple(replace(operation, count=count) for operation, count in counts.items())
