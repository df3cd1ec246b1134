"""Whether the models fit the recipe, from the checkpoints' config.json and the headers of their safetensors files.

A hub id can't be checked before it is downloaded; the model code makes the same checks again when it builds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_gkd.checkpoint_format.adapter_files import AdapterFiles, AdapterProblem
from megatron_gkd.checkpoint_format.config_file import read_config, require_trust
from megatron_gkd.checkpoint_format.layer_limits import embedded_engine_problems, layout_problems, vllm_problems
from megatron_gkd.checkpoint_format.model_shape import ModelShape, read_shape
from megatron_gkd.checkpoint_format.weight_files import has_weights, read_tensors
from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.checks.shapes import STAGE_LEAVES, pipelines, shape_of
from megatron_gkd.config.checks.teacher import SOURCE
from megatron_gkd.config.schema import Recipe
from megatron_gkd.config.stages import StageProblem

_MODELS = ("model", *SOURCE)


@check("model", "trust_remote_code", needs_files=True)
def student_is_readable(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a student that is neither a supported local checkpoint nor a hub id."""
    student = recipe.student
    yield from _unreadable("student.model", student.model, trust_remote_code=student.trust_remote_code)


@check(*SOURCE, "teacher_trust_remote_code", needs_files=True)
def teachers_are_readable(recipe: Recipe, _: int) -> Iterator[str]:
    """Find local teachers that are neither supported local checkpoints nor hub ids."""
    for place, teacher in recipe.teacher.all.items():
        model = teacher.teacher_model
        if teacher.source == "local" and model:
            key, is_trusted = f"{place}.teacher_model", teacher.teacher_trust_remote_code
            yield from _unreadable(key, model, trust_remote_code=is_trusted)


@check(*SOURCE, "teacher_adapters", needs_files=True)
def teacher_adapters_fit(recipe: Recipe, _: int) -> Iterator[str]:
    """Find adapters of local teachers that can't be read, or are not of the teacher's model."""
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


@check(*_MODELS, "tensor_model_parallel_size", needs_files=True)
def tensor_parallel_divides_layers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a tensor-parallel size that does not divide the heads or the dense feed-forward layers."""
    tp = recipe.parallel.tensor_model_parallel_size
    for model in _models(recipe):
        yield from model.divided("attention heads", model.shape.num_attention_heads, "tensor_model_parallel_size", tp)
        groups = model.shape.num_key_value_heads
        if groups % tp and tp % groups:
            yield (
                f"parallel.tensor_model_parallel_size = {tp}: must divide the {groups} key-value heads of {model}, or "
                "be a multiple of them"
            )
        for rows in dict.fromkeys(model.shape.feed_forward_sizes):
            yield from model.divided("feed-forward rows", rows, "tensor_model_parallel_size", tp)
        if model.shape.delta_heads:
            heads = model.shape.delta_heads
            yield from model.divided("key heads of the delta nets", heads, "tensor_model_parallel_size", tp)


@check(*_MODELS, "expert_model_parallel_size", "expert_tensor_parallel_size", needs_files=True)
def expert_parallel_divides_experts(recipe: Recipe, _: int) -> Iterator[str]:
    """Find expert-parallel sizes that do not divide the experts, or have none to divide."""
    sizes = {leaf: getattr(recipe.parallel, f"expert_{leaf}_parallel_size") for leaf in ("model", "tensor")}
    models = list(_models(recipe))
    for model in models:
        if model.shape.num_experts:
            rows = model.shape.expert_size
            experts = model.shape.num_experts
            yield from model.divided("experts", experts, "expert_model_parallel_size", sizes["model"])
            yield from model.divided("feed-forward rows", rows, "expert_tensor_parallel_size", sizes["tensor"])
    all_known = len(models) == 1 + len(_local_teachers(recipe))
    if all_known and not any(model.shape.num_experts for model in models):
        for leaf, size in sizes.items():
            if size > 1:
                yield f"parallel.expert_{leaf}_parallel_size = {size}: must be 1, as no model here has experts"


@check(*_MODELS, "context_parallel_size", "expert_tensor_parallel_size", needs_files=True)
def layers_have_the_layout(recipe: Recipe, _: int) -> Iterator[str]:
    """Find sizes of the layout that Megatron-Core does not have for a model's layers."""
    p = recipe.parallel
    for model in _models(recipe):
        yield from layout_problems(
            model.shape, str(model), context=p.context_parallel_size, expert_tensor=p.expert_tensor_parallel_size
        )


@check("model", "engine", "lmbda", needs_files=True)
def embedded_engine_has_the_layers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find an embedded engine that can't decode with the student."""
    student = _student(recipe)
    if student and recipe.rollout.engine == "megatron" and recipe.distill.lmbda > 0:
        yield from embedded_engine_problems(student.shape, str(student))


@check("model", "engine", "weight_sync", "lmbda", needs_files=True)
def vllm_takes_the_weights(recipe: Recipe, _: int) -> Iterator[str]:
    """Find engines of vLLM that can't get the weights of a student with quantized files."""
    rollout, student = recipe.rollout, _student(recipe)
    if student and rollout.engine != "megatron" and recipe.distill.lmbda > 0:
        engine, weight_sync = rollout.engine, rollout.weight_sync
        yield from vllm_problems(student.shape, str(student), engine=engine, weight_sync=weight_sync)


