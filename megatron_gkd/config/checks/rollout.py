"""Whether the keys of the rollouts go together."""

import importlib.util
from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.schema import Recipe


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


@check("engine", "weight_sync", "weight_sync_dir", "steps_ahead")
def server_keys_go_with_servers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys of rollout servers beside another engine."""
    section = recipe.rollout
    if section.engine != "vllm_server":
        for leaf, default in (("weight_sync", "folder"), ("weight_sync_dir", None), ("steps_ahead", 0)):
            if getattr(section, leaf) != default:
                yield f"rollout.{leaf} = {getattr(section, leaf)}: only with rollout.engine = vllm_server"
    elif section.weight_sync not in ("folder", "lora") and section.weight_sync_dir is not None:
        yield f"rollout.weight_sync_dir = {section.weight_sync_dir}: only with rollout.weight_sync = folder or lora"


@check("engine", "vllm_tensor_parallel_size")
def engines_divide_the_ranks(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Find engines of vLLM whose ranks do not divide those of the run."""
    size = recipe.rollout.vllm_tensor_parallel_size
    if recipe.rollout.engine == "vllm" and world_size % size:
        yield f"rollout.vllm_tensor_parallel_size = {size}: must divide the number of processes ({world_size})"


@check("vllm_max_model_len", "max_length")
def samples_fit_max_length(recipe: Recipe, _: int) -> Iterator[str]:
    """Find samples that may be longer than a sequence."""
    length = recipe.rollout.vllm_max_model_len
    if length is not None and length > recipe.data.max_length:
        yield f"rollout.vllm_max_model_len = {length}: must be <= data.max_length ({recipe.data.max_length})"


@check("engine", needs_files=True)
def vllm_is_installed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find vLLM in the training processes without its package."""
    if recipe.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        yield "rollout.engine = vllm: needs vLLM beside the trainer, which is not installed here (pip install vllm)"
