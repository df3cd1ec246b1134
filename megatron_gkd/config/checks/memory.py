"""Whether the keys of the section `memory`, and those of a teacher's memory, go together."""

from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.checks.teacher import SOURCE
from megatron_gkd.config.schema import MemorySection, Recipe

_STATE_DTYPES = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


@check("offload_model", "offload_optimizer", "engine", "lmbda")
def student_leaves_for_rollouts(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a student that leaves the device for an engine that does not need the room, or the student itself."""
    memory, engine = recipe.memory, recipe.rollout.engine
    if memory.offload_model and engine != "vllm":
        reason = "samples with the student's weights" if engine == "megatron" else "runs on other devices"
        yield f"memory.offload_model = true: only with rollout.engine = vllm; {engine} {reason}"
    if memory.offload_optimizer and engine == "vllm_server":
        yield "memory.offload_optimizer = true: only with rollout.engine = vllm or megatron; servers have other devices"
    for leaf in ("offload_model", "offload_optimizer"):
        if getattr(memory, leaf) and recipe.distill.lmbda == 0:
            yield f"memory.{leaf} = true: only with distill.lmbda > 0, where the student samples"


@check("use_precision_aware_optimizer", "optimizer_cpu_offload", *_STATE_DTYPES, "main_grads_dtype")
def state_types_have_their_optimizer(recipe: Recipe, _: int) -> Iterator[str]:
    """Find types of the optimizer's state that the chosen optimizer does not have."""
    memory = recipe.memory
    for leaf in _changed(memory, *_STATE_DTYPES):
        key = f"memory.{leaf} = {getattr(memory, leaf)}"
        if memory.optimizer_cpu_offload:
            yield f"{key}: must be fp32 with optimizer_cpu_offload, which updates in fp32"
        elif not memory.use_precision_aware_optimizer:
            yield f"{key}: needs use_precision_aware_optimizer = true; otherwise it must be fp32"
    if _changed(memory, "main_grads_dtype") and not (
        memory.optimizer_cpu_offload or memory.use_precision_aware_optimizer
    ):
        yield (
            f"memory.main_grads_dtype = {memory.main_grads_dtype}: needs use_precision_aware_optimizer or "
            "optimizer_cpu_offload = true; otherwise it must be fp32"
        )


@check("use_precision_aware_optimizer", "optimizer_cpu_offload", "distributed_optimizer")
def special_optimizers_are_distributed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find optimizers that Megatron-Core has for sharded state alone."""
    for leaf in _changed(recipe.memory, "use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if not recipe.parallel.distributed_optimizer:
            yield f"memory.{leaf} = true: needs parallel.distributed_optimizer = true"


@check("use_precision_aware_optimizer", "optimizer_cpu_offload", "dtype", "tuner_type", "lora_dtype")
def precise_state_is_of_bf16(recipe: Recipe, _: int) -> Iterator[str]:
    """Find fp32 weights, of which Transformer Engine's Adam keeps copies that are never updated."""
    if not recipe.memory.use_precision_aware_optimizer or recipe.memory.optimizer_cpu_offload:
        return
    key = "memory.use_precision_aware_optimizer = true"
    if recipe.train.dtype == "fp32":
        yield f"{key}: needs train.dtype = bf16; fp32 weights are their own fp32 copy"
    elif recipe.lora is not None and recipe.lora.lora_dtype == "fp32":
        yield f"{key}: needs lora.lora_dtype = bf16 or null; fp32 adapters are their own fp32 copy"


@check("optimizer_offload_fraction", "optimizer_cpu_offload")
def fraction_goes_with_offload(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a share of the state without what it is a share of."""
    memory = recipe.memory
    if _changed(memory, "optimizer_offload_fraction") and not memory.optimizer_cpu_offload:
        fraction = memory.optimizer_offload_fraction
        yield f"memory.optimizer_offload_fraction = {fraction}: only with optimizer_cpu_offload = true"


@check(*SOURCE, "teacher_states", "teacher_micro_batch_tokens", "virtual_pipeline_model_parallel_size")
def teachers_with_states_keep_them(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys of a teacher's hidden states where it has none here."""
    for place, teacher in recipe.teacher.all.items():
        tokens = f"{place}.teacher_micro_batch_tokens = {teacher.teacher_micro_batch_tokens}"
        given = [f"{place}.teacher_states = host"] if teacher.teacher_states == "host" else []
        given += [tokens] if teacher.teacher_micro_batch_tokens is not None else []
        if teacher.source not in ("local", "self", None):
            yield from (f"{key}: only with {place}.teacher_kind = local or self" for key in given)
        elif teacher.source == "self" and tokens in given:
            if recipe.parallel.virtual_pipeline_model_parallel_size is not None:
                yield (
                    f"{tokens}: not with virtual_pipeline_model_parallel_size where {place}.teacher_kind = self, whose "
                    "schedule needs as many microbatches as the student's"
                )


def _changed(memory: MemorySection, *leaves: str) -> list[str]:
    """Return the leaves that do not have their defaults."""
    return [leaf for leaf in leaves if getattr(memory, leaf) != MemorySection.model_fields[leaf].default]
