"""Whether a teacher's cache fits the recipe, from its manifest alone."""

from collections.abc import Iterator

from megatron_gkd.config.schema import Recipe
from megatron_gkd.teachers.cache.manifest import Manifest


def caches_are_named(recipe: Recipe, _: int) -> Iterator[str]:
    """A kind that needs a cache and has none, or one that has no use for it."""
    for place, teacher in recipe.teacher.all.items():
        if teacher.source == "cache":
            if teacher.teacher_cache is None:
                yield f"{place}.teacher_cache = null: must name a folder where {place}.teacher_kind = cache"
            if teacher.teacher_model is not None:
                yield (
                    f"{place}.teacher_model = {teacher.teacher_model}: not with {place}.teacher_kind = cache; leave "
                    "teacher_kind out"
                )
        elif teacher.teacher_cache is not None and teacher.source == "none":
            yield f"{place}.teacher_cache = {teacher.teacher_cache}: not with {place}.teacher_kind = none"
        elif teacher.teacher_cache is not None and teacher.source == "self" and teacher.teacher_model is None:
            key = f"{place}.teacher_cache = {teacher.teacher_cache}"
            yield f"{key}: not with a teacher that changes as the student does"


def caches_suit_on_policy(recipe: Recipe, _: int) -> Iterator[str]:
    """A cache alone, which knows nothing of what the student samples."""
    lmbda = recipe.distill.lmbda
    for place, teacher in recipe.teacher.all.items():
        if teacher.source == "cache" and lmbda > 0:
            yield (
                f"distill.lmbda = {lmbda}: must be 0 with {place}.teacher_cache alone, which has no samples of the "
                "student's; or name a teacher_model beside it"
            )


def caches_fit(recipe: Recipe, _: int) -> Iterator[str]:
    """Caches that can't be read, or that don't have what the loss asks for."""
    distill = recipe.distill
    topk = distill.gkd_logits_topk
    for place, teacher in recipe.teacher.all.items():
        if teacher.teacher_cache is None:
            continue
        key = f"{place}.teacher_cache = {teacher.teacher_cache}"
        try:
            manifest = Manifest.read(teacher.teacher_cache)
        except ValueError as error:
            yield f"{key}: {error}"
            continue
        if topk is not None and topk > manifest.k:
            yield f"distill.gkd_logits_topk = {topk}: must be <= the {manifest.k} tokens of {key}"
        if topk is None and manifest.k < manifest.vocab_size and teacher.source != "cache":
            yield (
                f"distill.gkd_logits_topk = null: must be set, and <= {manifest.k}, as rows of {key} have so many "
                "tokens, and those that the teacher beside it judges shall have as many"
            )
        if distill.gkd_topk_tail == "bucket" and manifest.temperature != distill.temperature:
            yield (
                f"distill.temperature = {distill.temperature}: must be {manifest.temperature} with gkd_topk_tail = "
                f"bucket and {key}, whose tails are of that temperature; or score the rows anew"
            )
