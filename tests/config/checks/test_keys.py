"""Each check names the keys that it reads: it is left out where one of them is wrong by itself."""

from collections import defaultdict
from typing import Any

import pytest
from pydantic import BaseModel
from recipe_workspace import DENSE, MIXTURE, Workspace

from megatron_gkd.checkpoint_format.cache_manifest import FILE, Manifest
from megatron_gkd.config import checks, commands, keys
from megatron_gkd.config.schema import Recipe, Section

ADAPTERS = "--tuner_type lora"
SELF = "--teacher_kind self --offload_teacher_model false --teacher_model"
SERVERS = "--engine vllm_server --vllm_server_urls http://a:1 --lmbda 1"
SEVERAL = "[{tags: [a], teacher_model: teacher}, {tags: [a], teacher_kind: none}]"

RECIPES = [
    "",
    "--tensor_model_parallel_size 1",
    "--global_batch_size 7",
    "--pipeline_model_parallel_size 2 --virtual_pipeline_model_parallel_size 2",
    "--pipeline_model_parallel_size 2 --tensor_model_parallel_size 1 --virtual_pipeline_model_parallel_size 2",
    "--packing",
    "--streaming --shuffle_buffer_size 5 --preprocessing_num_workers 2",
    "--shuffle_buffer_size 5 --group_by_length --num_generations 2 --lmbda 1",
    "--overlap_param_gather",
    "--attention_backend flash --dtype fp32",
    "--lr_warmup_iters 3",
    "--freeze_llm true --vit_lr 1",
    "--pipeline_model_parallel_size 2 --aligner_lr 1",
    "--eval_interval 1 --eval_iters 1",
    "--eval_interval 1 --eval_iters 1 --val_dataset [] --split_dataset_ratio 0.5",
    "--split_dataset_ratio 0.5",
    "--gkd_logits_topk 8 --gkd_topk_tail bucket",
    "--external_plugins plugin.py",
    "--engine vllm --vllm_max_model_len 99 --max_completion_length 99",
    "--max_prompt_length 99 --max_completion_length 500 --teacher_max_length 9 --lmbda 0",
    "--engine vllm --max_batch_tokens 9",
    "--system no.txt",
    '--engine vllm --vllm_enable_expert_parallel --vllm_limit_mm_per_prompt {"image":1}',
    f"{ADAPTERS} --engine vllm --vllm_tensor_parallel_size 2 --vllm_enable_expert_parallel --vllm_quantization fp8 "
    "--merge_dtype fp32",
    f"{SERVERS} --vllm_server_api_key_env K --teacher_model null --teacher_model_server http://a:1 "
    "--teacher_server_api_key_env L",
    "--offload_model --offload_optimizer --use_precision_aware_optimizer --dtype fp32",
    "--optimizer_cpu_offload --exp_avg_dtype bf16 --main_grads_dtype bf16 --distributed_optimizer false",
    "--main_grads_dtype bf16 --optimizer_offload_fraction 0.5",
    f"{ADAPTERS} --use_precision_aware_optimizer --lora_dtype fp32",
    "--teacher_kind none --teacher_states host --teacher_micro_batch_tokens 9",
    f"{SELF} null --teacher_micro_batch_tokens 9 --virtual_pipeline_model_parallel_size 2",
    SERVERS,
    f"{SERVERS} --weight_sync gloo",
    f"{SELF} null",
    f"{SELF} student --teacher_ema 0.5",
    f"{SELF} null --teacher_max_length 9999",
    "--teacher_kind none --lmbda 1",
    "--truncation_strategy split --streaming",
    "--teacher_model null --teacher_model_server http://a:1 --gkd_logits_topk 8 --gkd_topk_tail bucket",
    "--teacher_model null",
    "--teacher_model null --teacher_ema 0.5",
    "--teacher_model null --streaming",
    "--teacher_model null --teacher_cache cache --lmbda 1",
    "--teacher_model null --teacher_cache cache --gkd_topk_tail bucket --gkd_logits_topk 8",
    "--teacher_model null --teacher_cache cache --teacher_server_api_key_env K",
    "--teacher_adapters a --teacher_max_length 9",
    "--model_revision v1 --teacher_model_revision v1 --use_hf false",
    "--use_hf false --teacher_model null --teacher_cache cache",
    "--teacher_model_revision v1 --teacher_model null --teacher_cache cache",
    "--teacher_model_revision v1 --teacher_model null --teacher_model_server http://a:1",
    ADAPTERS,
    f"{ADAPTERS} --use_dora --lora_dtype bf16 --modules_to_save a --init_lora_weights x --adapters a",
    f"{ADAPTERS} --target_regex .*o_proj --target_modules o_proj",
    f"{ADAPTERS} --merge_dtype bf16 --dtype fp32",
    f"{ADAPTERS} {SERVERS} --merge_dtype bf16 --lora_dtype bf16",
    f"{ADAPTERS} {SERVERS} --weight_sync lora --merge_dtype bf16",
    f"{ADAPTERS} --expert_tensor_parallel_size 2",
    f"{ADAPTERS} --moe_grouped_gemm false",
    "--recompute_modules mlp",
    "--teacher_fp8_format hybrid",
    "--fp8_format hybrid --lmbda 1 --dtype fp32 --moe_shared_expert_overlap true",
]


