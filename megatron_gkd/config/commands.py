"""The options of the commands beside train, and their checks of a recipe."""

import json
from collections.abc import Iterator
from dataclasses import replace

from megatron_gkd.config.checks import Check, CommandChecks, cache, layout, model, output, teacher
from megatron_gkd.config.checks.registry import command_check
from megatron_gkd.config.options import Option, positive
from megatron_gkd.config.schema import OneTeacher, ParallelSection, Recipe, TeacherSection


def _teacher_or_student(text: str) -> str:
    if text not in ("teacher", "student"):
        raise ValueError
    return text


SCORE = {
    "output": Option("a folder", "the cache; an interrupted run of the same command is continued", required=True),
    "shard_rows": Option("an integer >= 1", "most rows of a file, and of what a killed run loses", 1024, positive),
}
GENERATE = {
    "from": Option("teacher or student", "the model that generates", read=_teacher_or_student, required=True),
    "output": Option("a .jsonl file", "an interrupted run of the same command is continued", required=True),
    "n": Option("an integer >= 1", "completions of each prompt; under torchrun write -n", 1, positive),
    "chunk_rows": Option(
        "an integer >= 1", "prompts that are generated together, and that a killed run loses at most", 256, positive
    ),
}
EXPORT = {
    "output": Option(
        "a folder that does not exist",
        "of the export; RUN/hf-step-NNNNNN where it is left out, RUN/adapters-step-NNNNNN for adapters",
    ),
    "merge": Option("", "with adapters: export a whole checkpoint with them merged", False, is_flag=True),
}
CHECK = {"nproc": Option("an integer >= 1", "processes that the layout must fit", 1, positive)}


def one_process() -> list[str]:
    """Return overrides that set a recipe's layout to the defaults, whatever it was trained under."""
    defaults = [f"--{name}={json.dumps(field.default)}" for name, field in ParallelSection.model_fields.items()]
    return [*defaults, "--attention_backend=auto"]  # another may need a device that is not there


@command_check(*teacher.SOURCE)
def scored_teachers_are_fixed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a teacher that changes during training, or that is no model."""
    for place, one in recipe.teacher.all.items():
        if one.source is not None and not _is_fixed(one):
            yield f"{place}.teacher_kind = {one.source}: must be a teacher whose weights do not change: local or server"


def _is_fixed(one: OneTeacher) -> bool:
    return one.source in ("local", "server") or (one.source == "self" and one.teacher_model is not None)


@command_check("gkd_logits_topk")
def scores_have_a_size(recipe: Recipe, _: int) -> Iterator[str]:
    """Find scores without the number of tokens to keep."""
    if recipe.distill.gkd_logits_topk is None:
        yield "distill.gkd_logits_topk = null: must be set to score: how many tokens of each distribution are kept"


@command_check(*teacher.SOURCE)
def one_teacher_generates(recipe: Recipe, _: int) -> Iterator[str]:
    """Find several teachers, or one that is no model of its own."""
    if recipe.teacher.teachers:
        count = len(recipe.teacher.teachers)
        yield f"teacher.teachers = {count} teachers: must be one to generate --from teacher; name it as teacher_model"
    elif recipe.teacher.source not in (None, "local", "server"):
        yield f"teacher.teacher_kind = {recipe.teacher.source}: must be local or server to generate --from teacher"


@command_check("weight_sync")
def whole_weights_are_sent(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a transfer of adapters, which `generate` merges first."""
    if recipe.rollout.weight_sync == "lora":
        yield "rollout.weight_sync = lora: must be folder, nccl or gloo to generate, which merges adapters first"


def _without_teacher(check: Check) -> Check:
    """Return a check of the recipe's student alone."""

    def find(recipe: Recipe, world_size: int) -> Iterator[str]:
        alone = recipe.model_copy(update={"teacher": TeacherSection(teacher_kind="none")})
        return check.find(alone, world_size)

    return replace(check, find=find)


# Only training reads a cache, which need not exist yet for these commands, and writes exports.
_TRAINING_ALONE = (*cache.NEED_A_CACHE, output.sources_are_kept)
SCORES = CommandChecks(extra=(scored_teachers_are_fixed, scores_have_a_size), left_out=_TRAINING_ALONE)
# Nothing is scored: no log-probabilities of a teacher server are needed.
_WITHOUT_SCORES = (*_TRAINING_ALONE, teacher.servers_give_enough)
STUDENT_GENERATES = CommandChecks(extra=(whole_weights_are_sent,), left_out=_WITHOUT_SCORES)
TEACHER_GENERATES = CommandChecks(extra=(whole_weights_are_sent, one_teacher_generates), left_out=_WITHOUT_SCORES)
# Only the student is built.
EXPORTS = CommandChecks(
    extra=(*layout.LAYOUT, model.student_is_readable, *map(_without_teacher, model.FIT_THE_STUDENT)), has_own=True
)
