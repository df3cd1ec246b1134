"""Whether the keys of the loss go together."""

from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.divergences import FAMILIES
from megatron_gkd.config.schema import Recipe


@check("lmbda", "teacher_kind")
def samples_have_a_teacher(recipe: Recipe, _: int) -> Iterator[str]:
    """Find samples of the student without a teacher, which leave nothing to train on."""
    if recipe.distill.lmbda > 0 and recipe.teacher.teacher_kind == "none":
        key = f"distill.lmbda = {recipe.distill.lmbda}"
        yield f"{key}: must be 0 with teacher.teacher_kind = none, which scores no samples"


@check("divergence", "beta")
def mixture_differs_from_both(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a mixture M = beta T + (1 - beta) S that is the model itself whose divergence from M is the loss."""
    name, beta = recipe.distill.divergence, recipe.distill.beta
    family = FAMILIES[name]
    if family.at(beta) is None:
        yield f"distill.beta = {beta}: must be {family.allowed} with divergence = {name}"


@check("gkd_topk_tail", "gkd_logits_topk")
def tail_goes_with_top_k(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a bucket for the tail of the whole vocabulary, which has none."""
    if recipe.distill.gkd_topk_tail == "bucket" and recipe.distill.gkd_logits_topk is None:
        yield "distill.gkd_topk_tail = bucket: only with gkd_logits_topk"
