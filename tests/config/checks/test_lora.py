"""The section `lora` of a recipe: when there is one, its defaults, and what it refuses."""

import pytest
from recipe_workspace import DENSE, MIXTURE

JOINED = "are one matrix in Megatron-Core (linear_qkv) and share one A; name all of them or none"


def edit(workspace, *, lora=None, train=None):
    """Add a section `lora` and keys of `train` to the recipe, as YAML."""
    text = workspace.recipe.read_text()
    if train is not None:
        text = text.replace("lr: 1.0e-4, ", train)
    workspace.recipe.write_text(text if lora is None else f"{text}lora: {lora}\n")


@pytest.mark.parametrize(
    ("lora", "train", "flags", "has_adapters", "lr"),
    [
        (None, "", [], False, 1e-5),
        ("null", "", [], False, 1e-5),
        ("{}", "", [], True, 1e-4),
        ("{lora_rank: 16}", "", [], True, 1e-4),
        ("{lora_rank: 16}", "lr: 3e-5, ", [], True, 3e-5),
        (None, "tuner_type: lora, ", [], True, 1e-4),
        (None, "tuner_type: full, ", [], False, 1e-5),
        ("{tuner_type: lora}", "", [], True, 1e-4),
        ("{tuner_type: full}", "", [], False, 1e-5),
        (None, "", ["--tuner_type", "lora"], True, 1e-4),
        (None, "", ["--lora_rank", "16"], True, 1e-4),
        (None, "", ["--lora.target_modules", "o_proj", "down_proj", "--lr", "2e-4"], True, 2e-4),
    ],
)
def test_when_adapters_are_trained(workspace, lora, train, flags, has_adapters, lr):
    edit(workspace, lora=lora, train=train)
    recipe = workspace.load(*flags)
    assert (recipe.lora is not None) == has_adapters
    assert recipe.train.lr == lr
    workspace.recipe.write_text(recipe.to_yaml())
    assert workspace.load() == recipe


def test_the_defaults_are_those_of_ms_swift(workspace):
    lora = workspace.load("--tuner_type", "lora").lora
    assert (lora.lora_rank, lora.lora_alpha, lora.lora_dropout, lora.lora_bias) == (8, 32, 0.05, "none")
    assert (lora.target_modules, lora.adapters, lora.merge_lora) == (("all-linear",), None, False)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--tuner_type full --lora_rank 4", "train.tuner_type = full: must be lora or null beside the section lora; or "
         "leave that section out"),
        ("--use_dora", "lora.use_dora = true: must be false; DoRA is not supported by mcore-bridge"),
        ("--init_lora_weights pissa", "lora.init_lora_weights = pissa: must be one of kaiming, gaussian; others "
         "(pissa, olora, corda, eva, loftq) change the base's weights or need data"),
        ("--modules_to_save lm_head", "lora.modules_to_save = ['lm_head']: must be empty; only adapters are trained "
         "beside frozen weights"),
        ("--dtype fp32 --lora_dtype bf16", "lora.lora_dtype = bf16: must be fp32 or null with train.dtype = fp32"),
        ("--lora_bias all", "lora.lora_bias = all: must be one of none"),
        ("--lora_rank 0", "lora.lora_rank = 0: must be an integer >= 1"),
        ("--lora_dropout 1", "lora.lora_dropout = 1: must be a number in [0, 1)"),
        ("--target_modules q_proj", f"lora.target_modules = [q_proj]: q_proj, k_proj and v_proj {JOINED}"),
        ("--target_modules router", "lora.target_modules = router: can't be a target, as adapters of a router could "
         "not be switched off or merged; remove it"),
        ("--target_regex .*o_proj --target_modules o_proj", "lora.target_regex = .*o_proj: not beside target_modules; "
         "set one of the two"),
        ("--tuner_type dora", "train.tuner_type = dora: must be one of lora, full, or null"),
        ("--lora_ranks 4", "--lora_ranks: unknown key; did you mean lora.lora_rank?"),
        ("--adapters nowhere", "lora.adapters = nowhere: must be a folder of PEFT adapters; there is no "
         "adapter_config.json in it"),
    ],
)  # fmt: skip
def test_refused(workspace, flags, problem):
    assert workspace.problems(*flags.split()) == [problem]


def test_a_mixture_takes_adapters_on_whole_experts(workspace):
    workspace.model("student", MIXTURE)
    assert workspace.problems("--tuner_type", "lora") == []
    split = ["--tuner_type", "lora", "--expert_tensor_parallel_size", "2"]
    problem = "parallel.expert_tensor_parallel_size = 2: must be 1 with adapters on experts"
    assert workspace.problems(*split) == [problem]
    assert workspace.problems(*split, "--target_modules", "linear_qkv") == []


@pytest.mark.parametrize("lora", ["[1]", "yes", "8"])
def test_the_section_is_a_mapping(workspace, lora):
    edit(workspace, lora=lora)
    (problem,) = workspace.problems()
    assert problem.startswith("lora = ") and "must be a mapping with the keys lora_rank, " in problem


SERVER = "--lmbda 1 --engine vllm_server --vllm_server_urls http://a:1"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (f"{SERVER} --weight_sync lora",
         "rollout.weight_sync = lora: only with adapters (section lora); use folder, nccl or gloo"),
        ("--merge_dtype fp32", "lora.merge_dtype = fp32: only with rollout.engine = vllm or vllm_server"),
        (f"{SERVER} --weight_sync lora --merge_dtype fp32",
         "lora.merge_dtype = fp32: not with rollout.weight_sync = lora, which merges nothing"),
        (f"{SERVER} --merge_dtype bf16 --dtype fp32",
         "lora.merge_dtype = bf16: must be fp32 or null where train.dtype = fp32"),
    ],
)  # fmt: skip
def test_rollouts_that_can_not_take_adapters(workspace, flags, problem):
    assert workspace.problems(*flags.split()) == [problem]


def test_a_mixture_is_sampled_from_merged_weights(workspace):
    workspace.model("student", MIXTURE)
    flags = f"{SERVER} --tuner_type lora --expert_model_parallel_size 2".split()
    assert workspace.problems(*flags) == []
    (problem,) = workspace.problems(*flags, "--weight_sync", "lora")
    assert problem.startswith("rollout.weight_sync = lora: not with a mixture-of-experts student; use folder, nccl")
    workspace.model("student", DENSE)
    assert workspace.problems(*SERVER.split(), "--tuner_type", "lora", "--weight_sync", "lora") == []