@check("model", "tensor_model_parallel_size", "sequence_parallel", needs_files=True)
def mixture_has_sequence_parallel(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a mixture-of-experts student with tensor parallelism alone, which Megatron-Core does not train."""
    p, student = recipe.parallel, _student(recipe)
    if student and student.shape.num_experts and p.tensor_model_parallel_size > 1 and not p.sequence_parallel:
        yield (
            "parallel.sequence_parallel = false: must be true for a mixture-of-experts student with "
            f"tensor_model_parallel_size {p.tensor_model_parallel_size}"
        )


@check("model", "engine", "vllm_tensor_parallel_size", needs_files=True)
def engines_divide_heads(recipe: Recipe, _: int) -> Iterator[str]:
    """Find engines of vLLM whose ranks do not divide the student's heads."""
    size, student = recipe.rollout.vllm_tensor_parallel_size, _student(recipe)
    if student and recipe.rollout.engine == "vllm" and student.shape.num_attention_heads % size:
        heads = student.shape.num_attention_heads
        yield f"rollout.vllm_tensor_parallel_size = {size}: must divide the {heads} attention heads of {student}"


@check(*_MODELS, *STAGE_LEAVES, needs_files=True)
def stages_divide_layers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find pipeline stages that do not divide the layers, or whose layers are not those of the model."""
    for model in pipelines(recipe):
        stages, virtual = model.stages, model.virtual
        if stages.are_equal:
            number, named = model.pipeline * (virtual or 1), "pipeline_model_parallel_size"
            named += " x virtual_pipeline_model_parallel_size" if virtual else ""
            if model.shape.num_layers % number:
                yield f"parallel.{named} = {number}: must divide the {model.shape.num_layers} layers of {model}"
        elif not any(stages.problems(model.pipeline, virtual)):  # they are reported by other checks
            try:
                stages.layers(model.shape.num_layers, model.pipeline, virtual)
            except StageProblem as problem:
                yield f"{problem.line(stages.prefix)}; the model is {model}"


@check(*_MODELS, "max_length", "teacher_max_length", needs_files=True)
def sequences_fit_positions(recipe: Recipe, _: int) -> Iterator[str]:
    """Find sequences that are longer than a model's positions."""
    is_own_teacher = any(teacher.source == "self" for teacher in recipe.teacher.all.values())
    for model in _models(recipe):
        lengths = {"max_length": recipe.data.max_length}
        if recipe.data.teacher_max_length is not None and (is_own_teacher or not model.is_student):
            lengths["teacher_max_length"] = recipe.data.teacher_max_length
        for leaf, length in lengths.items():
            if length > model.shape.max_positions:
                yield f"data.{leaf} = {length}: must be <= the {model.shape.max_positions} positions of {model}"


@check(*_MODELS, "gkd_logits_topk", needs_files=True)
def top_k_fits_vocabulary(recipe: Recipe, _: int) -> Iterator[str]:
    """Find more tokens to compare than a model has."""
    topk = recipe.distill.gkd_logits_topk
    for model in _models(recipe):
        if topk is not None and topk > model.shape.vocab_size:
            yield f"distill.gkd_logits_topk = {topk}: must be <= the {model.shape.vocab_size} tokens of {model}"


FIT_THE_STUDENT = (
    tensor_parallel_divides_layers,
    expert_parallel_divides_experts,
    layers_have_the_layout,
    mixture_has_sequence_parallel,
    engines_divide_heads,
    embedded_engine_has_the_layers,
    vllm_takes_the_weights,
    stages_divide_layers,
    sequences_fit_positions,
    top_k_fits_vocabulary,
)
"""The checks of a readable student; those of other models as well where the recipe has a teacher."""


@dataclass(frozen=True)
class _Model:
    """A local checkpoint of the recipe, under its key."""

    key: str
    path: str
    shape: ModelShape

    @property
    def is_student(self) -> bool:
        return self.key == "student.model"

    def divided(self, what: str, amount: int, leaf: str, by: int) -> Iterator[str]:
        """Yield a problem where the value `by` of parallel.`leaf` does not divide `amount`."""
        if amount % by:
            yield f"parallel.{leaf} = {by}: must divide the {amount} {what} of {self}"

    def __str__(self) -> str:
        return f"{self.key} ({self.path})"


def _models(recipe: Recipe) -> Iterator[_Model]:
    """Yield the student and the local teachers that are local checkpoints; unreadable ones are reported above."""
    for key, path in ({"student.model": recipe.student.model} | _local_teachers(recipe)).items():
        shape = shape_of(path)
        if shape is not None:
            yield _Model(key, path, shape)


def _student(recipe: Recipe) -> _Model | None:
    shape = shape_of(recipe.student.model)
    return None if shape is None else _Model("student.model", recipe.student.model, shape)


def _local_teachers(recipe: Recipe) -> dict[str, str]:
    """Return the models of the local teachers by their keys."""
    teachers = recipe.teacher.all.items()
    return {
        f"{place}.teacher_model": t.teacher_model for place, t in teachers if t.source == "local" and t.teacher_model
    }


def _unreadable(key: str, value: str, *, trust_remote_code: bool) -> Iterator[str]:
    try:
        if read_shape(value) is None:  # a hub id
            return
        config = read_config(Path(value))
        require_trust(Path(value), trust_remote_code=trust_remote_code)
        if has_weights(Path(value)):
            read_tensors(Path(value), config)
    except ValueError as error:
        yield f"{key} = {value}: {error}"
