"""Whether the keys of each teacher go together."""

from collections.abc import Iterator

from megatron_gkd.config.schema import OneTeacher, Recipe

LEAVES = tuple(name for name in OneTeacher.model_fields) + ("teachers",)


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
