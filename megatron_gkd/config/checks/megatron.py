"""Whether the options of Megatron-Core's modules go together, and whether their kernels are installed.

What depends on the GPU, or on a model of the hub, is checked when the model is built.
"""

import importlib.util
from collections.abc import Iterator, Mapping

from megatron_gkd.config.checks.attention import has_transformer_engine
from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.checks.shapes import shape_of
from megatron_gkd.config.checks.teacher import SOURCE
from megatron_gkd.config.megatron_fields import describe_problems
from megatron_gkd.config.schema import Recipe

_GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"
_SOFTMAX_KERNEL = "scaled_upper_triang_masked_softmax_cuda"
_OF_EXPERTS = ("freeze_moe_router", "moe_z_loss_coeff")
_EXPERT_MODULES = ("moe", "moe_act", "shared_experts")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@check(
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "moe_permute_fusion",
    needs_files=True,
)
def kernels_are_installed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find fused kernels that are requested and not installed."""
    section, has_engine = recipe.megatron, has_transformer_engine()
    engine, apex = "Transformer Engine", f"Apex' kernel {_GRADIENT_KERNEL}"
    needed = {
        "gradient_accumulation_fusion": (has_engine or _is_installed(_GRADIENT_KERNEL), f"{engine} or {apex}"),
        "masked_softmax_fusion": (_is_installed(_SOFTMAX_KERNEL), f"Apex' kernel {_SOFTMAX_KERNEL}"),
        "apply_rope_fusion": (has_engine, engine),
        "moe_permute_fusion": (has_engine, f"{engine} 2.1 or newer"),
    }
    for leaf, (is_there, name) in needed.items():
        if getattr(section, leaf) == "on" and not is_there:
            yield f"megatron.{leaf} = on: needs {name}, which is not installed here; it must be auto or off"


@check("moe_token_dispatcher_type", needs_files=True)
def dispatcher_is_installed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find the dispatcher `flex` without the library that sends its tokens."""
    if recipe.megatron.moe_token_dispatcher_type == "flex" and not _is_installed("deep_ep"):
        yield (
            "megatron.moe_token_dispatcher_type = flex: needs DeepEP (deep_ep), which is not installed here; it must "
            "be alltoall or allgather"
        )


