"""Each check that involves several keys: recipes that it refuses, with the problem, and recipes that it accepts."""

import importlib.util
import os

import pytest
from recipe_workspace import MIXTURE

PRODUCT = "parallel.tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size"
EXPERTS = "parallel.expert_tensor_parallel_size x expert_model_parallel_size x pipeline_model_parallel_size"


def flags(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize(
    ("world_size", "arguments", "problem"),
    [
        (1, "", f"{PRODUCT} = 2 x 1 x 1 = 2: must divide the number of processes (1)"),
        (6, "--pipeline_model_parallel_size 2", f"{PRODUCT} = 2 x 2 x 1 = 4: must divide the number of processes (6)"),
        (2, "--global_batch_size 7 --micro_batch_size 2", "train.global_batch_size = 7: must be a multiple of "
         "micro_batch_size x data-parallel size = 2 x 1 = 2"),
        (8, "--global_batch_size 6", "train.global_batch_size = 6: must be a multiple of "
         "micro_batch_size x data-parallel size = 1 x 4 = 4"),
        (2, "--virtual_pipeline_model_parallel_size 2", "parallel.virtual_pipeline_model_parallel_size = 2: needs "
         "pipeline_model_parallel_size > 1"),
        (2, "--virtual_pipeline_model_parallel_size 1", "parallel.virtual_pipeline_model_parallel_size = 1: must be "
         "an integer >= 2, or null"),
        (8, "--pipeline_model_parallel_size 4 --virtual_pipeline_model_parallel_size 2 --global_batch_size 6",
         "train.global_batch_size = 6: makes 6 microbatches on each data-parallel rank; virtual pipeline stages need a "
         "multiple of pipeline_model_parallel_size (4)"),
        (2, "--packing --micro_batch_size 2",
         "train.micro_batch_size = 2: must be 1 with data.packing, where max_length "
         "decides how many rows a microbatch holds"),
        (2, "--min_pixels 9 --max_pixels 4", "data.min_pixels = 9: must not be above data.max_pixels = 4"),
        (2, "--max_patches 64", "data.max_patches = 64: limits packed microbatches; set data.packing to true, or leave "
         "it out and set train.micro_batch_size"),
        (2, "--truncation_strategy split --lmbda 0.5", "data.truncation_strategy = split: needs distill.lmbda = 0, not "
         "0.5: the pieces of a text have no prompts; use delete, left or right"),
        (2, "--truncation_strategy split --streaming",
         "data.truncation_strategy = split: not with data.streaming, where a row is one sequence"),
        (2, "--loss_scale last", "data.loss_scale = last: must be one of last_round, default, all, "
         "last_round+ignore_empty_think, default+ignore_empty_think, all+ignore_empty_think"),
        (2, "--recompute_granularity full --recompute_method uniform",
         "parallel.recompute_num_layers = null: must be set with recompute_granularity full"),
        (2, "--recompute_granularity full --recompute_num_layers 1", "parallel.recompute_method = null: must be set "
         "with recompute_granularity full"),
        (2, "--recompute_granularity selective --recompute_num_layers 1",
         "parallel.recompute_num_layers = 1: only with recompute_granularity full"),
        (2, "--overlap_param_gather", "parallel.overlap_param_gather = true: needs overlap_grad_reduce"),
        (2, "--overlap_param_gather --overlap_grad_reduce --distributed_optimizer false",
         "parallel.overlap_param_gather = true: needs distributed_optimizer"),
        (2, "--train_iters null",
         "train.train_iters, train.num_train_epochs = null: exactly one of the two must be set"),
        (2, "--num_train_epochs 1",
         "train.train_iters, train.num_train_epochs = both set: exactly one of the two must be set"),
        (2, "--min_lr 1", "train.min_lr = 1.0: must be <= lr (0.0001)"),
        (2, "--lr_warmup_iters 20", "train.lr_warmup_iters = 20: must be < train_iters (20)"),
        (2, "--lr_warmup_iters 2 --lr_warmup_fraction 0.1", "train.lr_warmup_fraction = 0.1: must be null beside "
         "lr_warmup_iters (2)"),
        (2, "--eval_interval 5 --val_dataset []", "train.eval_interval = 5: needs data.val_dataset or "
         "data.split_dataset_ratio"),
        (2, "--lmbda 0.5 --teacher_kind none --teacher_model null --offload_teacher_model false",
         "distill.lmbda = 0.5: must be 0 with teacher.teacher_kind = none, which scores no samples"),
        (2, "--watchdog_s 600 --ddp_timeout 10m", "cluster.watchdog_s = 600: must be less than cluster.ddp_timeout "
         "(600 s), which would end the run first and name no rank; or null"),
        (2, "--watchdog_s 600 --lmbda 1 --engine vllm_server --vllm_server_urls http://x:1", "cluster.watchdog_s = "
         "600: must be greater than rollout.vllm_server_timeout_s (600 s), which one response may take; or null"),
        (2, "--watchdog_s 60 --offload_teacher_model false --teacher_model null --teacher_model_server http://x:1 "
         "--gkd_logits_topk 4",
         "cluster.watchdog_s = 60: must be greater than teacher.teacher_server_timeout_s (600 s), which one response "
         "may take; or null"),
        (2, "--lmbda 1.5", "distill.lmbda = 1.5: must be a number in [0, 1]"),
        (2, "--beta 1.5", "distill.beta = 1.5: must be a number in [0, 1]"),
        (2, "--temperature 0", "distill.temperature = 0: must be a number in [0.01, 1000.0]"),
        (2, "--temperature 1e-40", "distill.temperature = 1e-40: must be a number in [0.01, 1000.0]"),
        (2, "--temperature 1e38", "distill.temperature = 1e+38: must be a number in [0.01, 1000.0]"),
        (2, "--temperature .inf", "distill.temperature = inf: must be a number in [0.01, 1000.0]"),
        (2, "--rollout_temperature 1e-40",
         "rollout.rollout_temperature = 1e-40: must be a number in [0.01, 1000.0], or null"),
        (2, "--rollout_temperature .inf",
         "rollout.rollout_temperature = inf: must be a number in [0.01, 1000.0], or null"),
        (2, "--divergence skewed_forward_kl --beta 1",
         "distill.beta = 1.0: must be below 1 with divergence = skewed_forward_kl"),
        (2, "--divergence skewed_reverse_kl --beta 0",
         "distill.beta = 0.0: must be above 0 with divergence = skewed_reverse_kl"),
        (2, "--divergence kl", "distill.divergence = kl: must be one of jsd, total_variation, skewed_forward_kl, "
         "skewed_reverse_kl, alpha"),
        (2, "--gkd_topk_tail bucket", "distill.gkd_topk_tail = bucket: only with gkd_logits_topk"),
        (2, "--gkd_topk_tail other --gkd_logits_topk 4",
         "distill.gkd_topk_tail = other: must be one of renormalize, bucket"),
        (2, "--gkd_logits_topk 0", "distill.gkd_logits_topk = 0: must be an integer >= 1, or null"),
        (2, "--sleep_level 3", "rollout.sleep_level = 3: must be an integer in [0, 2]"),
        (2, "--teacher_model null --teacher_kind local",
         "teacher.teacher_model = null: must name a model where teacher.teacher_kind = local"),
        (2, "--teacher_model null",
         "teacher.teacher_kind = null: must be local, server, self, cache or none, or follow from teacher_model, "
         "teacher_model_server or teacher_cache"),
        (2, "--steps_ahead 1", "rollout.steps_ahead = 1: only with rollout.engine = vllm_server"),
        (2, "--weight_sync nccl", "rollout.weight_sync = nccl: only with rollout.engine = vllm_server"),
        (2, "--weight_sync_dir w", "rollout.weight_sync_dir = w: only with rollout.engine = vllm_server"),
        (2, "--engine vllm_server --vllm_server_urls http://a:1 --weight_sync gloo --weight_sync_dir w",
         "rollout.weight_sync_dir = w: only with rollout.weight_sync = folder or lora"),
        (2, "--max_completion_length 512", "rollout.max_completion_length = 512: must be below data.max_length (512), "
         "which holds the prompt, too"),
        (2, "--lmbda 1 --max_prompt_length 512",
         "data.max_prompt_length = 512: must be below data.max_length (512), so that completions have room"),
        (2, "--lmbda 1 --max_prompt_length 413 --max_completion_length 100", "data.max_prompt_length = 413: must be at "
         "most data.max_length (512) - rollout.max_completion_length (100), so that completions have room"),
        (2, "--teacher_max_length 100 --max_completion_length 100", "data.teacher_max_length = 100: must be above "
         "rollout.max_completion_length (100), so that a teacher_prompt has room"),
        (2, "--max_prompt_length 99",
         "data.max_prompt_length = 99: only with distill.lmbda > 0; max_length limits rows"),
        (2, "--prompt_only on_policy_only",
         "data.prompt_only = on_policy_only: only with distill.lmbda > 0, which has on-policy steps"),
        (2, "--engine vllm_server --vllm_server_urls http://a:1 --max_batch_tokens 99",
         "rollout.max_batch_tokens = 99: only with rollout.engine = megatron"),
        (2, "--steps_ahead 2", "rollout.steps_ahead = 2: must be an integer in [0, 1]"),
        (2, "--num_generations 2", "rollout.num_generations = 2: only with distill.lmbda > 0, where the student "
         "samples"),
        (2, "--steps_per_generation 2", "rollout.steps_per_generation = 2: only with distill.lmbda > 0, where the "
         "student samples"),
        (2, "--lmbda 1 --num_generations 3", "rollout.num_generations = 3: must divide the completions of a "
         "generation, train.global_batch_size x steps_per_generation = 8 x 1 = 8"),
        (2, "--lmbda 1 --generation_batch_size 12",
         "rollout.generation_batch_size = 12: must be a multiple of train.global_batch_size (8)"),
        (2, "--lmbda 1 --generation_batch_size 16 --steps_per_generation 2",
         "rollout.generation_batch_size = 16: must be null beside steps_per_generation (2)"),
        (2, "--lmbda 1 --num_generations 0", "rollout.num_generations = 0: must be an integer >= 1"),
    ],
)  # fmt: skip
def test_refused(workspace, world_size, arguments, problem):
    assert workspace.problems(*flags(arguments), world_size=world_size) == [problem]


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [
        (8, "--pipeline_model_parallel_size 2 --context_parallel_size 2"),
        (8, "--pipeline_model_parallel_size 4 --virtual_pipeline_model_parallel_size 2 --global_batch_size 8"),
        (1, "--tensor_model_parallel_size 1 --sequence_parallel true"),
        (2, "--packing"),
        (2, "--lmbda 1 --generation_batch_size 24 --num_generations 12"),
        (2, "--lmbda 0.5 --steps_per_generation 2 --num_generations 16"),
        (2, "--num_generations 1 --steps_per_generation 1"),
        (2, "--recompute_granularity full --recompute_num_layers 1 --recompute_method block"),
        (2, "--recompute_granularity selective"),
        (2, "--overlap_param_gather --overlap_grad_reduce"),
        (2, "--train_iters null --num_train_epochs 0.5"),
        (2, "--lr_warmup_iters 19"),
        (2, "--lr_warmup_fraction 0.1 --min_lr 0.0001"),
        (2, "--eval_interval 5 --eval_iters 2"),
        (2, "--gkd_logits_topk 64 --gkd_topk_tail bucket"),
        (2, "--divergence skewed_forward_kl --beta 0"),
        (2, "--divergence alpha --beta 1"),
        (2, "--teacher_kind none --teacher_model null --offload_teacher_model false"),
        (2, "--lmbda 1 --max_prompt_length 412 --max_completion_length 100 --max_batch_tokens 99"),
        (2, "--lmbda 1 --max_prompt_length 511 --prompt_only on_policy_only"),
        (2, "--teacher_max_length 2"),
    ],
)
def test_accepted(workspace, world_size, arguments):
    assert workspace.problems(*flags(arguments), world_size=world_size) == []


