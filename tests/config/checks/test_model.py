import pytest
from recipe_workspace import DENSE, MIXTURE

from megatron_gkd.checkpoint_format.families import FAMILIES
from megatron_gkd.checkpoint_format.model_shape import read_shape

EP2 = ("--expert_model_parallel_size", "2")


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize(
    ("change", "arguments", "problem"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 1}, [], "parallel.tensor_model_parallel_size = 2: must "
         "divide the 9 attention heads of KEY (NAME)"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, [], "parallel.tensor_model_parallel_size = 2: must "
         "divide the 3 key-value heads of KEY (NAME), or be a multiple of them"),
        ({"intermediate_size": 47}, [], "parallel.tensor_model_parallel_size = 2: must divide the 47 feed-forward rows "
         "of KEY (NAME)"),
        ({"num_hidden_layers": 7}, ["--pipeline_model_parallel_size=2"], "parallel.pipeline_model_parallel_size = 2: "
         "must divide the 7 layers of KEY (NAME)"),
        ({"max_position_embeddings": 100}, [], "data.max_length = 512: must be <= the 100 positions of KEY (NAME)"),
        ({"vocab_size": 31}, ["--gkd_logits_topk=32"], "distill.gkd_logits_topk = 32: must be <= the 31 tokens of "
         "KEY (NAME)"),
        ({"architectures": ["GPT2LMHeadModel"]}, [], f"KEY = NAME: its architecture (GPT2LMHeadModel) must be of "
         f"one of the families {', '.join(FAMILIES)}"),
        ({"architectures": None}, [], f"KEY = NAME: its architecture (none named) must be of one of the families "
         f"{', '.join(FAMILIES)}"),
        ({**MIXTURE, "num_local_experts": 9}, EP2, "parallel.expert_model_parallel_size = 2: must divide the 9 experts "
         "of KEY (NAME)"),
        ({**MIXTURE, "moe_intermediate_size": 7}, ["--expert_tensor_parallel_size=2"],
         "parallel.expert_tensor_parallel_size = 2: must divide the 7 feed-forward rows of KEY (NAME)"),
    ],
)  # fmt: skip
def test_refused(workspace, name, change, arguments, problem):
    workspace.model(name, {**DENSE, **change})
    key = {"student": "student.model", "teacher": "teacher.teacher_model"}[name]
    assert workspace.problems(*arguments, world_size=4) == [problem.replace("KEY", key).replace("NAME", name)]


def test_topk_up_to_the_whole_vocabulary(workspace):
    workspace.model("teacher", {**DENSE, "vocab_size": 999})
    assert workspace.problems("--gkd_logits_topk", str(DENSE["vocab_size"])) == []
    assert workspace.problems("--gkd_logits_topk", "999", "--model", "org/name") == [], "a hub id is not known"


def test_vllm_ranks_divide_the_students_heads_only(workspace):
    workspace.model("student", {**DENSE, "num_attention_heads": 6})
    arguments = ("--engine", "vllm", "--vllm_tensor_parallel_size", "4")
    (problem,) = [line for line in workspace.problems(*arguments, world_size=4) if "not installed" not in line]
    assert problem == (
        "rollout.vllm_tensor_parallel_size = 4: must divide the 6 attention heads of student.model (student)"
    )
    assert workspace.problems(*arguments[2:], world_size=4) == [
        "rollout.vllm_tensor_parallel_size = 4: only with rollout.engine = vllm"
    ]


def test_few_key_value_heads_are_shared_by_ranks(workspace):
    workspace.model("student", {**DENSE, "num_key_value_heads": 1})
    assert workspace.problems() == []


def test_virtual_stages_divide_the_student_only(workspace):
    workspace.model("teacher", {**DENSE, "num_hidden_layers": 6})
    arguments = ("--pipeline_model_parallel_size", "2", "--virtual_pipeline_model_parallel_size", "4")
    assert workspace.problems(*arguments, world_size=4) == []
    workspace.model("student", {**DENSE, "num_hidden_layers": 6})
    assert workspace.problems(*arguments, world_size=4) == [
        "parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = 8: must divide the 6 layers of "
        "student.model (student)"
    ]


