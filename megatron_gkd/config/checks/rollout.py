"""Whether the keys of the rollouts go together."""

import importlib.util
from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.checks.shapes import shape_of
from megatron_gkd.config.schema import Recipe, RolloutSection
from megatron_gkd.config.vllm_arguments import QUANTIZATIONS, describe_refused, describe_unknown

OF_THE_ENGINE = (  # beside another engine they have no effect
    "vllm_tensor_parallel_size",
    "vllm_gpu_memory_utilization",
    "vllm_kv_cache_gib",
    "vllm_max_model_len",
    "sleep_level",
    "enforce_eager",
    "vllm_max_num_seqs",
    "vllm_enable_prefix_caching",
    "vllm_enable_expert_parallel",
    "vllm_quantization",
    "vllm_limit_mm_per_prompt",
    "vllm_engine_kwargs",
)

OF_THE_SERVERS = (
    "vllm_server_concurrency",
    "vllm_server_timeout_s",
    "vllm_server_max_downtime_s",
    "weight_sync",
    "weight_sync_dir",
    "steps_ahead",
)

_MAX_BATCH_TOKENS = RolloutSection.model_fields["max_batch_tokens"].default


@check("engine", "vllm_server_urls")
def servers_are_named(recipe: Recipe, _: int) -> Iterator[str]:
    """Find an engine without its servers, and servers without their engine."""
    engine, urls = recipe.rollout.engine, recipe.rollout.vllm_server_urls
    if engine == "vllm_server" and not urls:
        yield "rollout.vllm_server_urls = []: must name a server where rollout.engine = vllm_server"
    if engine != "vllm_server" and urls:
        yield f"rollout.vllm_server_urls = {list(urls)}: only with rollout.engine = vllm_server"
    if len(set(urls)) < len(urls):
        yield f"rollout.vllm_server_urls = {list(urls)}: must name every server once"


@check("engine", *OF_THE_SERVERS)
def server_keys_go_with_servers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys of rollout servers beside another engine."""
    section = recipe.rollout
    if section.engine != "vllm_server":
        for leaf in OF_THE_SERVERS:
            if getattr(section, leaf) != RolloutSection.model_fields[leaf].default:
                yield f"rollout.{leaf} = {getattr(section, leaf)}: only with rollout.engine = vllm_server"
    elif section.weight_sync not in ("folder", "lora") and section.weight_sync_dir is not None:
        yield f"rollout.weight_sync_dir = {section.weight_sync_dir}: only with rollout.weight_sync = folder or lora"


@check("engine", "vllm_tensor_parallel_size")
def engines_divide_the_ranks(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Find engines of vLLM whose ranks do not divide those of the run."""
    size = recipe.rollout.vllm_tensor_parallel_size
    if recipe.rollout.engine == "vllm" and world_size % size:
        yield f"rollout.vllm_tensor_parallel_size = {size}: must divide the number of processes ({world_size})"


