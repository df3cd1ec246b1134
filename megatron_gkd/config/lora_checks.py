"""Whether the keys of the section `lora` go together, and suit the student."""

from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.checkpoint_format.adapter_files import AdapterFiles, AdapterProblem
from megatron_gkd.checkpoint_format.lora_layers import ALL_LINEAR, LayerRules, LoraProblem, layers_of_shape
from megatron_gkd.config import model_checks
from megatron_gkd.config.schema import LoraSection, Recipe

LEAVES = tuple(LoraSection.model_fields)
_NOT_FOR_EXPERTS = "not with a mixture-of-experts student; use folder, nccl or gloo, which send merged weights"
_INITIALIZATIONS = ("kaiming", "gaussian")


def layer_rules(section: LoraSection) -> LayerRules:
    """Return the section's choice of layers, ranks and scales."""
    return LayerRules(
        rank=section.lora_rank,
        alpha=section.lora_alpha,
        target_modules=section.target_modules,
        target_regex=section.target_regex,
        use_rslora=section.use_rslora,
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
    )


def keys_go_together(recipe: Recipe, _: int) -> Iterator[str]:
    """Refuse kinds of adapters that are not supported, and keys that contradict each other."""
    lora = recipe.lora
    if lora is None:
        return
    if recipe.train.tuner_type == "full":
        yield "train.tuner_type = full: must be lora or null beside the section lora; or leave that section out"
    if lora.use_dora:
        yield "lora.use_dora = true: must be false; DoRA is not supported by mcore-bridge"
    if lora.init_lora_weights not in _INITIALIZATIONS:
        yield (
            f"lora.init_lora_weights = {lora.init_lora_weights}: must be one of {', '.join(_INITIALIZATIONS)}; others "
            "(pissa, olora, corda, eva, loftq) change the base's weights or need data"
        )
    if lora.lora_dtype == "bf16" and recipe.train.dtype == "fp32":
        yield "lora.lora_dtype = bf16: must be fp32 or null with train.dtype = fp32"
    if lora.modules_to_save:
        yield (
            f"lora.modules_to_save = {list(lora.modules_to_save)}: must be empty; only adapters are trained beside "
            "frozen weights"
        )
    if lora.target_regex is not None and lora.target_modules != (ALL_LINEAR,):
        yield f"lora.target_regex = {lora.target_regex}: not beside target_modules; set one of the two"


def rollouts_take_adapters(recipe: Recipe, _: int) -> Iterator[str]:
    """Refuse ways to give adapters to a rollout engine that do not suit it."""
    lora, rollout = recipe.lora, recipe.rollout
    if rollout.weight_sync == "lora" and lora is None:
        yield "rollout.weight_sync = lora: only with adapters (section lora); use folder, nccl or gloo"
    if lora is None or lora.merge_dtype is None:
        return
    if rollout.engine == "megatron":
        yield f"lora.merge_dtype = {lora.merge_dtype}: only with rollout.engine = vllm or vllm_server"
    elif rollout.weight_sync == "lora":
        yield f"lora.merge_dtype = {lora.merge_dtype}: not with rollout.weight_sync = lora, which merges nothing"
    elif lora.merge_dtype == "bf16" and recipe.train.dtype == "fp32":
        yield "lora.merge_dtype = bf16: must be fp32 or null where train.dtype = fp32"


def fits_model(recipe: Recipe, _: int) -> Iterator[str]:
    """Refuse names that a local student does not have, or that it can only have together."""
    if recipe.lora is None:
        return
    try:
        shape = model_checks.read_shape(recipe.student.model)
        if shape is None:
            return
    except ValueError:  # reported by the model's own check
        return
    try:
        layers = layer_rules(recipe.lora).choose(layers_of_shape(shape.num_layers, shape.num_experts))
    except LoraProblem as problem:
        yield f"lora.{problem}"
        return
    if shape.num_experts and recipe.rollout.weight_sync == "lora":
        yield f"rollout.weight_sync = lora: {_NOT_FOR_EXPERTS}"
    expert_tensor = recipe.parallel.expert_tensor_parallel_size
    if expert_tensor > 1 and any(layer.base.container for layer in layers):
        yield f"parallel.expert_tensor_parallel_size = {expert_tensor}: must be 1 with adapters on experts"
    if recipe.lora.adapters is not None:
        try:
            AdapterFiles.open(Path(recipe.lora.adapters)).require_fit(layers, base_shapes=None)
        except AdapterProblem as problem:
            yield f"lora.adapters = {recipe.lora.adapters}: {problem}"
