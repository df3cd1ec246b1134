"""Whether the models fit the recipe, from the checkpoints' config.json and the headers of their safetensors files.

A hub id can't be looked into before it is downloaded; the model code makes the same checks again when it builds.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.checkpoint_format.adapter_files import AdapterFiles, AdapterProblem
from megatron_gkd.checkpoint_format.config_file import num_experts, num_key_value_heads, read_config, rope, rope_type
from megatron_gkd.checkpoint_format.weight_files import has_weights, read_tensors
from megatron_gkd.config.schema import Recipe


@dataclass(frozen=True)
class ModelShape:
    """What the recipe has to fit, of one Hugging Face checkpoint. num_experts is 0 for a dense model."""

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    feed_forward_size: int
    num_experts: int
    max_positions: int
    vocab_size: int


def student_is_readable(recipe: Recipe, _: int) -> Iterator[str]:
    """A student that is neither a supported local checkpoint nor a hub id."""
    yield from _unreadable("student.model", recipe.student.model)


def teachers_are_readable(recipe: Recipe, _: int) -> Iterator[str]:
    """The same of the local teachers."""
    for key, model in _local_teachers(recipe).items():
        yield from _unreadable(key, model)


def teacher_adapters_fit(recipe: Recipe, _: int) -> Iterator[str]:
    """Refuse adapters of local teachers that can't be read, or are not of the teacher's model."""
    for place, teacher in recipe.teacher.all.items():
        if teacher.source != "local" or teacher.teacher_adapters is None or not teacher.teacher_model:
            continue
        model = Path(teacher.teacher_model)
        try:
            files = AdapterFiles.open(Path(teacher.teacher_adapters))
            if (model / "config.json").is_file() and has_weights(model):  # else a hub id
                files.modules({name: tensor.shape for name, tensor in read_tensors(model, read_config(model)).items()})
        except AdapterProblem as problem:
            yield f"{place}.teacher_adapters = {teacher.teacher_adapters}: {problem}"
        except ValueError:  # reported by the model's own check
            continue


def _local_teachers(recipe: Recipe) -> dict[str, str]:
    """The models by their keys."""
    teachers = recipe.teacher.all.items()
    return {
        f"{place}.teacher_model": t.teacher_model for place, t in teachers if t.source == "local" and t.teacher_model
    }


def _unreadable(key: str, value: str) -> Iterator[str]:
    try:
        shape = read_shape(value)
        if shape is not None and has_weights(Path(value)):
            read_tensors(Path(value), read_config(Path(value)))
    except ValueError as error:
        yield f"{key} = {value}: {error}"


def models_fit(recipe: Recipe, _: int) -> Iterator[str]:
    """Local checkpoints that the layout or another key does not suit; unreadable ones are reported above."""
    models = {"student.model": recipe.student.model} | _local_teachers(recipe)
    shapes: dict[str, ModelShape] = {}
    for key, value in models.items():
        try:
            shape = read_shape(value)
        except ValueError:
            continue
        if shape is not None:
            shapes[key] = shape
            yield from _fits(key, value, shape, recipe)
    if len(shapes) == len(models) and not any(shape.num_experts for shape in shapes.values()):
        for leaf in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(recipe.parallel, leaf) > 1:
                yield f"parallel.{leaf} = {getattr(recipe.parallel, leaf)}: must be 1, as no model here has experts"


def read_shape(model: str) -> ModelShape | None:
    """The shape of a local model, None for a hub id (`org/name`). Raises ValueError for what is neither."""
    folder = Path(model)
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
            return None
        raise ValueError("must be a Hugging Face folder that exists, or a hub id (org/name)")
    if not (folder / "config.json").is_file():
        raise ValueError("must be a Hugging Face folder; there is no config.json in it")
    return _shape(read_config(folder))


def _shape(config: dict[str, Any]) -> ModelShape:
    experts = num_experts(config)
    extended = 0
    if rope_type(config) == "yarn":  # max_position_embeddings may be the length before scaling
        original = rope(config).get("original_max_position_embeddings") or config["max_position_embeddings"]
        extended = int(rope(config).get("factor", 1) * original)
    return ModelShape(
        num_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=num_key_value_heads(config),
        feed_forward_size=config["moe_intermediate_size" if experts else "intermediate_size"],
        num_experts=experts,
        max_positions=max(config["max_position_embeddings"], extended),
        vocab_size=config["vocab_size"],
    )


def _fits(key: str, value: str, shape: ModelShape, recipe: Recipe) -> Iterator[str]:
    p = recipe.parallel
    tp, is_student = p.tensor_model_parallel_size, key == "student.model"

    def divided(what: str, amount: int, leaf: str, by: int) -> Iterator[str]:
        if amount % by:
            yield f"parallel.{leaf} = {by}: must divide the {amount} {what} of {key} ({value})"

    yield from divided("attention heads", shape.num_attention_heads, "tensor_model_parallel_size", tp)
    groups = shape.num_key_value_heads
    if groups % tp and tp % groups:
        yield (
            f"parallel.tensor_model_parallel_size = {tp}: must divide the {groups} key-value heads of {key} ({value}), "
            "or be a multiple of them"
        )
    if shape.num_experts:
        etp, ep = p.expert_tensor_parallel_size, p.expert_model_parallel_size
        yield from divided("experts", shape.num_experts, "expert_model_parallel_size", ep)
        yield from divided("feed-forward rows", shape.feed_forward_size, "expert_tensor_parallel_size", etp)
        if is_student and tp > 1 and not p.sequence_parallel:
            yield (
                "parallel.sequence_parallel = false: must be true for a mixture-of-experts student with "
                f"tensor_model_parallel_size {tp}"
            )
    else:
        yield from divided("feed-forward rows", shape.feed_forward_size, "tensor_model_parallel_size", tp)
    engines = recipe.rollout.vllm_tensor_parallel_size
    if is_student and recipe.rollout.engine == "vllm" and shape.num_attention_heads % engines:
        yield (
            f"rollout.vllm_tensor_parallel_size = {engines}: must divide the {shape.num_attention_heads} attention "
            f"heads of {key} ({value})"
        )
    virtual = p.virtual_pipeline_model_parallel_size if is_student else None
    stages = p.pipeline_model_parallel_size * (virtual or 1)
    if shape.num_layers % stages:
        named = "pipeline_model_parallel_size" + (" x virtual_pipeline_model_parallel_size" if virtual else "")
        yield f"parallel.{named} = {stages}: must divide the {shape.num_layers} layers of {key} ({value})"
    for leaf in ("max_length", "teacher_max_length"):
        length = getattr(recipe.data, leaf) or 0
        if length > shape.max_positions and (leaf == "max_length" or _reads_teacher_prompts(key, recipe)):
            yield f"data.{leaf} = {length}: must be <= the {shape.max_positions} positions of {key} ({value})"
    topk = recipe.distill.gkd_logits_topk
    if topk is not None and topk > shape.vocab_size:
        yield f"distill.gkd_logits_topk = {topk}: must be <= the {shape.vocab_size} tokens that {key} ({value}) knows"


def _reads_teacher_prompts(key: str, recipe: Recipe) -> bool:
    """A teacher does, and the student where it is one."""
    return key != "student.model" or any(teacher.source == "self" for teacher in recipe.teacher.all.values())
