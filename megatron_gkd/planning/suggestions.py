"""Search for the fastest layouts that fit: by bounds, by measurements, then with larger microbatches or more chunks."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.candidates import LayoutSearch
from megatron_gkd.planning.costs import RankCosts
from megatron_gkd.planning.plan import Plan, make_plan
from megatron_gkd.planning.settings import Settings, apply_settings, are_valid
from megatron_gkd.planning.shortfalls import RECOMPUTE_LAYERS

Measure = Callable[[Sequence[Recipe]], Iterable[Sequence[RankCosts] | None]]
"""Measure recipes, in their order; None for one that the models refuse."""
Report = Callable[[int, int], None]
"""Called with the number of measured layouts and of those that will be."""

_DIMENSIONS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
_TO_REFINE = 3
_REFINED_SHARE = 0.3
_LARGEST_MICROBATCH = 16
_FASTER = 0.99
"""A variant that saves less of a step's time is not varied further."""
_BATCH = 4
"""Layouts that are measured at the same time."""
_RECOMPUTING = 4 / 3
"""How much longer a student takes that computes its layers again."""


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits.

    Attributes:
        settings: all of its keys.
        plan: what the recipe needs with it.
    """

    settings: Settings
    plan: Plan

    @property
    def peak(self) -> int:
        """Bytes of the phase and stage that need most."""
        return self.plan.peak

    @property
    def seconds(self) -> float:
        """Estimated time of a step, in the mean."""
        return self.plan.time.mean

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a step over its time."""
        return self.plan.time.tokens_per_second


@dataclass(frozen=True)
class Sweep:
    """The result of a search.

    Attributes:
        suggestions: the fastest first, of each layout its fastest variant.
        allowed: layouts that the recipe's checks allow and whose weights can fit.
        measured: how many layouts were measured, with their variants.
        refused: how many of these could not be.
    """

    suggestions: tuple[Suggestion, ...]
    allowed: int
    measured: int
    refused: int = 0


@dataclass
class Sweeper:
    """Measures layouts and keeps those that fit.

    Attributes:
        search: finds layouts, and has the recipe.
        measure: measures recipes.
        limit: most layouts that are measured.
        report: shows the progress.
    """

    search: LayoutSearch
    measure: Measure
    limit: int = 30
    report: Report = lambda done, total: None
    _measured: int = field(default=0, init=False)
    _refused: int = field(default=0, init=False)
    _total: int = field(default=0, init=False)
    _found: dict[str, Suggestion] = field(default_factory=dict, init=False)

    def run(self, count: int) -> Sweep:
        """Return the `count` fastest layouts that fit."""
        candidates = self.search.candidates()
        self._total = min(self.limit, len(candidates))
        waiting = [(one.bound, index, one.settings) for index, one in enumerate(candidates)]  # a heap
        self._explore(waiting, int(self.limit * (1 - _REFINED_SHARE)))
        for rank in range(_TO_REFINE):
            self._refine(rank)
        self._explore(waiting, self.limit)
        return Sweep(tuple(self._ranked()[:count]), len(candidates), self._measured, self._refused)

    def _explore(self, waiting: list[tuple[float, int, Settings]], limit: int) -> None:
        """Measure layouts from the smallest bound on, and those that do not fit again with recomputing."""
        while waiting and self._measured < limit:
            batch = [heapq.heappop(waiting) for _ in range(min(_BATCH, len(waiting), limit - self._measured))]
            results = list(self._try([settings for _, _, settings in batch]))
            for (bound, index, settings), (_, fits) in zip(batch, results, strict=True):
                if not fits and settings["recompute_granularity"] is None:
                    heapq.heappush(waiting, (bound * _RECOMPUTING, index, {**settings, **RECOMPUTE_LAYERS}))

    def _ranked(self) -> list[Suggestion]:
        """Return the fastest variant of each layout that fits, the fastest first."""
        fastest: dict[str, Suggestion] = {}
        for one in sorted(self._found.values(), key=lambda one: (one.seconds, one.peak)):
            fastest.setdefault(_layout(one.settings), one)
        return list(fastest.values())

    def _refine(self, rank: int) -> None:
        """Vary one of the fastest layouts as long as that makes it faster."""
        ranked = self._ranked()
        if rank >= len(ranked):
            return
        best = ranked[rank]
        while self._measured < self.limit:
            variants = [one for one in self._variants(best.settings) if _key(one) not in self._found]
            variants = variants[: self.limit - self._measured]
            if not variants:
                return
            list(self._try(variants))
            better = [self._found[key] for key in map(_key, variants) if key in self._found]
            better = [one for one in better if one.seconds < best.seconds * _FASTER]
            if not better:
                return
            best = min(better, key=lambda one: one.seconds)

    def _variants(self, settings: Settings) -> Iterator[dict[str, Any]]:
        """Yield what differs in one respect and is allowed: larger microbatches, or more virtual stages."""
        recipe, gpus = self.search.recipe, self.search.cluster.gpus
        yield from (one for one in self._larger(settings) if are_valid(apply_settings(recipe, one), gpus))

    def _larger(self, settings: Settings) -> Iterator[dict[str, Any]]:
        recipe, size = self.search.recipe, settings["micro_batch_size"]
        if not recipe.data.packing and size < _LARGEST_MICROBATCH:
            yield {**settings, "micro_batch_size": 2 * size}
        stages = settings["pipeline_model_parallel_size"]
        if stages > 1:
            chunks = settings["virtual_pipeline_model_parallel_size"] or 1
            layers = self.search.student.layers // stages
            more = next((one for one in range(chunks + 1, layers + 1) if layers % one == 0), None)
            if more is not None:
                yield {**settings, "virtual_pipeline_model_parallel_size": more}

    def _try(self, candidates: Sequence[Settings]) -> Iterator[tuple[Settings, bool]]:
        """Measure layouts with teachers in host memory, and yield whether each fits, with them there or not."""
        recipes = [apply_settings(self.search.recipe, one) for one in candidates]
        for settings, costs in zip(candidates, self.measure(recipes), strict=True):
            self._measured += 1
            self._refused += costs is None
            self.report(self._measured, max(self._total, self._measured))
            yield settings, costs is not None and self._keep(settings, costs)

    def _keep(self, settings: Settings, costs: Sequence[RankCosts]) -> bool:
        plans = [self._suggest(settings, costs)]
        if self.search.teachers:
            resident = [keep_teachers(one) for one in costs]
            plans.append(self._suggest({**settings, "offload_teacher_model": False}, resident))
        fitting = [one for one in plans if one.plan.fits]
        if fitting:
            self._found[_key(settings)] = min(fitting, key=lambda one: one.seconds)
        return bool(fitting)

    def _suggest(self, settings: Settings, costs: Sequence[RankCosts]) -> Suggestion:
        search = self.search
        recipe = apply_settings(search.recipe, settings)
        return Suggestion(settings, make_plan(recipe, search.cluster, search.assumptions, costs, search.student))


def keep_teachers(costs: RankCosts) -> RankCosts:
    """Return the costs of a rank whose offloaded teachers stay on the device instead."""
    teachers = {
        place: replace(one, weights_resident=one.weights, weights_host=0) if one.weights else one
        for place, one in costs.teachers.items()
    }
    return replace(costs, teachers=teachers)


def _key(settings: Settings) -> str:
    return str({leaf: value for leaf, value in settings.items() if leaf != "offload_teacher_model"})


def _layout(settings: Settings) -> str:
    return str([value for leaf, value in settings.items() if leaf in _DIMENSIONS])
