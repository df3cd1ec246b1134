"""The parts of a run that a recipe and a mesh determine: the student, and what samples from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_gkd.checkpoint_format.adapter_files import adapter_config, factor_shapes
from megatron_gkd.config.lora_rules import layer_rules
from megatron_gkd.config.schema import LoraSection, Recipe, RolloutSection
from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.loader import SampleDataset, StepOrder
from megatron_gkd.data.prompt import PromptLimits
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.lora.options import LoraOptions
from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
from megatron_gkd.reporting.phases import phase
from megatron_gkd.rollout.base import RolloutEngine, Sampling
from megatron_gkd.rollout.megatron.engine import MegatronEngine
from megatron_gkd.rollout.vllm.colocated import VllmColocatedEngine
from megatron_gkd.rollout.vllm.logit_bias import logit_bias
from megatron_gkd.rollout.vllm.process import ColocatedOptions
from megatron_gkd.rollout.vllm.server import ServedAdapters, ServerOptions, VllmServerEngine
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.training.load_model import load_model
from megatron_gkd.training.loss import Objective
from megatron_gkd.training.on_policy import OnSample, RolloutOptions, Rollouts
from megatron_gkd.training.step_prompts import StepPrompts
from megatron_gkd.training.student import Student

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_student(recipe: Recipe, mesh: Mesh, checkpoint: Checkpoint, vocab_size: int, train_iters: int) -> Student:
    """The model with its optimizer and its loss, over the ids below `vocab_size`."""
    parallel, distill, section = recipe.parallel, recipe.distill, recipe.train
    model = load_model(
        f"the student {recipe.student.model}",
        checkpoint,
        mesh,
        BuildOptions(
            dtype=DTYPES[section.dtype],
            attn=section.attention_backend,
            virtual_pipeline=parallel.virtual_pipeline_model_parallel_size,
            recompute_granularity=parallel.recompute_granularity,
            recompute_method=parallel.recompute_method,
            recompute_num_layers=parallel.recompute_num_layers,
            moe_aux_loss_coeff=section.moe_aux_loss_coeff,
            lora=None if recipe.lora is None else lora_options(recipe.lora, section.seed),
        ),
    )
    objective = Objective(
        mesh,
        vocab_size,
        divergence=distill.divergence,
        beta=distill.beta,
        temperature=distill.temperature,
        sft_alpha=distill.sft_alpha,
        k=distill.gkd_logits_topk,
        tail_mode=distill.gkd_topk_tail,
        chunk_tokens=distill.loss_chunk_tokens,
        upstream=1.0,  # there is no loss scaling in bf16 and fp32
    )
    return Student(model, objective, parallel, section, train_iters)


def lora_options(section: LoraSection, seed: int) -> LoraOptions:
    """Return how the student's adapters are made. `seed`: of the run."""
    return LoraOptions(
        rules=layer_rules(section),
        dropout=section.lora_dropout,
        initialization=section.init_lora_weights,
        dtype=None if section.lora_dtype is None else DTYPES[section.lora_dtype],
        seed=seed,
        adapters=None if section.adapters is None else Path(section.adapters),
    )


def build_rollouts(
    recipe: Recipe,
    mesh: Mesh,
    student: Student,
    checkpoint: Checkpoint,
    lambda_schedule: LambdaSchedule,
    dataset: SampleDataset,
    order: StepOrder,
    config: BatchConfig,
    train_iters: int,
    on_sample: OnSample | None = None,
) -> Rollouts:
    """What samples the steps that `lambda_schedule` gives to the student."""
    section = recipe.rollout
    sampling = sampling_of(section, student.objective.vocab_size)
    if section.engine != "megatron":
        logit_bias(sampling, checkpoint.vocab_size)  # what vLLM can't exclude ends the run before the engine starts
    options = RolloutOptions(
        sampling,
        truncated=section.truncated_completions,
        steps_ahead=section.steps_ahead,
        num_steps=train_iters,
        tensors=rollout_tensors(recipe),
    )
    prompts = StepPrompts(dataset, order, lambda_schedule, config, recipe.data.teacher_max_length)
    return Rollouts(build_engine(recipe, mesh, student.model, checkpoint), prompts, options, mesh.dp, on_sample)


