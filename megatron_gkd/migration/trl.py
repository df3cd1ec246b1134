"""TRL: scripts with `GKDConfig`, `ModelConfig` and `ScriptArguments`, on the command line or in a YAML file."""

from __future__ import annotations

from typing import Any

from megatron_gkd.migration.draft import Draft
from megatron_gkd.migration.lengths import join_lengths
from megatron_gkd.migration.settings import numbers_of, translate, value_of

_DEFAULTS: dict[str, Any] = {
    "lmbda": 0.5,
    "beta": 0.5,
    "temperature": 0.9,
    "max_completion_length": 128,
    "max_length": 1024,
    "truncation_strategy": "right",
    "lr": 2e-5,
    "lr_decay_style": "linear",
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "seed": 42,
    "output_dir": "trainer_output",
}
_RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_FUSED = ("use_liger_kernel", "use_fused_linear_loss")
_ADAPTERS = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05}


def read_trl(given: dict[str, Any], draft: Draft, prefix: str = "--") -> None:
    """Write the settings of a script or YAML file of TRL to the draft.

    Args:
        given: settings by name.
        draft: the recipe, with the number of processes.
        prefix: what stands before names in the source.
    """
    given = {name: value for name, value in given.items() if value is not None}
    rows = numbers_of(given, "per_device_train_batch_size")[0] if "per_device_train_batch_size" in given else 8
    (accumulated,) = numbers_of(given, "gradient_accumulation_steps")
    given.pop("gradient_accumulation_steps", None)
    draft.leaves |= {"micro_batch_size": rows, "global_batch_size": rows * accumulated * draft.processes}
    given.pop("per_device_train_batch_size", None)
    _name_data(given, draft)
    uses_adapters = value_of(given, "use_peft", False) is True
    if not uses_adapters:
        for name in [name for name in given if name.startswith("lora_")]:
            draft.skip(prefix + name, value_of(given, name), "only with use_peft; all parameters are trained")
            del given[name]
    translate(given, draft, prefix)
    if "recompute_granularity" not in draft.leaves:
        draft.fill(_RECOMPUTED)
    if uses_adapters:
        draft.fill(_ADAPTERS)
        if "target_modules" not in draft.leaves:
            draft.notes.append(
                "lora.target_modules = all-linear: PEFT chooses by the model, most often q_proj and v_proj"
            )
    if not {"train_iters", "num_train_epochs"} & draft.leaves.keys():
        draft.leaves["num_train_epochs"] = 3
    elif draft.leaves.get("train_iters") is not None:
        draft.leaves.pop("num_train_epochs", None)  # max_steps wins there
    draft.fill(_DEFAULTS)
    _settle_temperature(draft, is_fused=any(value_of(given, name) is True for name in _FUSED))
    if not draft.leaves.get("teacher_model"):
        draft.fill({"teacher_kind": "self"})
        draft.notes.append("teacher.teacher_kind = self: no teacher is named; rows need a teacher_prompt")
    if draft.leaves.get("packing") and draft.leaves["micro_batch_size"] != 1:
        draft.leaves["micro_batch_size"] = 1
        draft.notes.append("train.micro_batch_size = 1: with packing, data.max_length says how much a microbatch holds")
    draft.drop_validation_without_rows()
    join_lengths(draft)


def _settle_temperature(draft: Draft, *, is_fused: bool) -> None:
    """Sample at the temperature, and compute the loss at 1, as TRL does without its fused loss."""
    sampled = draft.leaves["temperature"]
    if is_fused or sampled == 1.0:
        return
    draft.leaves |= {"temperature": 1.0, "rollout_temperature": sampled}
    draft.notes.append(f"rollout.rollout_temperature = {sampled}: TRL's loss is at temperature 1 (distill.temperature)")


def _name_data(given: dict[str, Any], draft: Draft) -> None:
    """Join the names of data set, subset and split: `id:subset:split`."""
    names = {name: value_of(given, name) for name in ("dataset_config", "dataset_train_split", "dataset_test_split")}
    for name in names:
        given.pop(name, None)
    strategy = value_of(given, "eval_strategy", value_of(given, "evaluation_strategy", "no"))
    if strategy == "no":
        given.pop("eval_strategy", None)
    dataset = value_of(given, "dataset_name")
    if not isinstance(dataset, str):
        return
    given.pop("dataset_name")
    draft.leaves["dataset"] = [_joined(dataset, names["dataset_config"], names["dataset_train_split"] or "train")]
    if strategy != "no":
        draft.leaves["val_dataset"] = [_joined(dataset, names["dataset_config"], names["dataset_test_split"] or "test")]


def _joined(dataset: str, subset: str | None, split: str) -> str:
    if subset is None and split == "train":
        return dataset
    return f"{dataset}:{subset or ''}:{split}"
