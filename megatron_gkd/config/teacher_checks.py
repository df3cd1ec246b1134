"""Whether the keys of each teacher go together."""

from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.config.schema import OneTeacher, Recipe

LEAVES = (*OneTeacher.model_fields, "teachers")
SELF_LEAVES = (*LEAVES, "model")


def teachers_are_named(recipe: Recipe, _: int) -> Iterator[str]:
    """A teacher without what its kind needs, or with what another kind needs."""
    for place, teacher in recipe.teacher.all.items():
        source = teacher.source
        if source is None:
            follows = "follow from teacher_model, teacher_model_server or teacher_cache"
            yield f"{place}.teacher_kind = null: must be local, server, self, cache or none, or {follows}"
        if source == "local" and teacher.teacher_model is None:
            yield f"{place}.teacher_model = null: must name a model where {place}.teacher_kind = local"
        if source == "server" and not teacher.teacher_model_server:
            yield f"{place}.teacher_model_server = []: must name a server where {place}.teacher_kind = server"
        if source not in ("server", "none") and teacher.teacher_model_server:
            urls = list(teacher.teacher_model_server)
            yield f"{place}.teacher_model_server = {urls}: only with {place}.teacher_kind = server"
        if source == "server" and teacher.teacher_model is not None:
            yield f"{place}.teacher_model = {teacher.teacher_model}: not with {place}.teacher_model_server"
        if source != "local" and teacher.teacher_adapters is not None:
            yield f"{place}.teacher_adapters = {teacher.teacher_adapters}: only with {place}.teacher_kind = local"
        if len(set(teacher.teacher_model_server)) < len(teacher.teacher_model_server):
            urls = list(teacher.teacher_model_server)
            yield f"{place}.teacher_model_server = {urls}: must name every server once"


def servers_tell_enough(recipe: Recipe, _: int) -> Iterator[str]:
    """Servers tell log-probabilities of their most likely tokens, at temperature 1."""
    places = [place for place, teacher in recipe.teacher.all.items() if teacher.source == "server"]
    distill = recipe.distill
    if places and distill.gkd_logits_topk is None:
        yield (
            f"distill.gkd_logits_topk = null: must be set with {places[0]}.teacher_model_server, which tells its most "
            "likely tokens only"
        )
    elif places and distill.gkd_topk_tail == "bucket" and distill.temperature != 1:
        yield (
            f"distill.temperature = {distill.temperature}: must be 1 with gkd_topk_tail = bucket and "
            f"{places[0]}.teacher_model_server, whose log-probabilities do not tell the other tokens' share elsewhere"
        )


def teachers_share_rows(recipe: Recipe, _: int) -> Iterator[str]:
    """Several teachers without a key to tell their rows by, beside a single one, or with a tag in common."""
    section = recipe.teacher
    if not section.teachers:
        if section.teacher_tag_key is not None:
            yield f"teacher.teacher_tag_key = {section.teacher_tag_key}: only with teachers"
        return
    if section.teacher_tag_key is None:
        yield "teacher.teacher_tag_key = null: must name the rows' key that holds a teacher's tag, with teachers"
    for leaf in OneTeacher.model_fields:
        if getattr(section, leaf) != OneTeacher.model_fields[leaf].default:
            yield f"teacher.{leaf} = {getattr(section, leaf)}: not beside teachers, which have their own"
    owners: dict[str, str] = {}
    for place, teacher in section.all.items():
        if teacher.teacher_kind == "none":
            yield f"{place}.teacher_kind = none: must be local, server or self"
        for tag in teacher.tags:
            if owners.setdefault(tag, place) != place:
                yield f"{place}.tags = {list(teacher.tags)}: {tag} is a tag of {owners[tag]} already"


def self_is_the_student(recipe: Recipe, _: int) -> Iterator[str]:
    """The student as its own teacher, with another model's name, or with keys that mean nothing there."""
    for place, teacher in recipe.teacher.all.items():
        if teacher.source != "self":
            if teacher.teacher_ema is not None:
                yield f"{place}.teacher_ema = {teacher.teacher_ema}: only with {place}.teacher_kind = self"
            continue
        model, student = teacher.teacher_model, recipe.student.model
        if model is not None and Path(model).resolve() != Path(student).resolve():
            yield (
                f"{place}.teacher_model = {model}: must be student.model ({student}), for the weights that it began "
                f"with, or null, where {place}.teacher_kind = self"
            )
        if model is not None and teacher.teacher_ema is not None:
            key = f"{place}.teacher_ema = {teacher.teacher_ema}"
            yield f"{key}: only without {place}.teacher_model, which are weights that don't move"
        if teacher.offload_teacher_model:
            yield f"{place}.offload_teacher_model = true: must be false where {place}.teacher_kind = self"
