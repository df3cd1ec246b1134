"""Options of Megatron-Core's modules that are refused before any process starts."""

import pytest
from recipe_workspace import MIXTURE

from megatron_gkd.config.checks import attention, megatron

MOE = {**MIXTURE, "num_experts_per_tok": 2}
EXTRA = "megatron.megatron_extra_kwargs"
NO_TE = "Transformer Engine, which is not installed here; it must be auto or off"


@pytest.fixture
def installed(monkeypatch):
    """A function: pretend that these modules are installed, and no other."""

    def set_modules(*names: str) -> None:
        monkeypatch.setattr(megatron, "_is_installed", lambda name: name in names)
        has_te = "transformer_engine" in names
        for module in (attention, megatron):
            monkeypatch.setattr(module, "has_transformer_engine", lambda: has_te)

    set_modules()
    return set_modules


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--gradient_accumulation_fusion on", "megatron.gradient_accumulation_fusion = on: needs Transformer Engine or "
         "Apex' kernel fused_weight_gradient_mlp_cuda, which is not installed here; it must be auto or off"),
        ("--masked_softmax_fusion on", "megatron.masked_softmax_fusion = on: needs Apex' kernel "
         "scaled_upper_triang_masked_softmax_cuda, which is not installed here; it must be auto or off"),
        ("--apply_rope_fusion on", f"megatron.apply_rope_fusion = on: needs {NO_TE}"),
        ("--moe_permute_fusion on", "megatron.moe_permute_fusion = on: needs Transformer Engine 2.1 or newer, which is "
         "not installed here; it must be auto or off"),
        ("--moe_token_dispatcher_type flex", "megatron.moe_token_dispatcher_type = flex: needs DeepEP (deep_ep), which "
         "is not installed here; it must be alltoall or allgather"),
        ("--moe_shared_expert_overlap true --moe_token_dispatcher_type allgather",
         "megatron.moe_shared_expert_overlap = true: needs moe_token_dispatcher_type = alltoall; it is allgather"),
        ("--recompute_modules mlp",
         "parallel.recompute_modules = ['mlp']: only with recompute_granularity = selective"),
        ("--recompute_granularity selective --recompute_modules [mlp,mlp]",
         "parallel.recompute_modules = ['mlp', 'mlp']: must name every module once"),
        ("--recompute_granularity selective --recompute_modules moe", "parallel.recompute_modules = ['moe']: moe is a "
         "module of mixtures of experts; student.model (student) has none"),
        ("--recompute_granularity selective --recompute_modules mla_up_proj", "parallel.recompute_modules = "
         "['mla_up_proj']: mla_up_proj needs multi-latent attention, which student does not have"),
        ("--recompute_modules other", "parallel.recompute_modules = other: must be a list of modules (core_attn, "
         "moe_act, layernorm, mla_up_proj, mlp, moe, shared_experts)"),
        ("--freeze_moe_router true",
         "megatron.freeze_moe_router = true: student.model (student) has no experts; leave it out"),
        ("--moe_z_loss_coeff 0.1",
         "megatron.moe_z_loss_coeff = 0.1: student.model (student) has no experts; leave it out"),
        ("--fp8_format e4m3", "megatron.fp8_format = e4m3: needs Transformer Engine and a GPU of compute capability "
         "8.9 or higher; Transformer Engine is not installed here. Leave it out to compute in train.dtype"),
        ("--teacher_fp8_format hybrid", "teacher.teacher_fp8_format = hybrid: needs Transformer Engine and a GPU of "
         "compute capability 8.9 or higher; Transformer Engine is not installed here. Leave it out to compute in "
         "train.dtype"),
        ("--megatron_extra_kwargs {moe_router_fusoin:true}", f"{EXTRA}: moe_router_fusoin = true: Megatron-Core's "
         "TransformerConfig has no such field; did you mean moe_router_fusion?"),
        ("--megatron_extra_kwargs {fp8_margin:half}", f'{EXTRA}: fp8_margin = "half": must be an integer'),
        ("--megatron_extra_kwargs {moe_per_layer_logging:1}",
         f"{EXTRA}: moe_per_layer_logging = 1: must be true or false"),
        ("--megatron_extra_kwargs {symmetric_ar_type:x}", f'{EXTRA}: symmetric_ar_type = "x": must be one of two_shot, '
         "one_shot, multimem_all_reduce or null"),
        ("--megatron_extra_kwargs {init_method:x}",
         f'{EXTRA}: init_method = "x": takes an object of Python, which a recipe can\'t contain; leave it out'),
        ("--megatron_extra_kwargs {bf16:true}", f"{EXTRA}: bf16 = true: is decided by train.dtype; set that"),
        ("--megatron_extra_kwargs {num_layers:2}",
         f"{EXTRA}: num_layers = 2: is decided by the student's checkpoint"),
        ("--megatron_extra_kwargs {calculate_per_token_loss:false}", f"{EXTRA}: calculate_per_token_loss = false: is "
         "decided by the training loop, which relies on its value"),
    ],
)  # fmt: skip
def test_refused(workspace, installed, arguments, problem):
    arguments = [one.replace(":", ": ") for one in arguments.split()]
    assert workspace.problems(*arguments) == [problem]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--fp8_format hybrid --dtype fp32", "megatron.fp8_format = hybrid: needs train.dtype = bf16"),
        ("--fp8_format hybrid --lmbda 1",
         "megatron.fp8_format = hybrid: rollout.engine must be vllm or vllm_server with it"),
        ("--fp8_format hybrid --recompute_granularity selective --recompute_modules layernorm",
         "parallel.recompute_modules = ['layernorm']: moe_act and layernorm can't be recomputed with "
         "megatron.fp8_recipe = delayed"),
    ],
)  # fmt: skip
def test_refused_with_transformer_engine(workspace, installed, arguments, problem):
    installed("transformer_engine")
    assert workspace.problems(*arguments.split()) == [problem]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--moe_grouped_gemm false --recompute_granularity selective --recompute_modules moe_act",
         "parallel.recompute_modules = ['moe_act']: moe_act needs megatron.moe_grouped_gemm = true"),
        ("--moe_grouped_gemm false --tuner_type lora",
         "megatron.moe_grouped_gemm = false: must be true with adapters (section lora)"),
        ("--recompute_granularity selective --recompute_modules mlp", "parallel.recompute_modules = ['mlp']: mlp is "
         "that of dense layers, and student has none; its experts are moe"),
        ("--recompute_granularity selective --recompute_modules shared_experts --moe_shared_expert_overlap true",
         "megatron.moe_shared_expert_overlap = true: not with shared_experts in parallel.recompute_modules"),
    ],
)  # fmt: skip
def test_refused_for_a_mixture_of_experts(workspace, installed, arguments, problem):
    workspace.model("student", MOE)
    assert workspace.problems(*arguments.split()) == [problem]


