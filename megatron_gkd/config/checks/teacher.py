"""Whether the keys of each teacher go together."""

from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.schema import OneTeacher, Recipe

SOURCE = ("teachers", "teacher_kind", "teacher_model", "teacher_model_server", "teacher_cache")
"""The keys that name all teachers, and decide of what kind each is."""


@check(*SOURCE)
def teachers_are_named(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a teacher without what its kind needs."""
    for place, teacher in recipe.teacher.all.items():
        match teacher.source:
            case None:
                follows = "follow from teacher_model, teacher_model_server or teacher_cache"
                yield f"{place}.teacher_kind = null: must be local, server, self, cache or none, or {follows}"
            case "local" if teacher.teacher_model is None:
                yield f"{place}.teacher_model = null: must name a model where {place}.teacher_kind = local"
            case "server" if not teacher.teacher_model_server:
                yield f"{place}.teacher_model_server = []: must name a server where {place}.teacher_kind = server"
            case "cache" if teacher.teacher_cache is None:
                yield f"{place}.teacher_cache = null: must name a folder where {place}.teacher_kind = cache"


@check(*SOURCE, "teacher_adapters")
def teachers_have_keys_of_their_kind(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys that another kind of teacher has."""
    for place, teacher in recipe.teacher.all.items():
        source, urls = teacher.source, list(teacher.teacher_model_server)
        if urls and source not in ("server", "none"):
            yield f"{place}.teacher_model_server = {urls}: only with {place}.teacher_kind = server"
        model = f"{place}.teacher_model = {teacher.teacher_model}"
        if teacher.teacher_model is not None and source == "server":
            yield f"{model}: not with {place}.teacher_model_server"
        if teacher.teacher_model is not None and source == "cache":
            yield f"{model}: not with {place}.teacher_kind = cache; leave teacher_kind out"
        if teacher.teacher_adapters is not None and source != "local":
            yield f"{place}.teacher_adapters = {teacher.teacher_adapters}: only with {place}.teacher_kind = local"


@check("teachers", "teacher_model_server")
def servers_are_distinct(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a server that is named twice."""
    for place, teacher in recipe.teacher.all.items():
        urls = list(teacher.teacher_model_server)
        if len(set(urls)) < len(urls):
            yield f"{place}.teacher_model_server = {urls}: must name every server once"


@check(*SOURCE, "gkd_logits_topk", "gkd_topk_tail", "temperature")
def servers_give_enough(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a loss that needs more than a server gives: log-probabilities of its top-k tokens, at temperature 1."""
    places = [place for place, teacher in recipe.teacher.all.items() if teacher.source == "server"]
    distill = recipe.distill
    if places and distill.gkd_logits_topk is None:
        yield (
            f"distill.gkd_logits_topk = null: must be set with {places[0]}.teacher_model_server, which gives its most "
            "likely tokens only"
        )
    elif places and distill.gkd_topk_tail == "bucket" and distill.temperature != 1:
        yield (
            f"distill.temperature = {distill.temperature}: must be 1 with gkd_topk_tail = bucket and "
            f"{places[0]}.teacher_model_server, which gives the other tokens' probability at temperature 1 only"
        )


@check(*OneTeacher.model_fields, "teachers")
def several_teachers_replace_one(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys of a single teacher beside `teachers`."""
    section = recipe.teacher
    if section.teachers:
        for leaf, field in OneTeacher.model_fields.items():
            if getattr(section, leaf) != field.default:
                yield f"teacher.{leaf} = {getattr(section, leaf)}: not beside teachers, which have their own"


@check("teachers", "teacher_tag_key")
def tag_key_goes_with_teachers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find several teachers without a key of the rows' tags, or the key without them."""
    key, teachers = recipe.teacher.teacher_tag_key, recipe.teacher.teachers
    if teachers and key is None:
        yield "teacher.teacher_tag_key = null: must name the rows' key that holds a teacher's tag, with teachers"
    if not teachers and key is not None:
        yield f"teacher.teacher_tag_key = {key}: only with teachers"


@check("teachers")
def teachers_share_the_tags(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a tag of two teachers, and rows that have no teacher."""
    owners: dict[str, str] = {}
    for index, teacher in enumerate(recipe.teacher.teachers):
        place = f"teacher.teachers[{index}]"
        if teacher.teacher_kind == "none":
            yield f"{place}.teacher_kind = none: must be local, server or self"
        for tag in teacher.tags:
            if owners.setdefault(tag, place) != place:
                yield f"{place}.tags = {list(teacher.tags)}: {tag} is a tag of {owners[tag]} already"


@check(*SOURCE, "model")
def self_is_the_student(recipe: Recipe, _: int) -> Iterator[str]:
    """Find the student as its own teacher under another model's name."""
    for place, teacher in recipe.teacher.all.items():
        model, student = teacher.teacher_model, recipe.student.model
        if teacher.source == "self" and model is not None and Path(model).resolve() != Path(student).resolve():
            yield (
                f"{place}.teacher_model = {model}: must be student.model ({student}), for its initial weights, or null "
                f"where {place}.teacher_kind = self"
            )


@check(*SOURCE, "teacher_ema")
def average_is_of_current_weights(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a moving average of weights that do not change."""
    for place, teacher in recipe.teacher.all.items():
        key = f"{place}.teacher_ema = {teacher.teacher_ema}"
        if teacher.teacher_ema is None:
            continue
        if teacher.source != "self":
            yield f"{key}: only with {place}.teacher_kind = self"
        elif teacher.teacher_model is not None:
            yield f"{key}: only without {place}.teacher_model, whose weights do not change"


@check(*SOURCE, "offload_teacher_model")
def self_is_not_offloaded(recipe: Recipe, _: int) -> Iterator[str]:
    """Find the student as its own teacher that is moved to host memory."""
    for place, teacher in recipe.teacher.all.items():
        if teacher.source == "self" and teacher.offload_teacher_model:
            yield f"{place}.offload_teacher_model = true: must be false where {place}.teacher_kind = self"
