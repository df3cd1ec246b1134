"""Layouts and adapters that a family of models does not have are refused before a model is built."""

import json

import pytest
from families.text import CASES, SIZES
from recipe_workspace import DENSE

from megatron_gkd.checkpoint_format.families import FAMILIES
from megatron_gkd.checkpoint_format.model_shape import read_shape


def config_of(name, tmp_path, **changes):
    """Return config.json of a case of `families.text`, with the vocabulary and positions of a recipe's tests."""
    import transformers

    (case,) = [case for case in CASES if case.name == name]
    sizes = {**SIZES, "vocab_size": DENSE["vocab_size"], "max_position_embeddings": 4096}
    config = getattr(transformers, f"{case.hf_class}Config")(**{**sizes, **case.values, **changes})
    config.architectures = [FAMILIES[name.split(",")[0]].architectures[0]]
    config.save_pretrained(tmp_path / "written")
    found = json.loads((tmp_path / "written/config.json").read_text())
    return found | {"model_type": case.written_as or found["model_type"]}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_family_passes_the_checks(case, workspace, tmp_path):
    for name in ("student", "teacher"):
        workspace.model(name, config_of(case.name, tmp_path))
    arguments = ["--sequence_parallel=true", "--pipeline_model_parallel_size=2"]
    assert workspace.problems(*arguments, world_size=4) == []


@pytest.mark.parametrize(
    ("name", "changes", "arguments", "problem"),
    [
        ("deepseek_v3", {"intermediate_size": 47}, [], "tensor_model_parallel_size = 2: must divide the 47 feed-forw"),
        ("glm4_moe", {"moe_intermediate_size": 23}, [], "tensor_model_parallel_size = 2: must divide the 23 feed-for"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 9}, [], "tensor_model_parallel_size = 2: must divide the 9"),
        ("qwen3_next", {"linear_num_key_heads": 1}, [], "tensor_model_parallel_size = 2: must divide the 1 key heads"),
        ("qwen3_next", {}, ["--context_parallel_size=2"], "context_parallel_size = 2: must be 1 with the gated delta"),
        ("gpt_oss", {"num_local_experts": 3}, ["--expert_model_parallel_size=2"], "expert_model_parallel_size = 2: m"),
    ],
)  # fmt: skip
def test_a_layout_must_divide_the_family_s_sizes(name, changes, arguments, problem, workspace, tmp_path):
    workspace.model("student", config_of(name, tmp_path, **changes))
    found = workspace.problems(*arguments, world_size=4)
    assert found and all(one.startswith("parallel.") for one in found) and found[0].startswith(f"parallel.{problem}")


@pytest.mark.parametrize("name", ["qwen3_moe, some layers dense", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_adapters_are_refused_where_a_layer_has_none(name, workspace, tmp_path):
    workspace.model("student", config_of(name, tmp_path))
    (found,) = workspace.problems("--tuner_type=lora")
    family = name.split(",")[0]
    expected = f"train.tuner_type = lora: adapters on all linear layers of this {family} model are not supported; use"
    assert found.startswith(expected)


def test_the_embedded_engine_keeps_no_states_of_delta_nets(workspace, tmp_path):
    workspace.model("student", config_of("qwen3_next", tmp_path))
    (found,) = workspace.problems("--lmbda=0.5", "--engine=megatron", "--max_completion_length=8")
    assert found.startswith("rollout.engine = megatron: must be vllm or vllm_server with the gated delta nets of stud")


@pytest.mark.parametrize(
    ("arguments", "is_refused"),
    [
        (["--engine=vllm"], True),
        (["--engine=vllm_server", "--vllm_server_urls=http://localhost:1"], True),
        (["--engine=megatron"], False),
    ],
)
def test_vllm_gets_no_weights_of_a_student_with_quantized_files(arguments, is_refused, workspace, tmp_path):
    workspace.model("student", config_of("qwen3", tmp_path) | {"quantization_config": {"quant_method": "fp8"}})
    found = workspace.problems("--lmbda=0.5", "--max_completion_length=8", *arguments)
    expected = f"rollout.engine = {arguments[0].partition('=')[2]}: must be megatron with the quantized files of stud"
    assert any(problem.startswith(expected) for problem in found) == is_refused
    assert is_refused or found == []


REFUSED = [
    ("llama", {"attention_bias": True}, "attention_bias = true: is not supported; must be false"),
    ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func = "softmax": is not supported; must be "sigmoid"'),
    ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob = false: is not supported with sigmoid scores; must"),
    ("deepseek_v3", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1: is not supported with sigmoid scores; must"),
    ("deepseek_v3", {"n_group": 4, "topk_group": 2}, "topk_group = 2: Megatron-Core scores a group by"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "awq"}}, "quantization_config = {"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2}, 'topk_method = "group_limited_greedy": '),
    ("dots1", {"norm_topk_prob": False}, "norm_topk_prob = false: is not supported with sigmoid scores; must be true"),
    ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {"),
    ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm = false: is not supported; must be true"),
    ("hy_v3", {"qk_norm": False}, "qk_norm = false: is not supported; must be true"),
    ("seed_oss", {"attention_out_bias": True}, "attention_out_bias = true: is not supported; must be false"),
    ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types = ["),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0: is not supported; must be null"),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, 'mlp_layer_types = ["sparse"]: must be a list with one entry'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "problem"), REFUSED)
def test_a_value_that_megatron_does_not_compute_is_refused(name, changes, problem, workspace, tmp_path):
    workspace.model("student", {**config_of(name, tmp_path), **changes})
    with pytest.raises(ValueError, match=r"its config\.json has ") as error:
        read_shape("student")
    assert str(error.value).startswith(f"its config.json has {problem}") and "\n" not in str(error.value)
