"""ms-swift: `megatron rlhf` and `swift rlhf` with `--rlhf_type gkd`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from megatron_gkd.config.schema import LoraSection
from megatron_gkd.migration.draft import Draft
from megatron_gkd.migration.lengths import join_lengths
from megatron_gkd.migration.settings import numbers_of, translate, value_of

_PLUGIN = (
    "plugins of ms-swift use its classes; write a row preprocessor (docs/extending.md) that does the same, and name "
    "its file in data.external_plugins and itself in data.preprocessor"
)
_DEFAULTS = {"lmbda": 0.5, "beta": 0.5, "temperature": 0.9, "max_completion_length": 512, "seed": 42}
_MEGATRON = _DEFAULTS | {"global_batch_size": 16, "recompute_granularity": "selective"}
_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_OF_ADAPTERS = (*LoraSection.model_fields,)
_OF_SELF_TEACHER = "the student is its own teacher, with its current weights; rows need a teacher_prompt"


def read_swift(given: dict[str, Any], draft: Draft, *, is_megatron: bool, environment: Mapping[str, str]) -> None:
    """Write the settings of ms-swift to the draft.

    Args:
        given: settings by name.
        draft: the recipe, with the number of processes.
        is_megatron: whether the command is `megatron rlhf` rather than `swift rlhf`.
        environment: variables of the command.
    """
    given = dict(given)
    if "external_plugins" in given:
        draft.skip("--external_plugins", value_of(given, "external_plugins"), _PLUGIN)
        del given["external_plugins"]
    if not is_megatron:
        _count_batch(given, draft)
    translate(given, draft)
    leaves = draft.leaves
    defaults = _MEGATRON
    if not is_megatron:
        defaults = _DEFAULTS | {"tuner_type": "lora"}
        defaults |= {} if "train_iters" in leaves else {"num_train_epochs": 3}
        defaults |= {} if "recompute_granularity" in leaves else _FULL
    if is_megatron and "engine" not in leaves and "lmbda" not in leaves:
        defaults = defaults | {"lmbda": 0.0}
    draft.fill(defaults)
    draft.fill({"use_hf": environment.get("USE_HF", "").lower() in ("1", "true")})
    for name in ("MAX_PIXELS", "MIN_PIXELS"):
        if environment.get(name, "").isdecimal():
            draft.fill({name.lower(): int(environment[name])})
    draft.fill({"output_dir": _output_dir(leaves, is_megatron=is_megatron)})
    _settle_teacher(draft)
    _settle_tuner(draft)
    _settle_packing(draft)
    draft.drop_validation_without_rows()
    join_lengths(draft)


def _output_dir(leaves: dict[str, Any], *, is_megatron: bool) -> str:
    """Return ms-swift's own choice of the folder."""
    model = PurePosixPath(str(leaves.get("model", "model"))).name
    return f"{'megatron_output' if is_megatron else 'output'}/{model}"


def _count_batch(given: dict[str, Any], draft: Draft) -> None:
    """Replace the number of accumulated batches by that of rows in a step."""
    (rows,) = numbers_of(given, "per_device_train_batch_size")
    if "gradient_accumulation_steps" in given:
        (accumulated,) = numbers_of(given, "gradient_accumulation_steps")
        del given["gradient_accumulation_steps"]
    else:
        accumulated = -(-16 // (rows * draft.processes))
    draft.leaves["global_batch_size"] = rows * accumulated * draft.processes


def _settle_teacher(draft: Draft) -> None:
    """Name the teacher's kind where ms-swift derives it: the student itself, as it is or as it was."""
    leaves = draft.leaves
    teacher = leaves.get("teacher_model")
    if teacher is None and not leaves.get("teacher_model_server"):
        leaves["teacher_kind"] = "self"
        draft.notes.append(f"teacher.teacher_kind = self: {_OF_SELF_TEACHER}")
    elif teacher is not None and teacher == leaves.get("model") and leaves.get("tuner_type") == "lora":
        leaves["teacher_kind"] = "self"
        draft.notes.append("teacher.teacher_kind = self: the student's initial weights, without the adapters")


def _settle_tuner(draft: Draft) -> None:
    if draft.leaves.get("tuner_type") != "lora":
        for leaf in _OF_ADAPTERS:
            draft.drop(leaf, "only with tuner_type lora; all parameters are trained")


def _settle_packing(draft: Draft) -> None:
    """Make packed microbatches single ones, whose rows are counted as others are."""
    leaves = draft.leaves
    if not leaves.get("packing"):
        return
    if leaves.get("micro_batch_size", 1) != 1:
        draft.notes.append("train.micro_batch_size = 1: with packing, data.max_length says how much a microbatch holds")
        leaves["micro_batch_size"] = 1
    draft.notes.append("train.global_batch_size: counts rows here, and packed sequences in ms-swift")
