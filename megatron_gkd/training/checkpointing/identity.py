"""The identity of a run: the settings and data that must be equal for it to be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_gkd.checkpoint_format.fingerprint import weights_fingerprint
from megatron_gkd.config.renamed import current_key, current_value
from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.cache import hash_tokenizer
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.runtime.agreement import run_on_main

_MAY_CHANGE_SECTIONS = ("output", "parallel", "cluster")
_MAY_CHANGE = frozenset(
    {
        "student.model_revision",  # the commit is compared instead
        "data.dataset",  # its rows are compared instead, wherever they are
        "data.val_dataset",
        "data.dataset_cache_dir",
        "data.dataloader_num_workers",
        "data.preprocessing_num_workers",
        "data.external_plugins",
        "rollout.max_batch_tokens",
        "rollout.vllm_server_urls",
        "rollout.vllm_server_api_key_env",
        "rollout.vllm_server_concurrency",
        "rollout.vllm_server_timeout_s",
        "rollout.vllm_server_max_downtime_s",
        "rollout.weight_sync",
        "rollout.weight_sync_dir",
        "rollout.mismatch_kl_threshold",
        "rollout.vllm_gpu_memory_utilization",
        "rollout.vllm_kv_cache_gib",
        "rollout.vllm_tensor_parallel_size",
        "rollout.vllm_max_num_seqs",
        "rollout.vllm_enable_prefix_caching",
        "rollout.vllm_enable_expert_parallel",
        "rollout.vllm_limit_mm_per_prompt",
        "rollout.sleep_level",
        "rollout.enforce_eager",
        "megatron.gradient_accumulation_fusion",
        "megatron.masked_softmax_fusion",
        "megatron.bias_swiglu_fusion",
        "megatron.apply_rope_fusion",
        "megatron.moe_permute_fusion",
        "megatron.moe_token_dispatcher_type",
        "megatron.moe_grouped_gemm",
        "megatron.moe_shared_expert_overlap",
        "memory.offload_model",
        "memory.offload_optimizer",
        "memory.optimizer_cpu_offload",
        "memory.optimizer_offload_fraction",
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
    "teacher_model_revision",  # the commit is compared instead
    "teacher_model_server",
    "teacher_server_api_key_env",
    "check_tokenizers",
    "teacher_server_concurrency",
    "teacher_server_timeout_s",
    "teacher_server_max_downtime_s",
    "offload_teacher_model",
    "teacher_decoder_first_pipeline_num_layers",
    "teacher_decoder_last_pipeline_num_layers",
    "teacher_pipeline_model_parallel_layout",
    "teacher_states",
    "teacher_micro_batch_tokens",
)
_MUST_STAY = frozenset({"parallel.distributed_optimizer"})  # the two kinds of state are not interchangeable
_LONGER = "; with lr_decay_style = constant and no lr_warmup_fraction it may be longer"


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe that decide what a run computes, with their values as JSON has them."""
    found = {
        key: value
        for section, values in recipe.model_dump(mode="json").items()
        for key, value in _flatten(section, values)
        if key in _MUST_STAY or not _may_change(section, key)
    }
    found.pop("lora", None)  # null as a whole
    if not recipe.teacher.teachers and not recipe.teacher.is_named:
        found["teacher.teacher_kind"] = "self"
    tuner = {"train.tuner_type": "full" if recipe.lora is None else "lora"}
    if recipe.distill.lmbda == 0:  # these have no effect, and their defaults may be others in another release
        return {key: value for key, value in found.items() if not key.startswith("rollout.")} | tuner
    found.pop("rollout.generation_batch_size")  # the same as steps_per_generation
    effective = {
        "rollout.max_completion_length": recipe.max_completion_length,
        "rollout.rollout_temperature": recipe.rollout_temperature,
        "rollout.steps_per_generation": recipe.steps_per_generation,
        "data.max_prompt_length": recipe.max_prompt_length,
    }
    return found | effective | tuner


def rows_identity(dataset: TokenizedDataset, weights: Sequence[float]) -> dict[str, Any]:
    """Return the part of the identity that is about tokenized training rows. `weights`: of its sources."""
    rows = hashlib.blake2b(digest_size=16)
    for column in (dataset.lengths, dataset.num_labels, dataset.teacher_lengths):
        rows.update(column.tobytes())
    for index in range(0, len(dataset), max(1, len(dataset) // 1000)):
        sample = dataset[index]
        rows.update(sample.input_ids.tobytes())
        rows.update("".join(image.digest for image in sample.images).encode())
    return {
        "data.dataset (its rows)": rows.hexdigest(),
        "data.dataset (rows, weight and hash of each file)": [
            list(source) for source in zip(dataset.sizes, weights, dataset.digests, strict=True)
        ],
    }


def streams_identity(
    identities: Sequence[str], preparation: Mapping[str, Any], weights: Sequence[float], system: str | None
) -> dict[str, Any]:
    """Return the part of the identity that is about streamed sources.

    Args:
        identities: of the sources, see ``StreamSource``.
        preparation: what becomes of their rows, see ``Streams.preparation``.
        weights: of the sources.
        system: the text of `data.system`, which may be a file.
    """
    return {
        "data.system (its text)": system,
        **preparation,
        "data.dataset (content and weight of each source)": [
            list(source) for source in zip(identities, weights, strict=True)
        ],
    }


def schedule_identity(tokenizer: PreTrainedTokenizerBase, train_iters: int) -> dict[str, Any]:
    """Return the part of the identity that neither the recipe's keys nor the rows determine.

    Args:
        tokenizer: the student's; its chat template counts too.
        train_iters: number of steps.
    """
    return {
        "student.model (its tokenizer)": hash_tokenizer(tokenizer),
        "train.train_iters": train_iters,
    }


def base_identity(path: Path) -> dict[str, Any]:
    """Return the fingerprint of the base weights, which a checkpoint of adapters does not contain.

    All ranks of the world must call it; rank 0 reads the files in `path`.
    """
    return {"student.model (its weights)": run_on_main(lambda: weights_fingerprint(path))}


def revisions_identity(student: Checkpoint, teachers: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Return the revisions of the models that were downloaded, by their keys in the recipe.

    Args:
        student: the student.
        teachers: the local teachers by their keys.
    """
    models = {"student.model": student} | {f"{place}.teacher_model": one for place, one in teachers.items()}
    return {f"{key} (its revision)": one.revision for key, one in models.items() if one.revision is not None}


def differences(found: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> list[str]:
    """Compare a run with the saved one, over the keys that both have. Return a line for each difference.

    The number of steps may change where the learning rate does not depend on it: neither its decay nor its warm-up.
    """
    saved = {current_key(key): current_value(key, value) for key, value in saved.items()}  # of an older release
    constant = found.get("train.lr_decay_style", saved.get("train.lr_decay_style")) == "constant"
    constant = constant and not found.get("train.lr_warmup_fraction")
    lines = []
    for key in found.keys() & saved.keys():
        if found[key] == saved[key] or (key == "train.train_iters" and constant):
            continue
        hint = _LONGER if key == "train.train_iters" else ""
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
