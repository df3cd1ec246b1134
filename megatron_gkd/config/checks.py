"""Cross-checks: what a schema of single keys can't say.

Each check names the leaves that it reads, and is left out when one of them is wrong in itself: one mistake, one line.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_gkd.config import attention_checks, cache_checks, lora_checks, model_checks, output_checks, teacher_checks
from megatron_gkd.config.divergences import FAMILIES
from megatron_gkd.config.schema import Recipe

LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


@dataclass(frozen=True)
class Check:
    """A check of the recipe and the number of processes, and the leaves that it reads."""

    leaves: tuple[str, ...]
    find: Callable[[Recipe, int], Iterator[str]]
    needs_files: bool = False


@dataclass(frozen=True)
class CommandChecks:
    """What a command asks of a recipe beyond what `train` does, and which checks of `CHECKS` it leaves out.

    has_own: it makes those of `extra` alone.
    """

    extra: tuple[Check, ...] = ()
    left_out: tuple[Callable[[Recipe, int], Iterator[str]], ...] = ()
    has_own: bool = False


TRAIN = CommandChecks()


def run(
    recipe: Recipe, *, world_size: int, require_paths: bool, doubtful: set[str], command: CommandChecks = TRAIN
) -> list[str]:
    """All problems of a recipe whose sections are valid, except for the leaves in `doubtful`.

    command: what is asked of the recipe for this command.
    """
    return [
        problem
        for check in (*(() if command.has_own else CHECKS), *command.extra)
        if doubtful.isdisjoint(check.leaves) and (require_paths or not check.needs_files)
        if check.find not in command.left_out
        for problem in check.find(recipe, world_size)
    ]


def _on_policy(recipe: Recipe, _: int) -> Iterator[str]:
    if recipe.distill.lmbda > 0 and recipe.teacher.kind == "none":
        yield f"distill.lmbda = {recipe.distill.lmbda}: must be 0 with teacher.kind = none, which judges no samples"


def _beta(recipe: Recipe, _: int) -> Iterator[str]:
    family = FAMILIES[recipe.distill.divergence]
    if family.at(recipe.distill.beta) is None:
        name = recipe.distill.divergence
        yield f"distill.beta = {recipe.distill.beta}: must be {family.allowed} with divergence = {name}"


def _tail(recipe: Recipe, _: int) -> Iterator[str]:
    if recipe.distill.gkd_topk_tail == "bucket" and recipe.distill.gkd_logits_topk is None:
        yield "distill.gkd_topk_tail = bucket: only with gkd_logits_topk"


def _servers_are_named(recipe: Recipe, _: int) -> Iterator[str]:
    engine, urls = recipe.rollout.engine, recipe.rollout.vllm_server_urls
    if engine == "vllm_server" and not urls:
        yield "rollout.vllm_server_urls = []: must name a server where rollout.engine = vllm_server"
    if engine != "vllm_server" and urls:
        yield f"rollout.vllm_server_urls = {list(urls)}: only with rollout.engine = vllm_server"
    if len(set(urls)) < len(urls):
        yield f"rollout.vllm_server_urls = {list(urls)}: must name every server once"


def _server_options(recipe: Recipe, _: int) -> Iterator[str]:
    section = recipe.rollout
    if section.engine != "vllm_server":
        for leaf, default in (("weight_sync", "folder"), ("weight_sync_dir", None), ("steps_ahead", 0)):
            if getattr(section, leaf) != default:
                yield f"rollout.{leaf} = {getattr(section, leaf)}: only with rollout.engine = vllm_server"
    elif section.weight_sync not in ("folder", "lora") and section.weight_sync_dir is not None:
        yield f"rollout.weight_sync_dir = {section.weight_sync_dir}: only with rollout.weight_sync = folder or lora"


def _vllm_is_installed(recipe: Recipe, _: int) -> Iterator[str]:
    if recipe.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        yield "rollout.engine = vllm: needs vLLM beside the trainer, which is not installed here (pip install vllm)"


def _vllm_ranks(recipe: Recipe, world_size: int) -> Iterator[str]:
    size = recipe.rollout.vllm_tensor_parallel_size
    if recipe.rollout.engine == "vllm" and world_size % size:
        yield f"rollout.vllm_tensor_parallel_size = {size}: must divide the number of processes ({world_size})"


def _vllm_length(recipe: Recipe, _: int) -> Iterator[str]:
    length = recipe.rollout.vllm_max_model_len
    if length is not None and length > recipe.data.max_length:
        yield f"rollout.vllm_max_model_len = {length}: must be <= data.max_length ({recipe.data.max_length})"


def _model_ranks(recipe: Recipe) -> tuple[str, int]:
    """The three sizes of one replica as a product in words, and their product."""
    p = recipe.parallel
    sizes = (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size)
    product = sizes[0] * sizes[1] * sizes[2]
    return f"{' x '.join(LAYOUT)} = {' x '.join(map(str, sizes))} = {product}", product


def _layout_divides(recipe: Recipe, world_size: int) -> Iterator[str]:
    text, ranks = _model_ranks(recipe)
    if world_size % ranks:
        yield f"parallel.{text}: must divide the number of processes ({world_size})"


def _experts_divide(recipe: Recipe, world_size: int) -> Iterator[str]:
    p = recipe.parallel
    sizes = (p.expert_tensor_parallel_size, p.expert_model_parallel_size, p.pipeline_model_parallel_size)
    ranks = sizes[0] * sizes[1] * sizes[2]
    if world_size % ranks:
        yield (
            "parallel.expert_tensor_parallel_size x expert_model_parallel_size x pipeline_model_parallel_size = "
            f"{' x '.join(map(str, sizes))} = {ranks}: must divide the number of processes ({world_size})"
        )


def _batch_divides(recipe: Recipe, world_size: int) -> Iterator[str]:
    _, ranks = _model_ranks(recipe)
    if world_size % ranks:
        return  # reported by _layout_divides; there is no data-parallel size
    replicas = world_size // ranks
    rows = recipe.train.micro_batch_size * replicas
    if recipe.train.global_batch_size % rows:
        yield (
            f"train.global_batch_size = {recipe.train.global_batch_size}: must be a multiple of micro_batch_size x "
            f"data-parallel size = {recipe.train.micro_batch_size} x {replicas} = {rows}"
        )
        return
    p = recipe.parallel
    microbatches = recipe.train.global_batch_size // rows
    if p.virtual_pipeline_model_parallel_size and microbatches % p.pipeline_model_parallel_size:
        yield (
            f"train.global_batch_size = {recipe.train.global_batch_size}: makes {microbatches} microbatches on each "
            "data-parallel rank; virtual pipeline stages need a multiple of pipeline_model_parallel_size "
            f"({p.pipeline_model_parallel_size})"
        )


def _virtual_stages(recipe: Recipe, _: int) -> Iterator[str]:
    p = recipe.parallel
    if p.virtual_pipeline_model_parallel_size and p.pipeline_model_parallel_size == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size = {p.virtual_pipeline_model_parallel_size}: "
            "needs pipeline_model_parallel_size > 1"
        )


def _packing(recipe: Recipe, _: int) -> Iterator[str]:
    if recipe.data.packing and recipe.train.micro_batch_size != 1:
        yield (
            f"train.micro_batch_size = {recipe.train.micro_batch_size}: must be 1 with data.packing, "
            "where max_length decides how many rows a microbatch holds"
        )


def _recompute(recipe: Recipe, _: int) -> Iterator[str]:
    p = recipe.parallel
    for leaf in ("recompute_method", "recompute_num_layers"):
        value = getattr(p, leaf)
        if p.recompute_granularity == "full" and value is None:
            yield f"parallel.{leaf} = null: must be set with recompute_granularity full"
        if p.recompute_granularity != "full" and value is not None:
            yield f"parallel.{leaf} = {value}: only with recompute_granularity full"


def _overlap(recipe: Recipe, _: int) -> Iterator[str]:
    p = recipe.parallel
    for leaf in ("distributed_optimizer", "overlap_grad_reduce"):
        if p.overlap_param_gather and not getattr(p, leaf):
            yield f"parallel.overlap_param_gather = true: needs {leaf}"


def _length_of_run(recipe: Recipe, _: int) -> Iterator[str]:
    iters, epochs = recipe.train.train_iters, recipe.train.num_train_epochs
    if (iters is None) == (epochs is None):
        which = "null" if iters is None else "both set"
        yield f"train.train_iters, train.num_train_epochs = {which}: exactly one of the two must be set"


def _learning_rate(recipe: Recipe, _: int) -> Iterator[str]:
    if recipe.train.min_lr > recipe.train.lr:
        yield f"train.min_lr = {recipe.train.min_lr}: must be <= lr ({recipe.train.lr})"


def _warmup(recipe: Recipe, _: int) -> Iterator[str]:
    t = recipe.train
    if t.lr_warmup_iters and t.lr_warmup_fraction is not None:
        key = f"train.lr_warmup_fraction = {t.lr_warmup_fraction}"
        yield f"{key}: must be null beside lr_warmup_iters ({t.lr_warmup_iters})"
    if t.train_iters is not None and t.lr_warmup_iters >= t.train_iters:
        yield f"train.lr_warmup_iters = {t.lr_warmup_iters}: must be < train_iters ({t.train_iters})"


def _validation(recipe: Recipe, _: int) -> Iterator[str]:
    for leaf in ("eval_interval", "eval_iters"):
        if getattr(recipe.train, leaf) is not None and not recipe.data.val_dataset:
            yield f"train.{leaf} = {getattr(recipe.train, leaf)}: needs data.val_dataset"


def _missing(key: str, paths: list[str], what: str) -> Iterator[str]:
    yield from (f"{key} = {path}: must be {what} that exists" for path in paths if not Path(path).exists())


def _dataset_exists(recipe: Recipe, _: int) -> Iterator[str]:
    yield from _missing("data.dataset", [entry.path for entry in recipe.data.dataset], "a file or folder")


def _val_dataset_exists(recipe: Recipe, _: int) -> Iterator[str]:
    yield from _missing("data.val_dataset", [entry.path for entry in recipe.data.val_dataset], "a file or folder")


def _plugins_exist(recipe: Recipe, _: int) -> Iterator[str]:
    for path in recipe.data.external_plugins:
        if not (path.endswith(".py") and Path(path).is_file()):
            yield f"data.external_plugins = {path}: must be a .py file that exists"


def _output_is_writable(recipe: Recipe, _: int) -> Iterator[str]:
    key, folder = f"output.output_dir = {recipe.output.output_dir}", Path(recipe.output.output_dir).absolute()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir():
        yield f"{key}: {parent} is a file; must be a folder, or one that can be made"
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield f"{key}: {parent} is not writable; must be a folder that is, or one that can be made"


LAYOUT_CHECKS = (
    Check(LAYOUT, _layout_divides),
    Check(
        ("expert_tensor_parallel_size", "expert_model_parallel_size", "pipeline_model_parallel_size"), _experts_divide
    ),
    Check(("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_size"), _virtual_stages),
)
CHECKS = (
    Check(teacher_checks.LEAVES, teacher_checks.teachers_are_named),
    Check(
        (*teacher_checks.LEAVES, "gkd_logits_topk", "gkd_topk_tail", "temperature"), teacher_checks.servers_tell_enough
    ),
    Check((*teacher_checks.LEAVES, "teacher_tag_key"), teacher_checks.teachers_share_rows),
    Check(teacher_checks.SELF_LEAVES, teacher_checks.self_is_the_student),
    Check(teacher_checks.LEAVES, cache_checks.caches_are_named),
    Check((*teacher_checks.LEAVES, "lmbda"), cache_checks.caches_suit_on_policy),
    Check(("lmbda", "kind"), _on_policy),
    Check(("divergence", "beta"), _beta),
    Check(("gkd_topk_tail", "gkd_logits_topk"), _tail),
    Check(("engine", "vllm_server_urls"), _servers_are_named),
    Check(("engine", "weight_sync", "weight_sync_dir", "steps_ahead"), _server_options),
    Check(("engine", "vllm_tensor_parallel_size"), _vllm_ranks),
    Check(("vllm_max_model_len", "max_length"), _vllm_length),
    Check(("engine",), _vllm_is_installed, needs_files=True),
    *LAYOUT_CHECKS,
    Check((*LAYOUT, "virtual_pipeline_model_parallel_size", "global_batch_size", "micro_batch_size"), _batch_divides),
    Check(("packing", "micro_batch_size"), _packing),
    Check(("recompute_granularity", "recompute_method", "recompute_num_layers"), _recompute),
    Check(("overlap_param_gather", "distributed_optimizer", "overlap_grad_reduce"), _overlap),
    Check(("attn", "dtype"), attention_checks.attention_fits_dtype),
    Check(("attn",), attention_checks.transformer_engine_is_installed, needs_files=True),
    Check((*lora_checks.LEAVES, "tuner_type", "dtype"), lora_checks.keys_go_together),
    Check(("merge_dtype", "dtype", "engine", "weight_sync", "tuner_type"), lora_checks.rollouts_take_adapters),
    Check(
        (*lora_checks.LEAVES, "model", "expert_tensor_parallel_size", "weight_sync"),
        lora_checks.fits_model,
        needs_files=True,
    ),
    Check(("train_iters", "num_train_epochs"), _length_of_run),
    Check(("min_lr", "lr"), _learning_rate),
    Check(("lr_warmup_iters", "lr_warmup_fraction", "train_iters"), _warmup),
    Check(("eval_interval", "eval_iters", "val_dataset"), _validation),
    Check(("dataset",), _dataset_exists, needs_files=True),
    Check(("val_dataset",), _val_dataset_exists, needs_files=True),
    Check(("external_plugins",), _plugins_exist, needs_files=True),
    Check(("output_dir",), _output_is_writable, needs_files=True),
    Check(
        ("output_dir", "model", "adapters", *teacher_checks.LEAVES, "dataset", "val_dataset"),
        output_checks.sources_are_kept,
        needs_files=True,
    ),
    Check(("model",), model_checks.student_is_readable, needs_files=True),
    Check(teacher_checks.LEAVES, model_checks.teachers_are_readable, needs_files=True),
    Check(teacher_checks.LEAVES, model_checks.teacher_adapters_fit, needs_files=True),
    Check(
        (*teacher_checks.LEAVES, "gkd_logits_topk", "gkd_topk_tail", "temperature"),
        cache_checks.caches_fit,
        needs_files=True,
    ),
    Check(
        (
            *("model", *teacher_checks.LEAVES, "max_length", "teacher_max_length", "sequence_parallel"),
            "gkd_logits_topk",
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size", "engine", "vllm_tensor_parallel_size"),
        ),
        model_checks.models_fit,
        needs_files=True,
    ),
)