def test_expert_parallel_needs_experts_in_one_of_the_models(workspace):
    assert workspace.problems(*EP2, world_size=2) == [
        "parallel.expert_model_parallel_size = 2: must be 1, as no model here has experts"
    ]
    workspace.model("teacher", MIXTURE)
    assert workspace.problems(*EP2, world_size=2) == []
    assert workspace.problems(*EP2, "--teacher_model", "org/name", world_size=2) == [], "a hub id is not known"
    no_teacher = ["--teacher_kind", "none", "--teacher_model", "null", "--offload_teacher_model", "false"]
    assert workspace.problems(*EP2, *no_teacher, world_size=2) == [
        "parallel.expert_model_parallel_size = 2: must be 1, as no model here has experts"
    ]


def test_a_mixture_student_needs_sequence_parallel_beside_tensor_parallel(workspace):
    workspace.model("student", MIXTURE)
    assert workspace.problems("--sequence_parallel", "false") == [
        "parallel.sequence_parallel = false: must be true for a mixture-of-experts student with "
        "tensor_model_parallel_size 2"
    ]
    workspace.model("student", DENSE)
    workspace.model("teacher", MIXTURE)
    assert workspace.problems("--sequence_parallel", "false") == [], "Megatron's rule is for training only"


def test_both_spellings_of_the_number_of_experts(workspace):
    workspace.model("student", MIXTURE)
    former = {**MIXTURE, "num_experts": MIXTURE["num_local_experts"]}
    del former["num_local_experts"]
    workspace.model("teacher", former)
    assert read_shape("student") == read_shape("teacher")
    assert read_shape("student").num_experts == 8


def test_yarn_extends_the_positions(workspace):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    for key in ("rope_scaling", "rope_parameters"):
        workspace.model("student", {**DENSE, "max_position_embeddings": 100, key: yarn})
        assert read_shape("student").max_positions == 400
    unscaled = {"rope_type": "default", "rope_theta": 1e4}
    workspace.model("student", {**DENSE, "rope_parameters": unscaled})
    assert read_shape("student").max_positions == 4096


@pytest.mark.parametrize("hub_id", ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "org/na.me_2"])
def test_a_hub_id_is_not_read(workspace, hub_id):
    assert read_shape(hub_id) is None


@pytest.mark.parametrize("value", ["missing", "./org/name", "../name", "/org/name", "a/b/c", "org/", "."])
def test_what_is_no_hub_id_must_exist(workspace, value):
    with pytest.raises(ValueError, match="must be a Hugging Face folder"):
        read_shape(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "its config.json is not a model's configuration"),
        ("[]", "its config.json is not a model's configuration"),
        ('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "its config.json has no hidden_size"),
    ],
)
def test_a_broken_config_json(workspace, text, problem):
    (workspace.folder / "student" / "config.json").write_text(text)
    (found,) = workspace.problems()
    assert found.startswith(f"student.model = student: {problem}")


def test_a_folder_without_config_json(workspace):
    (workspace.folder / "student" / "config.json").unlink()
    assert workspace.problems() == [
        "student.model = student: must be a Hugging Face folder; there is no config.json in it"
    ]


def test_damaged_weights_of_a_local_model_are_found_before_any_process_starts(workspace):
    (workspace.folder / "teacher" / "model.safetensors").write_bytes(b"")
    (problem,) = workspace.problems()
    assert problem.startswith("teacher.teacher_model = teacher: model.safetensors: not a whole safetensors file of 0 ")


def test_a_feature_that_is_not_supported_is_found_before_any_process_starts(workspace):
    workspace.model("student", {**DENSE, "attention_bias": True})
    assert workspace.problems() == [
        "student.model = student: its config.json has attention_bias = true: is not supported; must be false"
    ]
