"""Whether the keys of the section `lora` go together, and suit the student."""

from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.checkpoint_format.adapter_files import AdapterFiles, AdapterProblem
from megatron_gkd.checkpoint_format.lora_layers import (
    ALL_LINEAR,
    LANGUAGE,
    AdaptedLayer,
    LoraProblem,
    layers_of_shape,
    why_no_adapters,
)
from megatron_gkd.checkpoint_format.model_shape import ModelShape
from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.checks.shapes import shape_of
from megatron_gkd.config.lora_rules import RULES, layer_rules
from megatron_gkd.config.schema import Recipe

_INITIALIZATIONS = ("kaiming", "gaussian")
_MERGED = "use folder, nccl or gloo, which send merged weights"
_LAYERS = ("model", "tuner_type", *RULES)


@check("tuner_type")
def tuner_is_lora(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a section `lora` in a run that trains all parameters."""
    if recipe.lora is not None and recipe.train.tuner_type == "full":
        yield "train.tuner_type = full: must be lora or null beside the section lora; or leave that section out"


@check("tuner_type", "use_dora", "init_lora_weights", "modules_to_save")
def adapters_are_supported(recipe: Recipe, _: int) -> Iterator[str]:
    """Find kinds of adapters that are not supported."""
    lora = recipe.lora
    if lora is None:
        return
    if lora.use_dora:
        yield "lora.use_dora = true: must be false; DoRA is not supported by mcore-bridge"
    if lora.init_lora_weights not in _INITIALIZATIONS:
        yield (
            f"lora.init_lora_weights = {lora.init_lora_weights}: must be one of {', '.join(_INITIALIZATIONS)}; others "
            "(pissa, olora, corda, eva, loftq) change the base's weights or need data"
        )
    if lora.modules_to_save:
        yield (
            f"lora.modules_to_save = {list(lora.modules_to_save)}: must be empty; only adapters are trained beside "
            "frozen weights"
        )


@check("tuner_type", "lora_dtype", "dtype")
def adapters_have_the_models_type(recipe: Recipe, _: int) -> Iterator[str]:
    """Find adapters of a smaller type than the model's."""
    if recipe.lora is not None and recipe.lora.lora_dtype == "bf16" and recipe.train.dtype == "fp32":
        yield "lora.lora_dtype = bf16: must be fp32 or null with train.dtype = fp32"


@check("tuner_type", "target_regex", "target_modules")
def targets_are_named_once(recipe: Recipe, _: int) -> Iterator[str]:
    """Find target layers that are named in two ways."""
    lora = recipe.lora
    if lora is not None and lora.target_regex is not None and lora.target_modules != (ALL_LINEAR,):
        yield f"lora.target_regex = {lora.target_regex}: not beside target_modules; set one of the two"


@check("weight_sync", "tuner_type")
def adapters_are_sent_where_there_are_some(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a transfer of adapters in a run without them."""
    if recipe.rollout.weight_sync == "lora" and recipe.lora is None:
        yield "rollout.weight_sync = lora: only with adapters (section lora); use folder, nccl or gloo"


@check("tuner_type", "merge_dtype", "dtype", "engine", "weight_sync")
def merged_weights_have_a_type(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a type of merged weights where none are sent, or a smaller one than the model's."""
    lora, rollout = recipe.lora, recipe.rollout
    if lora is None or lora.merge_dtype is None:
        return
    if rollout.engine == "megatron":
        yield f"lora.merge_dtype = {lora.merge_dtype}: only with rollout.engine = vllm or vllm_server"
    elif rollout.weight_sync == "lora":
        yield f"lora.merge_dtype = {lora.merge_dtype}: not with rollout.weight_sync = lora, which merges nothing"
    elif lora.merge_dtype == "bf16" and recipe.train.dtype == "fp32":
        yield "lora.merge_dtype = bf16: must be fp32 or null where train.dtype = fp32"


@check("model", "tuner_type", needs_files=True)
def student_takes_adapters(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a student with linear layers that have no adapters here."""
    shape = None if recipe.lora is None else shape_of(recipe.student.model)
    if shape is not None and not shape.takes_lora:
        yield f"train.tuner_type = lora: {why_no_adapters(shape.model_type)}; use full"


@check(*_LAYERS, needs_files=True)
def targets_are_in_the_student(recipe: Recipe, _: int) -> Iterator[str]:
    """Find target layers that the student does not have, or that can only be adapted together."""
    try:
        _adapted_layers(recipe)
    except LoraProblem as problem:
        yield f"lora.{problem}"


@check(*_LAYERS, "weight_sync", "expert_tensor_parallel_size", needs_files=True)
def experts_take_adapters(recipe: Recipe, _: int) -> Iterator[str]:
    """Find adapters on experts that can't be sent to servers, or be sharded."""
    found = _right_layers(recipe)
    if found is None:
        return
    shape, layers = found
    if shape.num_experts and recipe.rollout.weight_sync == "lora":
        yield f"rollout.weight_sync = lora: not with a mixture-of-experts student; {_MERGED}"
    size = recipe.parallel.expert_tensor_parallel_size
    if size > 1 and any(layer.base.container for layer in layers):
        yield f"parallel.expert_tensor_parallel_size = {size}: must be 1 with adapters on experts"


@check(*_LAYERS, "adapters", needs_files=True)
def initial_adapters_fit(recipe: Recipe, _: int) -> Iterator[str]:
    """Find adapters to start from that are not of these layers."""
    if recipe.lora is None or recipe.lora.adapters is None:
        return
    found = _right_layers(recipe)
    if found is None:
        return
    try:
        AdapterFiles.open(Path(recipe.lora.adapters)).require_fit(found[1], base_shapes=None)
    except AdapterProblem as problem:
        yield f"lora.adapters = {recipe.lora.adapters}: {problem}"


def _right_layers(recipe: Recipe) -> tuple[ModelShape, tuple[AdaptedLayer, ...]] | None:
    """Return what `_adapted_layers` does; None also where `targets_are_in_the_student` reports a problem."""
    try:
        return _adapted_layers(recipe)
    except LoraProblem:
        return None


def _adapted_layers(recipe: Recipe) -> tuple[ModelShape, tuple[AdaptedLayer, ...]] | None:
    """Return the shape of a local student and its layers with adapters; None where there are none to be known.

    Raises:
        LoraProblem: the keys of the section do not suit the student.
    """
    shape = None if recipe.lora is None else shape_of(recipe.student.model)
    if recipe.lora is None or shape is None or not shape.takes_lora:  # the last is reported above
        return None
    rules = layer_rules(recipe.lora, recipe.train)
    is_whole_language_model = rules.target_regex is None and rules.target_modules == (ALL_LINEAR,)
    if shape.has_images and not (is_whole_language_model and rules.parts == {LANGUAGE}):
        return None  # the layers of vision towers are known when the model is built
    return shape, rules.choose(layers_of_shape(shape.num_layers, shape.num_experts, shape.decoder))
