"""The commands beside train: their own options on the command line, and what they ask of a recipe."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gkd.config import cache_checks, checks, model_checks, output_checks, teacher_checks
from megatron_gkd.config.checks import Check, CommandChecks
from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.schema import OneTeacher, ParallelSection, Recipe, TeacherSection


@dataclass(frozen=True)
class Option:
    """`--name value`: `read` makes the value of the text, or raises ValueError; `allowed` says what it takes.

    A flag is `--name` alone, and true where it is given.
    """

    allowed: str
    meaning: str
    default: Any = None
    read: Callable[[str], Any] = str
    required: bool = False
    is_flag: bool = False


def positive(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


def _source(text: str) -> str:
    if text not in ("teacher", "student"):
        raise ValueError
    return text


SCORE = {
    "output": Option("a folder", "the cache; a run that was interrupted goes on where it was", required=True),
    "shard_rows": Option("an integer >= 1", "most rows of a file; a run that is killed loses no more", 1024, positive),
}
GENERATE = {
    "from": Option("teacher or student", "whose answers", read=_source, required=True),
    "output": Option("a .jsonl file", "a run that was interrupted goes on where it was", required=True),
    "n": Option("an integer >= 1", "answers to each prompt; under torchrun write -n", 1, positive),
    "chunk_rows": Option(
        "an integer >= 1", "prompts that are answered together; a run that is killed loses no more", 256, positive
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


def take_options(arguments: Sequence[str], options: Mapping[str, Option]) -> tuple[dict[str, Any], list[str]]:
    """The values of a command's own `options`, and the other arguments.

    Raises RecipeError with all that is wrong with them.
    """
    found: dict[str, Any] = {}
    rest, problems = [], []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, text = argument.partition("=")
        name = flag.removeprefix("-" if len(flag) == 2 else "--")  # -n as well: torchrun takes --n for its own
        if name not in options:
            name = name.replace("_", "-")  # as torchrun, which takes --max_restarts for --max-restarts
        if not flag.startswith("-") or name not in options:
            rest.append(argument)
            continue
        if options[name].is_flag and not equals:
            found[name] = True
            continue
        text = text if equals else next(remaining, "")
        try:
            if options[name].is_flag:
                raise ValueError
            found[name] = options[name].read(text)
            if text == "" or text.startswith("--"):
                raise ValueError
        except ValueError:
            allowed = f"must be {options[name].allowed}" if options[name].allowed else "takes no value"
            problems.append(f"--{name} = {text}: {allowed}")
            found[name] = None
    problems += [
        f"--{name}: missing; must be {option.allowed} ({option.meaning})"
        for name, option in options.items()
        if option.required and name not in found
    ]
    if problems:
        raise RecipeError(problems)
    return {name: found.get(name, option.default) for name, option in options.items()}, rest


def help_of(options: Mapping[str, Option]) -> str:
    """Two lines for each option, as those of the recipe's keys."""
    lines = []
    for name, option in options.items():
        default = "optional" if option.default is None else f"default: {option.default}"
        default = "required" if option.required else "flag" if option.is_flag else default
        lines += [f"  --{name}  {option.allowed}  [{default}]", f"        {option.meaning}"]
    return "\n".join(lines)


def one_process() -> list[str]:
    """Return overrides that take a recipe's layout back to the defaults, whatever it was trained under."""
    layout = [f"--{name}={json.dumps(field.default)}" for name, field in ParallelSection.model_fields.items()]
    return [*layout, "--attention_backend=auto"]  # another may need a device that is not there


def _is_fixed(teacher: OneTeacher) -> bool:
    return teacher.source in ("local", "server") or (teacher.source == "self" and teacher.teacher_model is not None)


def _score_has_teachers(recipe: Recipe, _: int) -> Iterator[str]:
    for place, teacher in recipe.teacher.all.items():
        if teacher.source is not None and not _is_fixed(teacher):
            yield f"{place}.teacher_kind = {teacher.source}: must be a teacher that stays as it is: local or server"


def _score_has_k(recipe: Recipe, _: int) -> Iterator[str]:
    if recipe.distill.gkd_logits_topk is None:
        yield "distill.gkd_logits_topk = null: must be set to score: how many tokens of each distribution are kept"


def _student_fits(recipe: Recipe, world_size: int) -> Iterator[str]:
    alone = recipe.model_copy(update={"teacher": TeacherSection(teacher_kind="none")})
    yield from model_checks.models_fit(alone, world_size)


def _generate_has_a_teacher(recipe: Recipe, _: int) -> Iterator[str]:
    if recipe.teacher.teachers:
        yield "teacher.teachers: generate --from teacher asks one teacher; name it as teacher_model"
    elif recipe.teacher.source not in (None, "local", "server"):
        yield f"teacher.teacher_kind = {recipe.teacher.source}: must be local or server to generate --from teacher"


def _generate_sends_whole_weights(recipe: Recipe, _: int) -> Iterator[str]:
    if recipe.rollout.weight_sync == "lora":
        yield "rollout.weight_sync = lora: must be folder, nccl or gloo to generate, which merges adapters first"


# Training alone reads a cache, which need not be there yet for these commands, and writes exports.
_TRAINING_ALONE = (cache_checks.caches_fit, cache_checks.caches_suit_on_policy, output_checks.sources_are_kept)
SCORES = CommandChecks(
    extra=(Check(teacher_checks.LEAVES, _score_has_teachers), Check(("gkd_logits_topk",), _score_has_k)),
    left_out=_TRAINING_ALONE,
)
# Nothing is scored: no log-probabilities of a teacher's server are needed.
_WITHOUT_SCORES = (*_TRAINING_ALONE, teacher_checks.servers_tell_enough)
_WHOLE_WEIGHTS = Check(("weight_sync",), _generate_sends_whole_weights)
STUDENT_GENERATES = CommandChecks(extra=(_WHOLE_WEIGHTS,), left_out=_WITHOUT_SCORES)
TEACHER_GENERATES = CommandChecks(
    extra=(_WHOLE_WEIGHTS, Check(teacher_checks.LEAVES, _generate_has_a_teacher)), left_out=_WITHOUT_SCORES
)
# Only the student is built.
EXPORTS = CommandChecks(
    extra=(
        *checks.LAYOUT_CHECKS,
        Check(("model",), model_checks.student_is_readable, needs_files=True),
        Check(("model", *ParallelSection.model_fields), _student_fits, needs_files=True),
    ),
    has_own=True,
)