def rollout_tensors(recipe: Recipe) -> Callable[[MegatronModel], Iterable[tuple[str, Tensor]]]:
    """Return what the rollout engine is given of the student: its adapters, or its weights with adapters merged."""
    if recipe.rollout.weight_sync == "lora":
        return MegatronModel.adapter_tensors
    return partial(MegatronModel.named_tensors, merged_dtype=rollout_dtype(recipe))


def rollout_dtype(recipe: Recipe) -> torch.dtype:
    """Return the type of the layers that adapters are merged into for rollouts."""
    merged = None if recipe.lora is None else recipe.lora.merge_dtype
    return DTYPES[merged or recipe.train.dtype]


def prompt_limits(recipe: Recipe) -> PromptLimits:
    """Return the longest prompts that leave room for a completion in what the recipe's models and engine read."""
    data, rollout = recipe.data, recipe.rollout
    longest = data.max_length
    if rollout.engine == "vllm" and rollout.vllm_max_model_len is not None:
        longest = min(longest, rollout.vllm_max_model_len)
    return PromptLimits.from_lengths(longest, data.teacher_max_length or data.max_length, rollout.max_completion_length)


def sampling_of(section: RolloutSection, vocab_size: int | None = None) -> Sampling:
    """Return how a recipe has completions drawn, of the ids below `vocab_size` (None: of all)."""
    return Sampling(
        max_completion_length=section.max_completion_length,
        temperature=section.rollout_temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        stop_token_ids=section.stop_token_ids,
        stop=section.stop_words,
        vocab_size=vocab_size,
    )


def build_engine(recipe: Recipe, mesh: Mesh, model: MegatronModel, checkpoint: Checkpoint) -> RolloutEngine:
    """What samples from `model`, which began as `checkpoint`, once it has been given its weights."""
    with phase(f"Starting the rollout engine {recipe.rollout.engine}", is_main=mesh.is_main):
        return _build_engine(recipe, mesh, model, checkpoint)


def _build_engine(recipe: Recipe, mesh: Mesh, model: MegatronModel, checkpoint: Checkpoint) -> RolloutEngine:
    section = recipe.rollout
    if section.engine == "megatron":
        return MegatronEngine(model, checkpoint.eos_token_ids)
    if section.engine == "vllm":
        cache = section.vllm_kv_cache_gib
        return VllmColocatedEngine.start(
            mesh,
            checkpoint,
            ColocatedOptions(
                dtype=rollout_dtype(recipe),
                max_model_len=section.vllm_max_model_len or recipe.data.max_length,
                tensor_parallel_size=section.vllm_tensor_parallel_size,
                gpu_memory_utilization=section.vllm_gpu_memory_utilization,
                kv_cache_memory_bytes=None if cache is None else int(cache * 2**30),
                sleep_level=section.sleep_level,
                enforce_eager=section.enforce_eager,
            ),
        )
    options = server_options(recipe, section.vllm_server_urls)
    if section.weight_sync == "lora":
        options = replace(options, adapters=served_adapters(model))
    return VllmServerEngine(mesh, checkpoint, options)


def served_adapters(model: MegatronModel) -> ServedAdapters:
    """Return what servers must know of the adapters that they are given."""
    adapters = model.adapters
    config = adapter_config(
        adapters.layers, adapters.base_layers, str(model.checkpoint.path), adapters.options.rules.rank
    )
    return ServedAdapters(config, factor_shapes(adapters.layers, model.checkpoint.shapes))


def server_options(recipe: Recipe, urls: Sequence[str]) -> ServerOptions:
    """How the servers at `urls` are asked for completions."""
    section = recipe.rollout
    return ServerOptions(
        urls=tuple(urls),
        weight_sync=section.weight_sync,
        weight_sync_dir=Path(section.weight_sync_dir or Path(recipe.output.output_dir) / "rollout_weights"),
        max_length=recipe.data.max_length,
        needs_fp32=recipe.lora is not None and recipe.lora.merge_dtype == "fp32",
        concurrency=section.vllm_server_concurrency,
        timeout=section.vllm_server_timeout_s,
        patience=section.vllm_server_max_downtime_s,
    )