@pytest.mark.parametrize(
    "arguments",
    [
        "--moe_token_dispatcher_type allgather --moe_grouped_gemm false --moe_router_dtype null",
        "--freeze_moe_router true --moe_z_loss_coeff 0.001 --moe_router_dtype fp64",
        "--recompute_granularity selective --recompute_modules [core_attn,layernorm,moe_act,moe]",
        "--gradient_accumulation_fusion off --masked_softmax_fusion off --bias_swiglu_fusion on",
        "--megatron_extra_kwargs {moe_input_jitter_eps:1,persist_layer_norm:false,cp_comm_type:a2a}",
    ],
)
def test_accepted(workspace, installed, arguments):
    workspace.model("student", MOE)
    assert workspace.problems(*(one.replace(":", ": ") for one in arguments.split())) == []


def test_kernels_that_are_installed(workspace, installed):
    installed("transformer_engine", "deep_ep", "scaled_upper_triang_masked_softmax_cuda")
    fusions = "gradient_accumulation_fusion", "masked_softmax_fusion", "apply_rope_fusion", "moe_permute_fusion"
    arguments = [text for name in fusions for text in (f"--{name}", "on")]
    fp8 = ["--fp8_format", "e4m3", "--fp8_recipe", "blockwise", "--teacher_fp8_format", "hybrid"]
    assert workspace.problems(*arguments, *fp8, "--moe_token_dispatcher_type", "flex") == []
