"""Whether the keys of each teacher go together."""

from collections.abc import Iterator

from megatron_gkd.config.schema import OneTeacher, Recipe

LEAVES = (*OneTeacher.model_fields, "teachers")


def teachers_are_named(recipe: Recipe, _: int) -> Iterator[str]:
    """A teacher without what its kind needs, or with what another kind needs."""
    for place, teacher in recipe.teacher.all.items():
        source = teacher.source
        if source is None:
            yield f"{place}.kind = null: must be local, server, self or none, or follow from teacher_model or _server"
        if source == "local" and teacher.teacher_model is None:
            yield f"{place}.teacher_model = null: must name a model where {place}.kind = local"
        if source == "server" and not teacher.teacher_model_server:
            yield f"{place}.teacher_model_server = []: must name a server where {place}.kind = server"
        if source not in ("server", "none") and teacher.teacher_model_server:
            urls = list(teacher.teacher_model_server)
            yield f"{place}.teacher_model_server = {urls}: only with {place}.kind = server"


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
        if teacher.kind == "none":
            yield f"{place}.kind = none: must be local, server or self"
        for tag in teacher.tags:
            if owners.setdefault(tag, place) != place:
                yield f"{place}.tags = {list(teacher.tags)}: {tag} is a tag of {owners[tag]} already"