def test_the_expert_layout_must_divide_the_processes(workspace):
    workspace.model("teacher", {**MIXTURE, "num_local_experts": 12})
    workspace.model("student", MIXTURE)
    arguments = flags("--pipeline_model_parallel_size 2 --expert_model_parallel_size 4 --global_batch_size 6")
    assert workspace.problems(*arguments, world_size=12) == [
        f"{EXPERTS} = 1 x 4 x 2 = 8: must divide the number of processes (12)"
    ]
    assert workspace.problems(*arguments, "--global_batch_size", "8", world_size=16) == []


def test_vllm_in_the_training_processes(workspace, monkeypatch):
    arguments = flags("--engine vllm --vllm_tensor_parallel_size 4")
    divides = "rollout.vllm_tensor_parallel_size = 4: must divide the number of processes (2)"
    absent = "rollout.engine = vllm: needs vLLM beside the trainer, which is not installed here (pip install vllm)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert workspace.problems(*arguments) == [divides, absent]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert workspace.problems(*arguments) == [divides]
    assert workspace.problems(*flags("--engine vllm --vllm_tensor_parallel_size 2 --vllm_max_model_len 4096")) == []
    limits = flags("--engine vllm --vllm_tensor_parallel_size 2 --vllm_max_model_len 99 --max_completion_length 99")
    (problem,) = workspace.problems(*limits)
    assert problem == (
        "rollout.max_completion_length = 99: must be below rollout.vllm_max_model_len (99), which holds the prompt, too"
    )


