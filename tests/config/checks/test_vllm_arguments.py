"""The options of vLLM in the training processes: those that are decided elsewhere, and those that there are not."""

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest
from recipe_workspace import MIXTURE

from megatron_gkd.config import vllm_arguments

ENGINE = ("--engine", "vllm", "--lmbda", "1")
KEY = "rollout.vllm_engine_kwargs"


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A package of this name with the engine's arguments, which is not imported."""
    folder = tmp_path / "installed" / "vllm"
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "arg_utils.py").write_text(
        "class EngineArgs:\n    model: str = ''\n    max_num_batched_tokens: int = 0\n    block_size: int = 16\n"
    )
    found = SimpleNamespace(submodule_search_locations=[str(folder)])
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "vllm" else real(name))
    vllm_arguments.engine_arguments.cache_clear()
    yield
    vllm_arguments.engine_arguments.cache_clear()


def kwargs(**values) -> tuple[str, ...]:
    return (*ENGINE, "--vllm_engine_kwargs", json.dumps(values))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model", "x", "is decided by student.model; set that"),
        ("revision", "v1", "is decided by student.model_revision; set that"),
        ("dtype", "half", "is decided by train.dtype (or lora.merge_dtype); set that"),
        ("tensor_parallel_size", 2, "is decided by rollout.vllm_tensor_parallel_size; set that"),
        ("max_num_seqs", 2, "is decided by rollout.vllm_max_num_seqs; set that"),
        ("quantization", "fp8", "is decided by rollout.vllm_quantization; set that"),
        ("enable_sleep_mode", False, "is decided by rollout.sleep_level; set that"),
        ("mm_processor_kwargs", {}, "is decided by data.min_pixels and data.max_pixels; set that"),
        ("seed", 3, "would change the distribution that is sampled from, or its log-probabilities"),
        ("logprobs_mode", "processed_logprobs", "would change the distribution that is sampled from, or its log-prob"),
        ("speculative_config", {"method": "ngram"}, "would change the distribution that is sampled from"),
        ("max_logprobs", 0, "would change the distribution that is sampled from, or its log-probabilities"),
        ("quantization_config", {}, "quantizes otherwise than rollout.vllm_quantization, and the weights that arrive"),
        ("load_format", "auto", "is set by the trainer, which sends the weights"),
        ("cpu_offload_gb", 4, "is set by the trainer, which sends the weights"),
        ("worker_extension_cls", "a.B", "is set by the trainer, whose ranks vLLM runs in"),
        ("pipeline_parallel_size", 2, "is set by the trainer, whose ranks vLLM runs in"),
        ("enable_lora", True, "gives vLLM adapters, and it gets the student's weights with adapters merged"),
        ("kv_transfer_config", {}, "keeps keys and values of old weights in a cache that is not reset"),
        ("_api_process_count", 2, "is internal to vLLM"),
    ],
)
def test_an_argument_that_is_decided_elsewhere_is_refused(name, value, reason, workspace, vllm):
    (problem,) = workspace.problems(*kwargs(**{name: value}))
    assert problem.startswith(f"{KEY}: {name} = {value}: {reason}") and "\n" not in problem
    assert workspace.problems(*kwargs(**{name: value}), require_paths=False) == [problem], "without vLLM, too"


def test_a_token_of_the_hub_is_refused_and_not_shown(workspace, vllm):
    (problem,) = workspace.problems(*kwargs(hf_token="hf_secret"))
    assert problem.startswith(f"{KEY}: hf_token: must not be in a recipe") and "secret" not in problem


def test_an_argument_that_there_is_not_has_a_near_one(workspace, vllm):
    assert workspace.problems(*kwargs(max_num_batched_tokens=9, block_size=16)) == []
    assert workspace.problems(*kwargs(max_num_batched_token=9)) == [
        f"{KEY}: max_num_batched_token = 9: the installed vLLM has no such argument; did you mean "
        "max_num_batched_tokens?"
    ]
    assert workspace.problems(*kwargs(modle="x")) == [
        f"{KEY}: modle = x: the installed vLLM has no such argument; see vLLM's EngineArgs for their names"
    ], "one that is refused is not proposed"


