"""Build the student and the rollout engine that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_gkd.checkpoint_format.adapter_files import adapter_config, factor_shapes
from megatron_gkd.checkpoint_format.layer_limits import vllm_problems
from megatron_gkd.checkpoint_format.lora_layers import LANGUAGE
from megatron_gkd.checkpoint_format.weight_files import HEAD
from megatron_gkd.config.api_keys import ApiKeyVariable
from megatron_gkd.config.schema import Recipe, TrainSection
from megatron_gkd.config.vision_rules import describe_image_keys
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import UserError
from megatron_gkd.models.build_options import BuildOptions
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.reporting.phases import phase
from megatron_gkd.rollout.base import RolloutEngine, Sampling
from megatron_gkd.rollout.megatron.engine import MegatronEngine
from megatron_gkd.rollout.vllm.colocated import VllmColocatedEngine
from megatron_gkd.rollout.vllm.engine_arguments import ColocatedOptions
from megatron_gkd.rollout.vllm.server import VllmServerEngine
from megatron_gkd.rollout.vllm.server_options import RolloutServerOptions, ServedAdapters
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.nodes import Nodes
from megatron_gkd.runtime.shared_folders import require_shared
from megatron_gkd.training.loss import Objective
from megatron_gkd.training.model_options import DTYPES, student_options
from megatron_gkd.training.student import Student


def build_student(recipe: Recipe, mesh: Mesh, checkpoint: Checkpoint, vocab_size: int, train_iters: int) -> Student:
    """Build the model in training with its optimizer and its loss. All ranks must call it.

    Args:
        recipe: of the run.
        mesh: how the model is sharded.
        checkpoint: the weights that it starts with.
        vocab_size: the loss is over the ids below it.
        train_iters: number of steps of the learning-rate schedule.
    """
    parallel, distill, section = recipe.parallel, recipe.distill, recipe.train
    _require_parts(section, checkpoint)
    model = load_model(
        f"the student {recipe.student.model}",
        checkpoint,
        mesh,
        student_options(recipe),
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
    return Student(model, objective, parallel, section, train_iters, recipe.memory)


def _require_parts(section: TrainSection, checkpoint: Checkpoint) -> None:
    """Raise a UserError for keys of a multimodal student's parts beside a student from the hub that has none."""
    described = [] if checkpoint.has_images else describe_image_keys(section)
    if described:
        raise UserError(f"{described[0]}: only with a student that reads images; {checkpoint.path} does not")


def rollout_tensors(recipe: Recipe) -> Callable[[MegatronModel], Iterable[tuple[str, Tensor]]]:
    """Return the function that yields the tensors which a rollout engine gets of the student.

    They are its adapters, or its weights with adapters merged.
    """
    if recipe.rollout.weight_sync == "lora":
        return MegatronModel.adapter_tensors
    return partial(MegatronModel.named_tensors, merged_dtype=rollout_dtype(recipe))