def test_missing_files(workspace):
    (workspace.folder / "plugin.txt").write_text("")
    arguments = flags(
        "--val_dataset a.jsonl b.jsonl --external_plugins no.py plugin.txt --teacher_model ./no --model no"
        " --system prompts/no.md"
    )
    assert workspace.problems(*arguments) == [
        "data.val_dataset = a.jsonl: must be a file or folder that exists",
        "data.val_dataset = b.jsonl: must be a file or folder that exists",
        "data.external_plugins = no.py: must be a .py file that exists",
        "data.external_plugins = plugin.txt: must be a .py file that exists",
        "data.system = prompts/no.md: must be a text, or a file that exists; it is no file, and looks like a path",
        "student.model = no: must be a Hugging Face folder that exists, or a hub id (org/name)",
        "teacher.teacher_model = ./no: must be a Hugging Face folder that exists, or a hub id (org/name)",
    ]
    assert workspace.problems(*arguments, require_paths=False) == []


def test_output_dir_is_a_file_or_below_one(workspace):
    for value in ("train.jsonl", "train.jsonl/run"):
        (problem,) = workspace.problems("--output_dir", value)
        assert problem.startswith(f"output.output_dir = {value}: ")
        assert problem.endswith("train.jsonl is a file; must be a folder, or one that can be made")


def test_output_dir_is_not_writable(workspace, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    (problem,) = workspace.problems()
    assert problem.endswith("is not writable; must be a folder that is, or one that can be made")


def test_a_check_is_left_out_where_its_key_is_wrong_in_itself(workspace):
    """min_lr <= lr can't be checked without an lr, but missing files still can."""
    assert workspace.problems("--min_lr", "1", "--lr", "fast", "--val_dataset", "none.jsonl") == [
        "train.lr = fast: must be a number > 0",
        "data.val_dataset = none.jsonl: must be a file or folder that exists",
    ]
