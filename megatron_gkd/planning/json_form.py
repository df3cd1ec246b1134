"""A plan as JSON. Names stay as they are within a `schema_version`; sizes are in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_gkd.config.layout import describe_layout
from megatron_gkd.planning.memory import PhaseMemory
from megatron_gkd.planning.plan import Plan
from megatron_gkd.planning.settings import as_overrides

if TYPE_CHECKING:
    from megatron_gkd.planning.suggestions import Suggestion, Sweep

SCHEMA_VERSION = 1


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as values that JSON has."""
    return {
        "schema_version": SCHEMA_VERSION,
        "is_estimate": True,
        "cluster": {
            "gpus": plan.cluster.gpus,
            "gpus_per_node": plan.cluster.gpus_per_node,
            "gpu_memory": plan.cluster.gpu_memory,
            "device": plan.cluster.device.model_dump(),
        },
        "assumptions": asdict(plan.assumptions),
        "layout": describe_layout(plan.recipe, plan.cluster.gpus),
        "fits": plan.fits,
        "peak": plan.peak,
        "memory": [
            {"stage": rank.stage, "rank": rank.rank, "phases": [_phase(one, plan) for one in rank.phases]}
            for rank in plan.memory
        ],
        "host_memory_of_a_node": plan.host,
        "communication": [
            {"stage": rank.stage, "links": [asdict(one) for one in links]}
            for rank, links in zip(plan.memory, plan.links, strict=True)
        ],
        "rollouts": None if plan.rollouts is None else asdict(plan.rollouts),
        "time": _time(plan),
        "shortfalls": [
            asdict(one)
            | {"remedies": [{"settings": dict(remedy.settings), "reason": remedy.reason} for remedy in one.remedies]}
            for one in plan.shortfalls
        ],
        "costs": [asdict(one) for one in plan.costs],
        "not_counted": list(plan.notes),
    }


def _phase(one: PhaseMemory, plan: Plan) -> dict[str, Any]:
    free = plan.cluster.gpu_memory - one.total
    return {"phase": one.phase, "total": one.total, "free": free, "parts": dict(one.parts)}


def _time(plan: Plan) -> dict[str, Any]:
    time = plan.time
    return {
        "phases": [asdict(one) | {"total": one.total} for one in time.phases],
        "step": time.mean,
        "step_without_rollout": time.without_rollout,
        "rollout": time.rollout,
        "tokens": time.tokens,
        "tokens_per_second": time.tokens_per_second,
        "flops": time.flops,
        "flops_utilization": time.flops_utilization,
    }


def sweep_to_json(sweep: Sweep) -> dict[str, Any]:
    """Return suggestions as values that JSON has."""
    return {
        "layouts_allowed": sweep.allowed,
        "layouts_measured": sweep.measured,
        "layouts_refused": sweep.refused,
        "suggestions": [_suggestion(one) for one in sweep.suggestions],
    }


def _suggestion(one: Suggestion) -> dict[str, Any]:
    return {
        "settings": dict(one.settings),
        "overrides": as_overrides(one.settings),
        "peak": one.peak,
        "step": one.seconds,
        "tokens_per_second": one.tokens_per_second,
    }