def rollout_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype of layers with merged adapters in rollouts."""
    merged = None if recipe.lora is None else recipe.lora.merge_dtype
    return DTYPES[merged or recipe.train.dtype]


def sampling_of(
    recipe: Recipe,
    stop_token_ids: tuple[int, ...],
    vocab_size: int | None = None,
    reserved_ids: tuple[int, ...] = (),
) -> Sampling:
    """Return the recipe's sampling parameters.

    Args:
        recipe: the recipe.
        stop_token_ids: end a completion; see `CompletionEnds`.
        vocab_size: only ids below it are sampled; None: all.
        reserved_ids: ids that are never sampled.
    """
    section = recipe.rollout
    return Sampling(
        max_completion_length=recipe.max_completion_length,
        temperature=recipe.rollout_temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
        repetition_penalty=section.repetition_penalty,
        stop_token_ids=stop_token_ids,
        stop=section.stop_words,
        vocab_size=vocab_size,
        reserved_ids=reserved_ids,
    )


def build_engine(
    recipe: Recipe,
    mesh: Mesh,
    model: MegatronModel,
    checkpoint: Checkpoint,
    images: ImageProcessing | None = None,
) -> RolloutEngine:
    """Build the engine that samples from `model`, once it has its weights. All ranks must call it.

    Args:
        recipe: of the run.
        mesh: of the ranks.
        model: the model that samples.
        checkpoint: the weights that `model` started with.
        images: what the model's processor makes of images; None for a text model.
    """
    with phase(f"Starting the rollout engine {recipe.rollout.engine}", is_main=mesh.is_main):
        return _build_engine(recipe, mesh, model, checkpoint, images)


def _build_engine(
    recipe: Recipe, mesh: Mesh, model: MegatronModel, checkpoint: Checkpoint, images: ImageProcessing | None
) -> RolloutEngine:
    section = recipe.rollout
    if section.engine == "megatron":
        return MegatronEngine(model, checkpoint.eos_token_ids, images, max_batch_tokens=section.max_batch_tokens)
    for problem in vllm_problems(
        checkpoint.shape, str(checkpoint.path), engine=section.engine, weight_sync=section.weight_sync
    ):
        raise UserError(problem)
    if section.engine == "vllm":
        options = ColocatedOptions.from_section(section, rollout_dtype(recipe), recipe.data.max_length)
        return VllmColocatedEngine.start(mesh, checkpoint, options, images)
    servers = server_options(recipe, section.vllm_server_urls)
    if section.weight_sync == "lora":
        servers = replace(servers, adapters=served_adapters(model))
    if section.weight_sync in ("folder", "lora"):  # any rank may let a server that was restarted load from it
        require_shared("rollout.weight_sync_dir", servers.weight_sync_dir, Nodes.from_world())
    return VllmServerEngine(mesh, checkpoint, servers, images)


def served_adapters(model: MegatronModel) -> ServedAdapters:
    """Return the description of the adapters that rollout servers get."""
    adapters = model.adapters
    if adapters is None:
        raise UserError("rollout.weight_sync = lora: the student has no adapters; set train.tuner_type = lora")
    if any(layer.base.part != LANGUAGE for layer in adapters.layers):
        raise UserError(
            "rollout.weight_sync = lora: servers get adapters of the language model alone, and the student has some on "
            "its vision tower; use folder, nccl or gloo, which send merged weights"
        )
    config = adapter_config(
        adapters.layers, adapters.base_layers, str(model.checkpoint.path), adapters.options.rules.rank
    )
    return ServedAdapters(config, factor_shapes(adapters.layers, model.checkpoint.parameter_shapes))


def server_options(recipe: Recipe, urls: Sequence[str]) -> RolloutServerOptions:
    """Return the options of the rollout servers at `urls`."""
    section = recipe.rollout
    return RolloutServerOptions(
        urls=tuple(urls),
        weight_sync=section.weight_sync,
        weight_sync_dir=Path(section.weight_sync_dir or Path(recipe.output.output_dir) / "rollout_weights"),
        max_length=recipe.data.max_length,
        needs_fp32=recipe.lora is not None and recipe.lora.merge_dtype == "fp32",
        concurrency=section.vllm_server_concurrency,
        timeout=section.vllm_server_timeout_s,
        max_downtime=section.vllm_server_max_downtime_s,
        api_key=ApiKeyVariable("rollout.vllm_server_api_key_env", section.vllm_server_api_key_env),
    )


def load_model(title: str, checkpoint: Checkpoint, mesh: Mesh, options: BuildOptions) -> MegatronModel:
    """Load a model and show the progress. All ranks of the world must call it.

    Args:
        title: role and name of the model: `the student Qwen/Qwen3-1.7B`.
        checkpoint: its weights.
        mesh: how it is sharded.
        options: how it is built.
    """
    total = _tensors_of_main_rank(checkpoint, mesh)
    with phase(f"Loading {title}", is_main=mesh.is_main, unit="tensors") as shown:
        shown.update(0, total)
        return MegatronModel.load(
            checkpoint, mesh, options, lambda read: shown.update(read, total), needs_weights=checkpoint.has_weights
        )


def _tensors_of_main_rank(checkpoint: Checkpoint, mesh: Mesh) -> int | None:
    """Return the number of tensors that rank 0 reads; None where it reads only some of the layers or experts."""
    if mesh.layout.pipeline > 1 or (checkpoint.is_moe and mesh.layout.expert > 1):
        return None
    return sum(not (checkpoint.is_tied and name.endswith(HEAD)) for name in checkpoint.tensors)
