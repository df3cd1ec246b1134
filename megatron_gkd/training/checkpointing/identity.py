"""The identity of a run: the settings and data that must be equal for it to be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_gkd.checkpoint_format.fingerprint import weights_fingerprint
from megatron_gkd.config.renamed import current_key
from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.cache import hash_tokenizer
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.runtime.agreement import run_on_main

_MAY_CHANGE_SECTIONS = ("output", "parallel")
_MAY_CHANGE = frozenset(
    {
        "data.dataset",  # its rows are compared instead, wherever they are
        "data.val_dataset",
        "data.dataset_cache_dir",
        "data.dataloader_num_workers",
        "data.preprocessing_num_workers",
        "data.external_plugins",
        "rollout.vllm_server_urls",
        "rollout.vllm_server_concurrency",
        "rollout.vllm_server_timeout_s",
        "rollout.vllm_server_max_downtime_s",
        "rollout.weight_sync",
        "rollout.weight_sync_dir",
        "rollout.mismatch_kl_threshold",
        "rollout.vllm_gpu_memory_utilization",
        "rollout.vllm_kv_cache_gib",
        "rollout.vllm_tensor_parallel_size",
        "rollout.sleep_level",
        "rollout.enforce_eager",
        "lora.merge_lora",
        "train.attention_backend",
        "train.vit_gradient_checkpointing",
        "train.eval_interval",
        "train.eval_iters",
        "train.max_bad_steps",
        "train.num_train_epochs",  # train_iters is compared instead, once it is known
        "train.train_iters",
        "train.resume",
        "train.init_from",
        "train.max_runtime",
    }
)
_MAY_CHANGE_OF_TEACHERS = (
    "teacher_model_server",
    "teacher_server_concurrency",
    "teacher_server_timeout_s",
    "teacher_server_max_downtime_s",
    "offload_teacher_model",
)
_MUST_STAY = frozenset({"parallel.distributed_optimizer"})  # the two kinds of state are not interchangeable


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe that decide what a run computes, with their values as JSON has them."""
    found = {
        key: value
        for section, values in recipe.model_dump(mode="json").items()
        for key, value in _flatten(section, values)
        if key in _MUST_STAY or not _may_change(section, key)
    }
    found.pop("lora", None)  # null as a whole
    return found | {"train.tuner_type": "full" if recipe.lora is None else "lora"}


def data_identity(dataset: TokenizedDataset, tokenizer: PreTrainedTokenizerBase, train_iters: int) -> dict[str, Any]:
    """Return what the recipe's keys do not determine: rows, tokenizer with its template, and number of steps."""
    rows = hashlib.blake2b(digest_size=16)
    for column in (dataset.lengths, dataset.num_labels, dataset.teacher_lengths):
        rows.update(column.tobytes())
    for index in range(0, len(dataset), max(1, len(dataset) // 1000)):
        sample = dataset[index]
        rows.update(sample.input_ids.tobytes())
        rows.update("".join(image.digest for image in sample.images).encode())
    return {
        "data.dataset (its rows)": rows.hexdigest(),
        "student.model (its tokenizer)": hash_tokenizer(tokenizer),
        "train.train_iters": train_iters,
    }


def base_identity(path: Path) -> dict[str, Any]:
    """Return the fingerprint of the base weights, which a checkpoint of adapters does not contain.

    All ranks of the world must call it; rank 0 reads the files in `path`.
    """
    return {"student.model (its weights)": run_on_main(lambda: weights_fingerprint(path))}


def differences(found: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> list[str]:
    """Compare a run with the saved one, over the keys that both have. Return a line for each difference.

    The number of steps may change where the learning rate does not depend on it.
    """
    saved = {current_key(key): value for key, value in saved.items()}  # of an older release
    constant = found.get("train.lr_decay_style", saved.get("train.lr_decay_style")) == "constant"
    lines = []
    for key in found.keys() & saved.keys():
        if found[key] == saved[key] or (key == "train.train_iters" and constant):
            continue
        hint = "; with lr_decay_style = constant it may be longer" if key == "train.train_iters" else ""
        lines.append(f"{key} = {found[key]}: the checkpoint {where} was trained with {saved[key]}{hint}")
    return sorted(lines)


def _may_change(section: str, key: str) -> bool:
    return (
        section in _MAY_CHANGE_SECTIONS
        or key in _MAY_CHANGE
        or (section == "teacher" and key.rpartition(".")[2] in _MAY_CHANGE_OF_TEACHERS)
    )


def _flatten(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and not prefix.endswith("_kwargs"):
        return [pair for name, inner in value.items() for pair in _flatten(f"{prefix}.{name}", inner)]
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        pairs = [_flatten(f"{prefix}[{index}]", entry) for index, entry in enumerate(value)]
        return [pair for part in pairs for pair in part] if prefix == "teacher.teachers" else [(prefix, value)]
    return [(prefix, value)]
