"""Layouts and engines that the layers of some models do not have."""

import pytest
from recipe_workspace import DENSE, MIXTURE

DELTA_NET = {
    **DENSE,
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"] * 4,
    "linear_num_key_heads": 4,
}
GPT_OSS = {**MIXTURE, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "intermediate_size": 32}


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize(
    ("model", "leaf", "problem"),
    [
        (DELTA_NET, "context_parallel_size", "must be 1 with the gated delta nets of KEY (NAME), for which "
         "Megatron-Core 0.16 has no context parallelism"),
        (GPT_OSS, "expert_tensor_parallel_size", "must be 1, as Megatron-Core 0.16 does not split experts with biases, "
         "which KEY (NAME) has; expert_model_parallel_size can be more"),
    ],
)  # fmt: skip
def test_refused_layouts(workspace, name, model, leaf, problem):
    workspace.model("student", MIXTURE)
    workspace.model(name, model)
    key = {"student": "student.model", "teacher": "teacher.teacher_model"}[name]
    arguments = (f"--{leaf}", "2")
    expected = f"parallel.{leaf} = 2: {problem}".replace("KEY", key).replace("NAME", name)
    assert workspace.problems(*arguments, world_size=4) == [expected]
    workspace.model(name, MIXTURE)
    assert workspace.problems(*arguments, world_size=4) == []


def test_the_embedded_engine_has_no_delta_nets(workspace):
    workspace.model("student", DELTA_NET)
    assert workspace.problems("--lmbda", "0.5") == [
        "rollout.engine = megatron: must be vllm or vllm_server with the gated delta nets of student.model (student), "
        "of which the embedded engine keeps no states"
    ]
    assert workspace.problems() == [], "nothing is sampled"
    server = ("--engine", "vllm_server", "--vllm_server_urls", '["http://a:1"]')
    assert workspace.problems("--lmbda", "0.5", *server) == []
    workspace.model("student", DENSE)
    workspace.model("teacher", DELTA_NET)
    assert workspace.problems("--lmbda", "0.5") == [], "teachers do not sample"
