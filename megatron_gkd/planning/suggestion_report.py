"""The table of suggested layouts, and their overrides."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.plan import Plan
from megatron_gkd.planning.report import gib
from megatron_gkd.planning.settings import as_overrides, changes
from megatron_gkd.planning.suggestions import Suggestion, Sweep
from megatron_gkd.planning.tables import Block, Paragraph, Table
from megatron_gkd.reporting.numbers import format_count


def suggestion_blocks(recipe: Recipe, sweep: Sweep, plan: Plan) -> Iterator[Block]:
    """Yield a table of the suggested layouts, and their overrides."""
    if not sweep.suggestions:
        yield Paragraph(
            "Suggestions",
            (
                f"None of the {_describe(sweep)} fits; "
                "use more GPUs, shorter sequences or memory.optimizer_cpu_offload.",
            ),
        )
        return
    rows = [_row(str(number), one) for number, one in enumerate(sweep.suggestions, start=1)]
    rows.append(_row("recipe", Suggestion({}, plan)))
    columns = (
        *("", "TP", "PP", "VPP", "CP", "EP", "ETP", "DP", "rows", "recompute", "teacher"),
        *("peak, GiB", "fits", "step, s", "tokens/s"),
    )
    yield Table(
        f"Suggestions (estimates; {_describe(sweep)})",
        columns,
        tuple(rows),
    )
    overrides = (as_overrides(changes(recipe, one.settings)) for one in sweep.suggestions)
    yield Paragraph(
        "As overrides of the recipe",
        tuple(f"{number}: {text or '(the recipe as it is)'}" for number, text in enumerate(overrides, start=1)),
    )


def _describe(sweep: Sweep) -> str:
    refused = f", of which {sweep.refused} could not be" if sweep.refused else ""
    return f"{sweep.measured} variants measured{refused}, of {sweep.allowed} layouts that are allowed"


def _row(name: str, one: Suggestion) -> tuple[str, ...]:
    recipe, gpus = one.plan.recipe, one.plan.cluster.gpus
    p = recipe.parallel
    return (
        name,
        str(p.tensor_model_parallel_size),
        str(p.pipeline_model_parallel_size),
        str(p.virtual_pipeline_model_parallel_size or "-"),
        str(p.context_parallel_size),
        str(p.expert_model_parallel_size),
        str(p.expert_tensor_parallel_size),
        str(recipe.data_parallel_size(gpus)),
        str(recipe.train.micro_batch_size),
        p.recompute_granularity or "-",
        _place_of_teacher(recipe),
        gib(one.peak),
        "yes" if one.plan.fits else "no",
        f"{one.seconds:.2f}",
        format_count(one.tokens_per_second),
    )


def _place_of_teacher(recipe: Recipe) -> str:
    local = [one.offload_teacher_model for one in recipe.teacher.all.values() if one.source == "local"]
    if not local:
        return "-"
    return "host" if all(local) else "device" if not any(local) else "both"