class Recorder:
    """A section whose keys are recorded when they are read; its properties and methods read them too."""

    def __init__(self, section: Section, read: set[str]) -> None:
        self._section, self._read = section, read

    def __getattr__(self, name: str) -> Any:
        kind = type(self._section)
        if name in kind.model_fields:
            if name in keys.SECTION_OF:
                self._read.add(name)
                return getattr(self._section, name)
            if name in keys.NULLABLE_SECTIONS:
                self._read.add("tuner_type")  # decides whether there is a section lora
            value = getattr(self._section, name)
            return Recorder(value, self._read) if isinstance(value, BaseModel) else value
        found = getattr(kind, name)
        return found.fget(self) if isinstance(found, property) else found.__get__(self)


@pytest.fixture(scope="module")
def read_keys(tmp_path_factory) -> dict[checks.Check, set[str]]:
    """The keys that each check reads, over all recipes here and both kinds of models."""
    workspace = Workspace(tmp_path_factory.mktemp("recipes"))
    read: dict[checks.Check, set[str]] = defaultdict(set)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.folder)
        (workspace.folder / "cache").mkdir()
        (workspace.folder / "cache" / FILE).write_text(Manifest(4, 0.7, "t", "big", 320).text())
        for recipe in recipes(workspace):
            for check in (*checks.CHECKS, *COMMANDS):
                list(check.find(Recorder(recipe, read[check]), 2))
    return read


def recipes(workspace: Workspace):
    for model in (DENSE, MIXTURE):
        workspace.model("student", model)
        yield from (valid_recipe(workspace, *text.split()) for text in RECIPES)
        for key in ("t", "dataset"):
            yield valid_recipe(workspace, "--teacher_tag_key", key, "--teachers", SEVERAL)


def valid_recipe(workspace: Workspace, *overrides: str) -> Recipe:
    """Load a recipe that the schema allows, without the checks."""
    none = checks.CommandChecks(has_own=True)
    return workspace.load(*overrides, command=none)


COMMANDS = tuple(
    check
    for command in (commands.SCORES, commands.STUDENT_GENERATES, commands.TEACHER_GENERATES)
    for check in command.extra
)


@pytest.mark.parametrize("check", [*checks.CHECKS, *dict.fromkeys(COMMANDS)], ids=lambda check: check.find.__name__)
def test_a_check_names_the_keys_that_it_reads(check, read_keys):
    assert set(check.keys) == read_keys[check]


def test_the_order_of_reports_is_that_of_the_modules():
    modules = [check.find.__module__.rpartition(".")[2] for check in checks.CHECKS]
    assert list(dict.fromkeys(modules)) == [
        *("teacher", "cache", "distill", "rollout", "api_keys", "lengths", "layout", "training", "attention"),
        *("megatron", "memory", "lora", "vision", "data", "streaming", "output", "hubs", "model", "cluster"),
    ]
    assert modules == sorted(modules, key=list(dict.fromkeys(modules)).index)


def test_checks_have_names_of_their_own():
    names = [(check.find.__module__, check.find.__name__) for check in checks.CHECKS]
    assert len(names) == len(set(names))