def test_names_are_not_checked_where_vllm_is_not_installed(workspace, monkeypatch):
    monkeypatch.setattr(vllm_arguments, "engine_arguments", lambda: None)
    problems = workspace.problems(*kwargs(anything=1))
    assert not [problem for problem in problems if problem.startswith(KEY)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--vllm_max_num_seqs", "8"], "rollout.vllm_max_num_seqs = 8: only with rollout.engine = vllm"),
        (
            ["--vllm_enable_prefix_caching", "false"],
            "rollout.vllm_enable_prefix_caching = false: only with rollout.eng",
        ),
        (["--vllm_quantization", "fp8"], "rollout.vllm_quantization = fp8: only with rollout.engine = vllm"),
        (["--vllm_limit_mm_per_prompt", "{image: 1}"], "rollout.vllm_limit_mm_per_prompt = {'image': 1}: only with"),
        (["--vllm_engine_kwargs", "{block_size: 16}"], "rollout.vllm_engine_kwargs = {'block_size': 16}: only with"),
        (
            ["--engine", "vllm_server", "--vllm_server_urls", "http://a:1", "--vllm_enable_expert_parallel"],
            "rollout.vllm_enable_expert_parallel = true: only with rollout.engine = vllm; give it to the servers as",
        ),
        (
            [*ENGINE, "--dtype", "bf16", "--vllm_quantization", "awq"],
            "rollout.vllm_quantization = awq: must be a method that quantizes weights as they arrive: fp8, ",
        ),
        (
            [*ENGINE, "--dtype", "fp32", "--vllm_quantization", "fp8"],
            "rollout.vllm_quantization = fp8: needs train.dtype = bf16",
        ),
        (
            [*ENGINE, "--tuner_type", "lora", "--merge_dtype", "fp32", "--vllm_quantization", "fp8"],
            "rollout.vllm_quantization = fp8: needs lora.merge_dtype = bf16 or null",
        ),
        (
            [*ENGINE, "--vllm_limit_mm_per_prompt", "{images: 1}"],
            "rollout.vllm_limit_mm_per_prompt = {'images': 1}: images is unknown; allowed are image and video",
        ),
        (
            [*ENGINE, "--vllm_limit_mm_per_prompt", "{image: -1}"],
            "rollout.vllm_limit_mm_per_prompt = {'image': -1}: image must be >= 0",
        ),
        (
            [*ENGINE, "--vllm_enable_expert_parallel"],
            "rollout.vllm_enable_expert_parallel = true: needs rollout.vllm_tensor_parallel_size > 1",
        ),
        (
            [*ENGINE, "--vllm_tensor_parallel_size", "2", "--vllm_enable_expert_parallel"],
            "rollout.vllm_enable_expert_parallel = true: only with a mixture of experts; student.model = student",
        ),
    ],
)
def test_options_without_an_effect_are_refused(arguments, problem, workspace, vllm):
    (found,) = workspace.problems(*arguments)
    assert found.startswith(problem)


def test_what_fits_is_accepted(workspace, vllm):
    workspace.model("student", MIXTURE)
    options = ["--vllm_tensor_parallel_size", "2", "--vllm_enable_expert_parallel", "--vllm_quantization", "fp8"]
    options += ["--vllm_max_num_seqs", "8", "--vllm_enable_prefix_caching", "true", "--dtype", "bf16"]
    assert workspace.problems(*ENGINE, *options, "--vllm_limit_mm_per_prompt", "{image: 2, video: 0}") == []


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here: scripts/test.sh runs it")
def test_the_names_are_those_of_the_installed_vllm():
    """An argument that vLLM has renamed would be refused by nothing."""
    known = vllm_arguments.engine_arguments()
    assert known is not None and len(known) > 100
    assert set(vllm_arguments.REFUSED) - known == set()
    assert all(re.fullmatch("[a-z_0-9]+", name) for name in known)
