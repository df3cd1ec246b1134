"""Whether a teacher's cache fits the recipe, from its manifest alone."""

from collections.abc import Iterator

from megatron_gkd.checkpoint_format.cache_manifest import Manifest
from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.checks.teacher import SOURCE
from megatron_gkd.config.schema import OneTeacher, Recipe


@check(*SOURCE)
def caches_are_of_fixed_teachers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a cache of a teacher that scores nothing, or that changes during training."""
    for place, teacher in recipe.teacher.all.items():
        if teacher.teacher_cache is None:
            continue
        if teacher.source == "none":
            yield f"{_key(place, teacher)}: not with {place}.teacher_kind = none"
        elif teacher.source == "self" and teacher.teacher_model is None:
            yield f"{_key(place, teacher)}: not with a teacher that changes as the student does"


@check(*SOURCE, "lmbda")
def caches_suit_on_policy(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a cache without a teacher, which has no scores of what the student samples."""
    lmbda = recipe.distill.lmbda
    for place, teacher in recipe.teacher.all.items():
        if teacher.source == "cache" and lmbda > 0:
            yield (
                f"distill.lmbda = {lmbda}: must be 0 with {place}.teacher_cache alone, which has no scores of the "
                "student's samples; or name a teacher_model beside it"
            )


@check("teachers", "teacher_cache", needs_files=True)
def caches_are_readable(recipe: Recipe, _: int) -> Iterator[str]:
    """Find folders that are no caches."""
    for key, _teacher, manifest in _caches(recipe):
        if isinstance(manifest, ValueError):
            yield f"{key}: {manifest}"


@check(*SOURCE, "gkd_logits_topk", needs_files=True)
def caches_have_enough_tokens(recipe: Recipe, _: int) -> Iterator[str]:
    """Find caches with fewer tokens of each distribution than the loss compares."""
    topk = recipe.distill.gkd_logits_topk
    for key, teacher, manifest in _caches(recipe):
        if isinstance(manifest, ValueError):
            continue
        if topk is not None and topk > manifest.k:
            yield f"distill.gkd_logits_topk = {topk}: must be <= the {manifest.k} tokens of {key}"
        if topk is None and manifest.k < manifest.vocab_size and teacher.source != "cache":
            yield (
                f"distill.gkd_logits_topk = null: must be set, and <= {manifest.k}, as rows of {key} have so many "
                "tokens; the teacher beside it scores the other rows with as many"
            )


@check("teachers", "teacher_cache", "gkd_topk_tail", "temperature", needs_files=True)
def caches_are_of_the_temperature(recipe: Recipe, _: int) -> Iterator[str]:
    """Find caches whose tails are of another temperature than the loss."""
    distill = recipe.distill
    for key, _teacher, manifest in _caches(recipe):
        if isinstance(manifest, ValueError) or distill.gkd_topk_tail != "bucket":
            continue
        if manifest.temperature != distill.temperature:
            yield (
                f"distill.temperature = {distill.temperature}: must be {manifest.temperature} with gkd_topk_tail = "
                f"bucket and {key}, whose tails are of that temperature; or score the rows anew"
            )


NEED_A_CACHE = (caches_are_readable, caches_have_enough_tokens, caches_are_of_the_temperature, caches_suit_on_policy)
"""The checks of commands that read the cache."""


def _key(place: str, teacher: OneTeacher) -> str:
    return f"{place}.teacher_cache = {teacher.teacher_cache}"


def _caches(recipe: Recipe) -> Iterator[tuple[str, OneTeacher, Manifest | ValueError]]:
    """Yield the key of each cache with its value, its teacher, and its manifest or why it cannot be read."""
    for place, teacher in recipe.teacher.all.items():
        if teacher.teacher_cache is None:
            continue
        manifest: Manifest | ValueError
        try:
            manifest = Manifest.read(teacher.teacher_cache)
        except ValueError as error:
            manifest = error
        yield _key(place, teacher), teacher, manifest
