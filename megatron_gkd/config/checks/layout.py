"""Whether the layout and the batches divide the processes, and what Megatron-Core can combine."""

from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.schema import Recipe
from megatron_gkd.config.stages import STAGE_KEYS, Stages

_REPLICA = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
_EXPERTS = ("expert_tensor_parallel_size", "expert_model_parallel_size", "pipeline_model_parallel_size")


def _product(recipe: Recipe, leaves: tuple[str, ...]) -> tuple[str, int]:
    """Return the product of keys of the section as text, and its value."""
    product, sizes = 1, [getattr(recipe.parallel, leaf) for leaf in leaves]
    for size in sizes:
        product *= size
    return f"{' x '.join(leaves)} = {' x '.join(map(str, sizes))} = {product}", product


@check(*_REPLICA)
def replicas_divide_the_ranks(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Find replicas of the model whose ranks do not divide those of the run."""
    text, ranks = _product(recipe, _REPLICA)
    if world_size % ranks:
        yield f"parallel.{text}: must divide the number of processes ({world_size})"


@check(*_EXPERTS)
def expert_replicas_divide_the_ranks(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Find replicas of the experts whose ranks do not divide those of the run."""
    text, ranks = _product(recipe, _EXPERTS)
    if world_size % ranks:
        yield f"parallel.{text}: must divide the number of processes ({world_size})"


@check("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_size")
def virtual_stages_have_a_pipeline(recipe: Recipe, _: int) -> Iterator[str]:
    """Find virtual stages of a pipeline of one stage."""
    p = recipe.parallel
    if p.virtual_pipeline_model_parallel_size and p.pipeline_model_parallel_size == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size = {p.virtual_pipeline_model_parallel_size}: "
            "needs pipeline_model_parallel_size > 1"
        )


@check("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", *STAGE_KEYS)
def stages_are_described(recipe: Recipe, _: int) -> Iterator[str]:
    """Find stages of the student that no model can have."""
    p = recipe.parallel
    pipeline, virtual = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    for problem in Stages.of_student(p).problems(pipeline, virtual):
        yield problem.line("parallel.")


LAYOUT = (
    replicas_divide_the_ranks,
    expert_replicas_divide_the_ranks,
    virtual_stages_have_a_pipeline,
    stages_are_described,
)
"""The checks of the layout alone."""


@check(*_REPLICA, "virtual_pipeline_model_parallel_size", "global_batch_size", "micro_batch_size")
def batches_divide(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Find a global batch that is not a whole number of microbatches on every rank, or too few for the pipeline."""
    _, ranks = _product(recipe, _REPLICA)
    if world_size % ranks:
        return  # reported above; there is no data-parallel size
    replicas, key = world_size // ranks, f"train.global_batch_size = {recipe.train.global_batch_size}"
    rows = recipe.train.micro_batch_size * replicas
    if recipe.train.global_batch_size % rows:
        yield (
            f"{key}: must be a multiple of micro_batch_size x data-parallel size = {recipe.train.micro_batch_size} x "
            f"{replicas} = {rows}"
        )
        return
    p = recipe.parallel
    microbatches = recipe.train.global_batch_size // rows
    if p.virtual_pipeline_model_parallel_size and microbatches % p.pipeline_model_parallel_size:
        yield (
            f"{key}: makes {microbatches} microbatches on each data-parallel rank; virtual pipeline stages need a "
            f"multiple of pipeline_model_parallel_size ({p.pipeline_model_parallel_size})"
        )


@check("recompute_granularity", "recompute_method", "recompute_num_layers")
def recomputing_is_described(recipe: Recipe, _: int) -> Iterator[str]:
    """Find full recomputing without its details, or details without it."""
    p = recipe.parallel
    for leaf in ("recompute_method", "recompute_num_layers"):
        value = getattr(p, leaf)
        if p.recompute_granularity == "full" and value is None:
            yield f"parallel.{leaf} = null: must be set with recompute_granularity full"
        if p.recompute_granularity != "full" and value is not None:
            yield f"parallel.{leaf} = {value}: only with recompute_granularity full"


@check("overlap_param_gather", "distributed_optimizer", "overlap_grad_reduce")
def overlap_has_what_it_needs(recipe: Recipe, _: int) -> Iterator[str]:
    """Find parameters gathered during the forward pass without what Megatron-Core needs for it."""
    p = recipe.parallel
    for leaf in ("distributed_optimizer", "overlap_grad_reduce"):
        if p.overlap_param_gather and not getattr(p, leaf):
            yield f"parallel.overlap_param_gather = true: needs {leaf}"
