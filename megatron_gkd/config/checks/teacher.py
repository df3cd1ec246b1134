"""Whether the keys of each teacher go together."""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.dataset_names import without_size
from megatron_gkd.config.schema import OneTeacher, Recipe
from megatron_gkd.config.stages import STAGE_KEYS, Stages

SOURCE = ("teachers", "teacher_kind", "teacher_model", "teacher_model_server", "teacher_cache")
"""The keys that name all teachers, and decide of what kind each is."""


_OF_SELF = ("teacher_states", "teacher_micro_batch_tokens", "teacher_ema")
_OF_NAMED = tuple(leaf for leaf in OneTeacher.model_fields if leaf not in (*SOURCE, *_OF_SELF))
"""Keys that only a teacher which is named can have."""


def describe_unnamed(place: str) -> str:
    """Return the problem of a teacher that nothing names."""
    follows = "follow from teacher_model, teacher_model_server or teacher_cache"
    return f"{place}.teacher_kind = null: must be local, server, self, cache or none, or {follows}"


@check(*SOURCE, *_OF_NAMED)
def unnamed_teachers_have_no_keys(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys of a teacher beside none that is named: the student as its own, if rows have a teacher_prompt."""
    teacher = recipe.teacher
    if teacher.teachers or teacher.is_named:
        return
    if [leaf for leaf in _OF_NAMED if getattr(teacher, leaf) != OneTeacher.model_fields[leaf].default]:
        yield describe_unnamed("teacher")


@check(*SOURCE, "streaming")
def streams_have_a_named_teacher(recipe: Recipe, _: int) -> Iterator[str]:
    """Find rows that are not known at the start, where a teacher depends on them."""
    teacher = recipe.teacher
    if recipe.data.streaming and not teacher.teachers and not teacher.is_named:
        yield (
            "teacher.teacher_kind = null: must be given with data.streaming, whose rows are not known at the start; "
            "self: the student with each row's teacher_prompt"
        )


@check(*SOURCE)
def teachers_are_named(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a teacher without what its kind needs."""
    for place, teacher in recipe.teacher.all.items():
        match teacher.source:
            case None:
                yield describe_unnamed(place)
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
        if urls and source != "server":
            yield f"{place}.teacher_model_server = {urls}: only with {place}.teacher_kind = server"
        model = f"{place}.teacher_model = {teacher.teacher_model}"
        if teacher.teacher_model is not None and source == "none":
            yield f"{model}: not with {place}.teacher_kind = none; set it to null"
        if teacher.teacher_model is not None and source == "server":
            yield f"{model}: not with {place}.teacher_model_server"
        if teacher.teacher_model is not None and source == "cache":
            yield f"{model}: not with {place}.teacher_kind = cache; leave teacher_kind out"
        if teacher.teacher_adapters is not None and source != "local":
            yield f"{place}.teacher_adapters = {teacher.teacher_adapters}: only with {place}.teacher_kind = local"


_OF_LOCAL = (*(f"teacher_{leaf}" for leaf in STAGE_KEYS), "teacher_fp8_format")


@check(*SOURCE, *_OF_LOCAL)
def local_teachers_are_sharded(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys of models that are built here, of a teacher that is none."""
    for place, teacher in recipe.teacher.all.items():
        is_local = teacher.source in ("local", None)
        for leaf in _OF_LOCAL:
            value = getattr(teacher, leaf)
            if value is not None and not is_local:
                yield f"{place}.{leaf} = {value}: only with {place}.teacher_kind = local"


@check("teachers", "teacher_fp8_format", "teacher_fp8_recipe")
def fp8_recipe_goes_with_fp8(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a recipe of FP8 without FP8."""
    for place, teacher in recipe.teacher.all.items():
        default = OneTeacher.model_fields["teacher_fp8_recipe"].default
        if teacher.teacher_fp8_format is None and teacher.teacher_fp8_recipe != default:
            yield f"{place}.teacher_fp8_recipe = {teacher.teacher_fp8_recipe}: only with {place}.teacher_fp8_format"


_OF_SERVERS = (
    "teacher_server_concurrency",
    "teacher_server_timeout_s",
    "teacher_server_max_downtime_s",
    "teacher_server_check_interval",
)


@check(*SOURCE, *_OF_SERVERS)
def server_keys_go_with_teacher_servers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys of servers beside a teacher of another kind."""
    for place, teacher in recipe.teacher.all.items():
        for leaf in _OF_SERVERS:
            value = getattr(teacher, leaf)
            if teacher.is_named and teacher.source != "server" and value != OneTeacher.model_fields[leaf].default:
                yield f"{place}.{leaf} = {value}: only with {place}.teacher_kind = server"


@check(*SOURCE, *_OF_LOCAL[:-1], "pipeline_model_parallel_size")
def stages_of_teachers_are_described(recipe: Recipe, _: int) -> Iterator[str]:
    """Find stages of a local teacher that no model can have."""
    for place, teacher in recipe.teacher.all.items():
        if teacher.source == "local":
            stages = Stages.of_teacher(place, teacher)
            for problem in stages.problems(recipe.parallel.pipeline_model_parallel_size, None):
                yield problem.line(stages.prefix)


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


@check("teachers", "teacher_tag_key", "dataset", "val_dataset")
def tags_are_sources(recipe: Recipe, _: int) -> Iterator[str]:
    """Find tags that name no source, and sources without a teacher, where the tag of a row is its source."""
    if recipe.teacher.teacher_tag_key != "dataset":
        return
    data = recipe.data
    leaves = {"dataset": data.dataset, "val_dataset": data.val_dataset}
    named = [(leaf, without_size(entry.path)) for leaf, entries in leaves.items() for entry in entries]
    names = list(dict.fromkeys(name for _, name in named))
    tags = {tag for teacher in recipe.teacher.teachers for tag in teacher.tags}
    for index, teacher in enumerate(recipe.teacher.teachers):
        for tag in teacher.tags:
            if tag not in names:
                near = get_close_matches(tag, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; they are {', '.join(names)}"
                yield (
                    f"teacher.teachers[{index}].tags = {list(teacher.tags)}: {tag} is no entry of data.dataset or "
                    f"data.val_dataset, without #n{hint}"
                )
    for leaf, name in named:
        if name not in tags:
            yield f"data.{leaf} = {name}: no teacher has this tag (teacher.teacher_tag_key = dataset)"


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
def local_teachers_are_offloaded(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a teacher that is moved to host memory, and has no weights of its own in device memory."""
    for place, teacher in recipe.teacher.all.items():
        if teacher.offload_teacher_model and teacher.is_named and teacher.source != "local":
            yield f"{place}.offload_teacher_model = true: must be false where {place}.teacher_kind = {teacher.source}"
