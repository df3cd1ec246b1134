"""Which keys about memory go together, one line a mistake."""

import pytest

VLLM = ["--engine", "vllm", "--lmbda", "1"]
SERVERS = ["--engine", "vllm_server", "--vllm_server_urls", "http://a:1", "--lmbda", "1"]
BF16 = ["--dtype", "bf16"]
PRECISE = [*BF16, "--use_precision_aware_optimizer", "true"]
HOST = ["--optimizer_cpu_offload", "true"]
SELF = ["--teacher_kind", "self", "--teacher_model", "null", "--offload_teacher_model", "false"]
ADAPTERS = ["--tuner_type", "lora", "--lora_dtype"]

NO_MODEL = ["--teacher_model", "null", "--offload_teacher_model", "false"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--offload_model", "true", "--lmbda", "1"],
            "memory.offload_model = true: only with rollout.engine = vllm; megatron samples with the student's weights",
        ),
        (
            [*SERVERS, "--offload_model", "true"],
            "memory.offload_model = true: only with rollout.engine = vllm; vllm_server runs on other devices",
        ),
        (
            [*SERVERS, "--offload_optimizer", "true"],
            "memory.offload_optimizer = true: only with rollout.engine = vllm or megatron; servers have other devices",
        ),
        (
            ["--offload_optimizer", "true"],
            "memory.offload_optimizer = true: only with distill.lmbda > 0, where the student samples",
        ),
        (
            [*BF16, "--exp_avg_dtype", "bf16"],
            "memory.exp_avg_dtype = bf16: needs use_precision_aware_optimizer = true; otherwise it must be fp32",
        ),
        (
            [*HOST, "--main_params_dtype", "fp16"],
            "memory.main_params_dtype = fp16: must be fp32 with optimizer_cpu_offload, which updates in fp32",
        ),
        (
            [*BF16, "--main_grads_dtype", "bf16"],
            "memory.main_grads_dtype = bf16: needs use_precision_aware_optimizer or optimizer_cpu_offload = true; "
            "otherwise it must be fp32",
        ),
        (
            [*PRECISE, "--distributed_optimizer", "false"],
            "memory.use_precision_aware_optimizer = true: needs parallel.distributed_optimizer = true",
        ),
        (
            [*HOST, "--distributed_optimizer", "false"],
            "memory.optimizer_cpu_offload = true: needs parallel.distributed_optimizer = true",
        ),
        (
            [*PRECISE, "--dtype", "fp32"],
            "memory.use_precision_aware_optimizer = true: needs train.dtype = bf16; fp32 weights are their own fp32 "
            "copy",
        ),
        (
            [*PRECISE, *ADAPTERS, "fp32"],
            "memory.use_precision_aware_optimizer = true: needs lora.lora_dtype = bf16 or null; fp32 adapters are "
            "their own fp32 copy",
        ),
        (
            ["--optimizer_offload_fraction", "0.5"],
            "memory.optimizer_offload_fraction = 0.5: only with optimizer_cpu_offload = true",
        ),
        (
            ["--teacher_kind", "none", *NO_MODEL, "--teacher_states", "host"],
            "teacher.teacher_states = host: only with teacher.teacher_kind = local or self",
        ),
        (
            ["--teacher_kind", "none", *NO_MODEL, "--teacher_micro_batch_tokens", "9"],
            "teacher.teacher_micro_batch_tokens = 9: only with teacher.teacher_kind = local or self",
        ),
        (
            [*HOST, "--optimizer_offload_fraction", "0"],
            "memory.optimizer_offload_fraction = 0: must be a number in (0, 1]",
        ),
        ([*PRECISE, "--main_params_dtype", "bf16"], "memory.main_params_dtype = bf16: must be one of fp32, fp16"),
    ],
)
def test_each_mistake_is_one_line(arguments, problem, workspace):
    assert workspace.problems(*arguments, require_paths=False) == [problem]


def test_joined_microbatches_need_a_schedule_of_their_own(workspace):
    parallel = ["--tensor_model_parallel_size", "1", "--pipeline_model_parallel_size", "2"]
    arguments = [*SELF, *parallel, "--sequence_parallel", "false", "--virtual_pipeline_model_parallel_size", "2"]
    (problem,) = workspace.problems(*arguments, "--teacher_micro_batch_tokens", "9")
    assert problem.startswith("teacher.teacher_micro_batch_tokens = 9: not with virtual_pipeline_model_parallel_size")
    assert workspace.problems(*arguments, "--teacher_states", "host") == []


@pytest.mark.parametrize(
    "arguments",
    [
        [*VLLM, "--offload_model", "true", "--offload_optimizer", "true"],
        ["--lmbda", "1", "--offload_optimizer", "true"],
        [*HOST, "--optimizer_offload_fraction", "0.5", "--main_grads_dtype", "bf16"],
        [*HOST, "--use_precision_aware_optimizer", "true", "--dtype", "fp32"],
        [*PRECISE, "--exp_avg_dtype", "fp8", "--exp_avg_sq_dtype", "fp16", "--main_params_dtype", "fp16"],
        [*PRECISE, *ADAPTERS, "null"],
        ["--teacher_states", "host", "--teacher_micro_batch_tokens", "4096"],
        [*SELF, "--teacher_states", "host", "--teacher_micro_batch_tokens", "4096"],
    ],
)
def test_right_combinations(arguments, workspace):
    assert workspace.problems(*arguments, require_paths=False) == []
