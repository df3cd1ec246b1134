"""Make the plan of a command line, and suggestions where they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_gkd.config.checks import find_problems
from megatron_gkd.config.commands import PLANS
from megatron_gkd.config.schema import Recipe
from megatron_gkd.errors import CommandRefused
from megatron_gkd.planning.candidates import LayoutSearch
from megatron_gkd.planning.cluster import Assumptions, Cluster
from megatron_gkd.planning.costs import MeasureOptions
from megatron_gkd.planning.json_form import plan_to_json, sweep_to_json
from megatron_gkd.planning.measurement import measure
from megatron_gkd.planning.measuring_pool import MeasuringPool
from megatron_gkd.planning.model_folders import named_models, with_local_models
from megatron_gkd.planning.model_sizes import ModelSizes, read_sizes
from megatron_gkd.planning.plan import Plan, make_plan
from megatron_gkd.planning.report import blocks_of
from megatron_gkd.planning.suggestion_report import suggestion_blocks
from megatron_gkd.planning.suggestions import Sweep, Sweeper
from megatron_gkd.planning.tables import print_blocks
from megatron_gkd.reporting.phases import phase


@dataclass(frozen=True)
class PlanRequest:
    """What a command line asks for.

    Attributes:
        path: of the recipe.
        recipe: the recipe.
        cluster: the GPUs.
        assumptions: what is not measured.
        label_fraction: see `MeasureOptions`.
        expert_imbalance: see `MeasureOptions`.
        suggestions: number of layouts to suggest.
        measure_at_most: most layouts that are measured for that.
    """

    path: str
    recipe: Recipe
    cluster: Cluster
    assumptions: Assumptions
    label_fraction: float = 1.0
    expert_imbalance: float = 1.5
    suggestions: int = 0
    measure_at_most: int = 30

    @property
    def options(self) -> MeasureOptions:
        """The assumptions of the measurement."""
        return MeasureOptions(label_fraction=self.label_fraction, expert_imbalance=self.expert_imbalance)


@dataclass(frozen=True)
class PlanResult:
    """A plan, and layouts that are suggested.

    Attributes:
        request: what was asked for.
        plan: of the recipe as it is.
        sweep: suggestions; None where none are wanted.
    """

    request: PlanRequest
    plan: Plan
    sweep: Sweep | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as values that JSON has."""
        tree = {"recipe": self.request.path, **plan_to_json(self.plan)}
        return tree if self.sweep is None else tree | sweep_to_json(self.sweep)

    def print(self) -> None:
        """Print tables to stdout."""
        blocks = blocks_of(self.plan)
        if self.sweep is not None:
            blocks += suggestion_blocks(self.request.recipe, self.sweep, self.plan)
        print_blocks(blocks)


def run_plan(request: PlanRequest, *, is_shown: bool) -> PlanResult:
    """Measure a recipe, and others like it where suggestions are wanted.

    Args:
        request: what to plan.
        is_shown: whether to show the progress.

    Raises:
        UserError: a model's config.json can't be read, or the recipe does not suit it.
    """
    recipe, cluster = with_local_models(request.recipe), request.cluster
    problems = find_problems(recipe, cluster.gpus, command=PLANS) if recipe != request.recipe else []
    if problems:
        raise CommandRefused("\n".join(f"{request.path}: {problem}" for problem in problems))
    with phase("Measuring the recipe without memory", is_main=is_shown):
        costs = measure(recipe, cluster.gpus, request.options)
        sizes = read_sizes(recipe.student.model)
    plan = make_plan(recipe, cluster, request.assumptions, costs, sizes)
    if not request.suggestions:
        return PlanResult(request, plan)
    return PlanResult(request, plan, _suggest(request, recipe, sizes, is_shown=is_shown))


def _suggest(request: PlanRequest, recipe: Recipe, sizes: ModelSizes, *, is_shown: bool) -> Sweep:
    teachers = {key: model for key, model in named_models(recipe).items() if key != "student.model"}
    local = [one.source == "local" for one in recipe.teacher.all.values() if one.teacher_model is not None]
    search = LayoutSearch(
        recipe,
        request.cluster,
        request.assumptions,
        sizes,
        tuple(read_sizes(model.name) for model, is_local in zip(teachers.values(), local, strict=True) if is_local),
    )
    title = "Measuring layouts"
    with phase(title, is_main=is_shown, unit="layouts") as shown, MeasuringPool(request.options) as pool:
        sweeper = Sweeper(
            search,
            lambda recipes: pool.measure(recipes, request.cluster.gpus),
            request.measure_at_most,
            shown.update,
        )
        return sweeper.run(request.suggestions)
