"""The options of the commands beside train, and their checks of a recipe."""

import json
from collections.abc import Iterator
from dataclasses import replace

from megatron_gkd.config.byte_sizes import FORMS, parse_bytes
from megatron_gkd.config.checks import (
    CHECKS,
    Check,
    CommandChecks,
    api_keys,
    attention,
    cache,
    data,
    hubs,
    layout,
    lengths,
    memory,
    model,
    output,
    teacher,
)
from megatron_gkd.config.checks import rollout as rollout_checks
from megatron_gkd.config.checks.registry import command_check
from megatron_gkd.config.options import Option, at_least_one, not_negative, positive, share
from megatron_gkd.config.schema import OneTeacher, ParallelSection, Recipe, TeacherSection


def _teacher_or_student(text: str) -> str:
    if text not in ("teacher", "student"):
        raise ValueError
    return text


def _split(text: str) -> str:
    if text not in ("train", "validation"):
        raise ValueError
    return text


def _jsonl(text: str) -> str:
    if not text.endswith(".jsonl"):
        raise ValueError
    return text


def _tool(text: str) -> str:
    if text not in ("swift", "trl", "nemo"):
        raise ValueError
    return text


SCORE = {
    "output": Option("a folder", "the cache; an interrupted run of the same command is continued", required=True),
    "shard_rows": Option("an integer >= 1", "most rows of a file, and of what a killed run loses", 1024, positive),
}
GENERATE = {
    "from": Option("teacher or student", "the model that generates", read=_teacher_or_student, required=True),
    "output": Option(
        "a .jsonl file", "an interrupted run of the same command is continued", required=True, read=_jsonl
    ),
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
DOCTOR = {
    "nproc": Option("an integer >= 1", "processes of the run on this machine", 1, positive),
    "json": Option("", "print the findings as JSON", False, is_flag=True),
}
MIGRATE = {
    "from": Option("swift, trl or nemo", "the tool; where it is left out, it is found out", read=_tool),
    "output": Option("a file that does not exist", "the recipe", "recipe.yaml"),
}
CHECK = {"nproc": Option("an integer >= 1", "processes that the layout must fit", 1, positive)}


DATA = {
    "show": Option("an integer >= 0", "rows that are printed as the model reads them", 3, not_negative),
    "split": Option("train or validation", "rows of data.dataset, or of data.val_dataset", "train", _split),
    "json": Option("", "print all as JSON", False, is_flag=True),
}
PLAN = {
    "gpus": Option("an integer >= 1", "GPUs, one process each", required=True, read=positive),
    "gpu-memory": Option(f"memory ({FORMS})", "of one GPU; that of --device where it is left out", read=parse_bytes),
    "nodes-of": Option("an integer >= 1", "GPUs of a node, between which the links of --device are fast", 8, positive),
    "device": Option("a name or a .yaml file", "the GPU: its speed and that of its links (docs/planning.md)", "h100"),
    "suggest": Option(
        "an integer >= 1, or nothing", "print so many of the fastest layouts that fit; alone: 5", read=positive, bare=5
    ),
    "measure-at-most": Option("an integer >= 1", "--suggest: most layouts that are measured", 30, positive),
    "reserve": Option(
        f"memory ({FORMS})",
        "of each GPU for what is not measured: CUDA's context, buffers of NCCL, fragmentation",
        "6GiB",
        parse_bytes,
    ),
    "mfu": Option("a number in (0, 1]", "share of the GPU's peak FLOP/s that matrix products reach", 0.5, share),
    "bandwidth-efficiency": Option("a number in (0, 1]", "share of each bandwidth that is reached", 0.75, share),
    "expert-imbalance": Option(
        "a number >= 1", "tokens of the busiest expert-parallel rank over the mean", 1.5, at_least_one
    ),
    "label-fraction": Option("a number in (0, 1]", "share of the tokens that are trained on", 1.0, share),
    "json": Option("", "print the plan as JSON", False, is_flag=True),
}


def one_process() -> list[str]:
    """Return overrides that set a recipe's layout to the defaults, whatever it was trained under."""
    defaults = [f"--{name}={json.dumps(field.default)}" for name, field in ParallelSection.model_fields.items()]
    return [*defaults, "--attention_backend=auto"]  # another may need a device that is not there


@command_check(*teacher.SOURCE)
def scored_teachers_are_fixed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a teacher that changes during training, or that is no model."""
    for place, one in recipe.teacher.all.items():
        if not one.is_named:
            yield teacher.describe_unnamed(place)
        elif not _is_fixed(one):
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
    elif not recipe.teacher.is_named:
        yield teacher.describe_unnamed("teacher")
    elif recipe.teacher.source not in ("local", "server"):
        yield f"teacher.teacher_kind = {recipe.teacher.source}: must be local or server to generate --from teacher"


@command_check("weight_sync")
def whole_weights_are_sent(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a transfer of adapters, which `generate` merges first."""
    if recipe.rollout.weight_sync == "lora":
        yield "rollout.weight_sync = lora: must be folder, nccl or gloo to generate, which merges adapters first"


@command_check("truncation_strategy")
def prompts_are_whole(recipe: Recipe, _: int) -> Iterator[str]:
    """Find rows that are split, whose pieces have no prompts."""
    if recipe.data.truncation_strategy == "split":
        yield "data.truncation_strategy = split: must be delete, left or right to generate responses to prompts"


def _without_teacher(check: Check) -> Check:
    """Return a check of the recipe's student alone."""

    def find(recipe: Recipe, world_size: int) -> Iterator[str]:
        alone = recipe.model_copy(update={"teacher": TeacherSection(teacher_kind="none")})
        return check.find(alone, world_size)

    return replace(check, find=find)


# Only training reads a cache, which need not exist yet for these commands, writes exports and gives memory to vLLM.
_TRAINING_ALONE = (
    *cache.NEED_A_CACHE,
    output.sources_are_kept,
    memory.student_leaves_for_rollouts,
    lengths.prompts_are_completed,
)
# A command needs the API keys of the servers that it contacts.
SCORES = CommandChecks(
    extra=(scored_teachers_are_fixed, scores_have_a_size), left_out=(*_TRAINING_ALONE, api_keys.rollout_api_key_is_set)
)
# Nothing is scored: no log-probabilities of a teacher server are needed.
_WITHOUT_SCORES = (*_TRAINING_ALONE, teacher.servers_give_enough)
STUDENT_GENERATES = CommandChecks(
    extra=(whole_weights_are_sent, prompts_are_whole, api_keys.generating_api_key_is_set),
    left_out=(*_WITHOUT_SCORES, api_keys.rollout_api_key_is_set, api_keys.teacher_api_keys_are_set),
)
TEACHER_GENERATES = CommandChecks(
    extra=(whole_weights_are_sent, prompts_are_whole, one_teacher_generates),
    left_out=(*_WITHOUT_SCORES, api_keys.rollout_api_key_is_set),
)
# Only the student is built.
EXPORTS = CommandChecks(
    extra=(*layout.LAYOUT, model.student_is_readable, *map(_without_teacher, model.FIT_THE_STUDENT)), has_own=True
)
# Only the rows and the student's tokenizer are read.
DATA_CHECKS = CommandChecks(
    extra=(*(one for one in CHECKS if one.find.__module__ == data.__name__), model.student_is_readable), has_own=True
)
# Nothing is read but the models' config.json, and nothing is written or computed.
PLANS = CommandChecks(
    left_out=(
        cache.caches_are_readable,
        cache.caches_have_enough_tokens,
        cache.caches_are_of_the_temperature,
        output.sources_are_kept,
        output.output_is_writable,
        data.dataset_exists,
        data.val_dataset_exists,
        data.plugins_exist,
        attention.transformer_engine_is_installed,
        rollout_checks.vllm_is_installed,
        rollout_checks.engine_arguments_exist,
        api_keys.teacher_api_keys_are_set,
        api_keys.rollout_api_key_is_set,
        model.teacher_adapters_fit,
        hubs.hub_is_installed,
    )
)