@check("engine", "max_batch_tokens")
def batches_are_of_the_embedded_engine(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a limit of the embedded engine beside another engine."""
    section = recipe.rollout
    if section.engine != "megatron" and section.max_batch_tokens != _MAX_BATCH_TOKENS:
        yield f"rollout.max_batch_tokens = {section.max_batch_tokens}: only with rollout.engine = megatron"


@check("lmbda", "num_generations", "steps_per_generation", "generation_batch_size")
def generations_are_used(recipe: Recipe, _: int) -> Iterator[str]:
    """Find the size of generations where the student never samples."""
    section = recipe.rollout
    if recipe.distill.lmbda == 0:
        for leaf, default in (("num_generations", 1), ("steps_per_generation", None), ("generation_batch_size", None)):
            value = getattr(section, leaf)
            if value not in (default, 1):
                yield f"rollout.{leaf} = {value}: only with distill.lmbda > 0, where the student samples"


@check("num_generations", "steps_per_generation", "generation_batch_size", "global_batch_size")
def generations_have_a_size(recipe: Recipe, _: int) -> Iterator[str]:
    """Find generations that are not of whole steps, or whose prompts are not completed as often as each other."""
    section, batch = recipe.rollout, recipe.train.global_batch_size
    size, steps = section.generation_batch_size, section.steps_per_generation
    if size is not None and steps is not None:
        yield f"rollout.generation_batch_size = {size}: must be null beside steps_per_generation ({steps})"
    elif size is not None and size % batch:
        yield f"rollout.generation_batch_size = {size}: must be a multiple of train.global_batch_size ({batch})"
    elif (recipe.steps_per_generation * batch) % section.num_generations:
        yield (
            f"rollout.num_generations = {section.num_generations}: must divide the completions of a generation, "
            f"train.global_batch_size x steps_per_generation = {batch} x {recipe.steps_per_generation} = "
            f"{recipe.steps_per_generation * batch}"
        )


@check("engine", needs_files=True)
def vllm_is_installed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find vLLM in the training processes without its package."""
    if recipe.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        yield "rollout.engine = vllm: needs vLLM beside the trainer, which is not installed here (pip install vllm)"


@check("engine", *OF_THE_ENGINE)
def vllm_keys_go_with_vllm(recipe: Recipe, _: int) -> Iterator[str]:
    """Find options of vLLM in the training processes beside another engine; servers are started with their own."""
    section = recipe.rollout
    for leaf in OF_THE_ENGINE:
        value = getattr(section, leaf)
        if section.engine != "vllm" and value != RolloutSection.model_fields[leaf].default:
            shown = str(value).lower() if isinstance(value, bool) else value
            hint = "; give it to the servers as they are started" if section.engine == "vllm_server" else ""
            yield f"rollout.{leaf} = {shown}: only with rollout.engine = vllm{hint}"


@check("vllm_engine_kwargs")
def engine_arguments_are_free(recipe: Recipe, _: int) -> Iterator[str]:
    """Find arguments of vLLM that are decided elsewhere, or would break new weights or log-probabilities."""
    for problem in describe_refused(recipe.rollout.vllm_engine_kwargs):
        yield f"rollout.vllm_engine_kwargs: {problem}"


@check("engine", "vllm_engine_kwargs", needs_files=True)
def engine_arguments_exist(recipe: Recipe, _: int) -> Iterator[str]:
    """Find arguments that the installed vLLM does not have."""
    if recipe.rollout.engine == "vllm":
        for problem in describe_unknown(recipe.rollout.vllm_engine_kwargs):
            yield f"rollout.vllm_engine_kwargs: {problem}"


@check("engine", "vllm_quantization", "dtype", "tuner_type", "merge_dtype")
def weights_are_quantized_on_arrival(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a method that needs a quantized checkpoint, or one for weights in fp32."""
    method = recipe.rollout.vllm_quantization
    if recipe.rollout.engine != "vllm" or method is None:
        return
    key = f"rollout.vllm_quantization = {method}"
    if method not in QUANTIZATIONS:
        yield f"{key}: must be a method that quantizes weights as they arrive: {', '.join(QUANTIZATIONS)}; or null"
    elif recipe.train.dtype == "fp32":
        yield f"{key}: needs train.dtype = bf16"
    elif recipe.lora is not None and recipe.lora.merge_dtype == "fp32":
        yield f"{key}: needs lora.merge_dtype = bf16 or null"


@check("engine", "vllm_limit_mm_per_prompt")
def limits_are_of_images(recipe: Recipe, _: int) -> Iterator[str]:
    """Find limits of what no prompt has."""
    limits = recipe.rollout.vllm_limit_mm_per_prompt
    if recipe.rollout.engine == "vllm" and limits is not None:
        for kind, limit in limits.items():
            if kind not in ("image", "video"):
                yield f"rollout.vllm_limit_mm_per_prompt = {limits}: {kind} is unknown; allowed are image and video"
            elif limit < 0:
                yield f"rollout.vllm_limit_mm_per_prompt = {limits}: {kind} must be >= 0"


@check("engine", "vllm_enable_expert_parallel", "vllm_tensor_parallel_size", "model")
def experts_are_divided_over_ranks(recipe: Recipe, _: int) -> Iterator[str]:
    """Find experts to divide where there are none, or no ranks to divide them over."""
    section = recipe.rollout
    if section.engine != "vllm" or not section.vllm_enable_expert_parallel:
        return
    key, shape = "rollout.vllm_enable_expert_parallel = true", shape_of(recipe.student.model)
    if section.vllm_tensor_parallel_size == 1:
        yield f"{key}: needs rollout.vllm_tensor_parallel_size > 1, over whose ranks the experts are divided"
    elif shape is not None and not shape.num_experts:
        yield f"{key}: only with a mixture of experts; student.model = {recipe.student.model} is none"