@check("moe_shared_expert_overlap", "moe_token_dispatcher_type", "recompute_modules")
def overlap_has_its_dispatcher(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a shared expert that can't be computed while tokens are sent."""
    section, dispatcher = recipe.megatron, recipe.megatron.moe_token_dispatcher_type
    modules, key = recipe.parallel.recompute_modules, "megatron.moe_shared_expert_overlap = true"
    if section.moe_shared_expert_overlap and dispatcher != "alltoall":
        yield f"{key}: needs moe_token_dispatcher_type = alltoall; it is {dispatcher}"
    if section.moe_shared_expert_overlap and "shared_experts" in modules:
        yield f"{key}: not with shared_experts in parallel.recompute_modules"


@check("recompute_modules", "recompute_granularity", "moe_grouped_gemm", "fp8_format", "fp8_recipe")
def recomputed_modules_go_together(recipe: Recipe, _: int) -> Iterator[str]:
    """Find recomputed modules without selective recomputing, or that their layers can't recompute."""
    modules, section = recipe.parallel.recompute_modules, recipe.megatron
    key = f"parallel.recompute_modules = {list(modules)}"
    grouped, fp8 = section.moe_grouped_gemm, (section.fp8_format, section.fp8_recipe)
    if modules and recipe.parallel.recompute_granularity != "selective":
        yield f"{key}: only with recompute_granularity = selective"
    if len(set(modules)) < len(modules):
        yield f"{key}: must name every module once"
    if "moe_act" in modules and not grouped:
        yield f"{key}: moe_act needs megatron.moe_grouped_gemm = true"
    if fp8[0] is not None and fp8[1] == "delayed" and {"moe_act", "layernorm"} & set(modules):
        yield f"{key}: moe_act and layernorm can't be recomputed with megatron.fp8_recipe = delayed"


@check("model", "recompute_modules", needs_files=True)
def recomputed_modules_are_in_the_student(recipe: Recipe, _: int) -> Iterator[str]:
    """Find recomputed modules that the student does not have."""
    shape, modules = shape_of(recipe.student.model), recipe.parallel.recompute_modules
    if shape is None:
        return
    key = f"parallel.recompute_modules = {list(modules)}"
    for name in modules:
        if name in _EXPERT_MODULES and not shape.num_experts:
            yield f"{key}: {name} is a module of mixtures of experts; student.model ({recipe.student.model}) has none"
        if name == "mla_up_proj" and not shape.has_latent_attention:
            yield f"{key}: mla_up_proj needs multi-latent attention, which {recipe.student.model} does not have"
        if name == "mlp" and shape.num_experts and all(shape.has_experts_in):
            yield f"{key}: mlp is that of dense layers, and {recipe.student.model} has none; its experts are moe"


@check("model", *_OF_EXPERTS, needs_files=True)
def routers_are_in_the_student(recipe: Recipe, _: int) -> Iterator[str]:
    """Find options of routers with a student that has none."""
    shape = shape_of(recipe.student.model)
    for leaf in _OF_EXPERTS:
        value = getattr(recipe.megatron, leaf)
        if value and shape is not None and not shape.num_experts:
            text = "true" if value is True else value
            yield f"megatron.{leaf} = {text}: student.model ({recipe.student.model}) has no experts; leave it out"


@check("model", "tuner_type", "moe_grouped_gemm", needs_files=True)
def experts_are_grouped_for_adapters(recipe: Recipe, _: int) -> Iterator[str]:
    """Find experts one by one where adapters need them together."""
    shape = shape_of(recipe.student.model)
    key = "megatron.moe_grouped_gemm = false"
    if recipe.megatron.moe_grouped_gemm or shape is None or not shape.num_experts:
        return
    if recipe.lora is not None:
        yield f"{key}: must be true with adapters (section lora)"
    if shape.has_expert_biases:
        yield f"{key}: must be true with the biases of the experts of {recipe.student.model}"


@check("megatron_extra_kwargs", needs_files=True)
def extra_fields_exist(recipe: Recipe, _: int) -> Iterator[str]:
    """Find fields that Megatron-Core's configuration does not have, or that are decided elsewhere."""
    extra = recipe.megatron.megatron_extra_kwargs
    if extra:
        for problem in describe_problems(extra):
            yield f"megatron.megatron_extra_kwargs: {problem}"


@check("fp8_format", *SOURCE, "teacher_fp8_format", "dtype")
def fp8_has_its_type(recipe: Recipe, _: int) -> Iterator[str]:
    """Find FP8 in a run in fp32."""
    for key, chosen in _fp8_formats(recipe).items():
        if chosen is not None and recipe.train.dtype == "fp32":
            yield f"{key} = {chosen}: needs train.dtype = bf16"


@check("fp8_format", *SOURCE, "teacher_fp8_format", needs_files=True)
def fp8_is_installed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find FP8 without the library that computes in it."""
    for key, chosen in _fp8_formats(recipe).items():
        if chosen is not None and not has_transformer_engine():
            yield (
                f"{key} = {chosen}: needs Transformer Engine and a GPU of compute capability 8.9 or higher; "
                "Transformer Engine is not installed here. Leave it out to compute in train.dtype"
            )


@check("fp8_format", "engine", "lmbda")
def fp8_has_an_engine(recipe: Recipe, _: int) -> Iterator[str]:
    """Find the embedded engine, whose steps of few tokens FP8 can't compute, with a student in FP8."""
    chosen = recipe.megatron.fp8_format
    if chosen is not None and recipe.rollout.engine == "megatron" and recipe.distill.lmbda > 0:
        yield f"megatron.fp8_format = {chosen}: rollout.engine must be vllm or vllm_server with it"


def _fp8_formats(recipe: Recipe) -> Mapping[str, str | None]:
    """Return the FP8 formats of the student and of the local teachers, by their keys."""
    teachers = recipe.teacher.all.items()
    return {"megatron.fp8_format": recipe.megatron.fp8_format} | {
        f"{place}.teacher_fp8_format": teacher.teacher_fp8_format
        for place, teacher in teachers
        if teacher.source == "local"
    }
