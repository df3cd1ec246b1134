"""The tools' own examples of GKD migrate to recipes that pass `check`, with local folders for their models and data."""

import pytest

from megatron_gkd.config.load import load

EXAMPLES = [
    ("swift_dense.sh", 8),
    ("swift_multi_turn.sh", 4),
    ("swift_opsd.sh", 8),
    ("swift_teacher_server.sh", 2),
    ("swift_full.sh", 4),
    ("trl_lora.sh", 4),
    ("trl_full.yaml", 2),
    ("nemo_base.yaml", 8),
    ("nemo_megatron.yaml", 8),
]


@pytest.mark.parametrize(("name", "processes"), EXAMPLES)
def test_an_example_passes_check(workspace, name, processes):
    recipe, report = workspace.migrate(name)
    workspace.stand_in(recipe)
    assert f"megatron-gkd train recipe.yaml --nproc {processes}\n" in report
    assert "To correct:" not in report and "To add:" not in report
    code, out, err = workspace.run("check", "recipe.yaml", "--nproc", str(processes))
    assert (code, err) == (0, ""), err
    assert "student:" in out


def flat(recipe):
    return {leaf: value for section in recipe.values() for leaf, value in section.items()}


def test_dense(workspace):
    recipe, report = workspace.migrate("swift_dense.sh")
    assert flat(recipe) == {
        "model": "Qwen/Qwen3-8B-Base",
        "use_hf": False,
        "teacher_model": "Qwen/Qwen3-32B",
        "offload_teacher_model": True,
        "beta": 1,
        "lmbda": 1,
        "temperature": 1.0,
        "engine": "vllm",
        "max_completion_length": 8192,
        "vllm_tensor_parallel_size": 1,
        "vllm_gpu_memory_utilization": 0.5,
        "vllm_max_model_len": 16384,
        "sleep_level": 1,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        "expert_model_parallel_size": 1,
        "sequence_parallel": True,
        "recompute_granularity": "selective",
        "dataset": ["AI-ModelScope/alpaca-gpt4-data-en#2000", "AI-ModelScope/alpaca-gpt4-data-zh#2000"],
        "max_length": 16384,
        "max_prompt_length": 8192,
        "micro_batch_size": 2,
        "global_batch_size": 16,
        "num_train_epochs": 1,
        "tuner_type": "lora",
        "lr": 5e-6,
        "seed": 42,
        "dtype": "bf16",
        "attention_backend": "flash",
        "output_dir": "megatron_output/Qwen3-8B-Base",
        "save_optim": False,
        "log_interval": 1,
    }
    assert "Not carried over" not in report
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7" in report and "expandable_segments:True" in report


def test_multi_turn(workspace):
    recipe, report = workspace.migrate("swift_multi_turn.sh")
    assert recipe["data"]["dataset"] == ["AI-ModelScope/NuminaMath-TIR#2000"]
    assert recipe["data"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert recipe["data"]["loss_scale"] == "last_round"
    assert (recipe["data"]["max_length"], recipe["data"]["max_prompt_length"]) == (3072, 2048)
    assert (recipe["output"]["save_interval"], recipe["output"]["save_total_limit"]) == (200, 2)
    skipped = report.partition("Not carried over:\n")[2].partition("\n\n")[0].splitlines()
    assert {line.split(" = ")[0].strip() for line in skipped} == {
        "--remove_unused_columns",
        "--max_turns",
        "--vllm_server_pass_dataset",
        "--multi_turn_scheduler",
    }


def test_self_distillation(workspace):
    recipe, report = workspace.migrate("swift_opsd.sh")
    assert recipe["teacher"] == {"teacher_kind": "self"}
    assert recipe["distill"] == {"beta": 0.5, "lmbda": 1.0, "temperature": 1.2, "sft_alpha": 0}
    assert recipe["data"]["max_length"] == recipe["rollout"]["vllm_max_model_len"] == 10240
    assert "external_plugins" not in recipe["data"] and "external_plugins = examples/" in report
    assert "rows need a teacher_prompt" in report


def test_teacher_server(workspace):
    recipe, report = workspace.migrate("swift_teacher_server.sh")
    assert recipe["teacher"] == {"teacher_model_server": ["http://localhost:8000"]}
    assert recipe["distill"]["gkd_logits_topk"] == 64
    assert recipe["rollout"]["vllm_server_urls"] == ["http://127.0.0.1:8000"]
    assert recipe["rollout"]["vllm_server_timeout_s"] == 600
    assert recipe["train"]["lr_warmup_fraction"] == 0.1
    assert "IMAGE_MAX_TOKEN_NUM = 1024: set data.max_pixels" in report


def test_full_training_on_hugging_face_models(workspace):
    recipe, report = workspace.migrate("swift_full.sh")
    assert recipe["train"]["global_batch_size"] == 16 and recipe["train"]["micro_batch_size"] == 4
    assert recipe["train"]["tuner_type"] == "full" and recipe["distill"]["lmbda"] == 0
    assert recipe["teacher"]["teacher_model"] == "Qwen/Qwen2.5-14B-Instruct"
    assert recipe["data"]["max_length"] == 2048 and "max_prompt_length" not in recipe["data"]
    assert recipe["output"]["save_optim"] is False
    assert "--deepspeed = zero3: not supported" in report


def test_trl_on_the_command_line(workspace):
    recipe, report = workspace.migrate("trl_lora.sh")
    assert recipe["train"]["global_batch_size"] == 128
    assert recipe["lora"] == {"lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.05}
    assert recipe["distill"] == {"beta": 0.5, "lmbda": 0.5, "temperature": 1.0}
    assert recipe["rollout"]["rollout_temperature"] == 0.9
    assert recipe["train"]["lr_decay_style"] == "linear" and recipe["train"]["weight_decay"] == 0.0
    assert "--push_to_hub = true: must be false" in report


def test_trl_in_yaml(workspace):
    recipe, report = workspace.migrate("trl_full.yaml")
    assert recipe["train"]["global_batch_size"] == 64 and recipe["train"]["dtype"] == "bf16"
    assert recipe["data"]["val_dataset"] == ["trl-lib/chatbot_arena_completions::test"]
    assert recipe["parallel"]["recompute_granularity"] == "full"
    assert "report_to = wandb: must be tensorboard or none" in report
    assert "CUDA_VISIBLE_DEVICES=0,1 megatron-gkd train recipe.yaml --nproc 2" in report


def test_nemo_with_dtensor(workspace):
    recipe, report = workspace.migrate("nemo_base.yaml")
    assert recipe["student"]["model"] == "Qwen/Qwen3-1.7B-Base"
    assert recipe["teacher"]["teacher_model"] == "Qwen/Qwen3-4B"
    assert recipe["output"]["output_dir"] == "checkpoints/distillation-Qwen/Qwen3-1.7B-Base"
    assert recipe["data"]["dataset"] == ["agentica-org/DeepScaleR-Preview-Dataset"]
    train = recipe["train"]
    assert (train["global_batch_size"], train["train_iters"], train["eval_interval"]) == (64, 2000, 40)
    assert recipe["rollout"]["steps_per_generation"] == 2 and recipe["output"]["save_interval"] == 20
    assert (train["lr"], train["adam_beta2"], train["lr_warmup_iters"]) == (2e-5, 0.999, 10)
    assert recipe["distill"] == {"beta": 0.5, "lmbda": 1.0, "temperature": 1.0, "gkd_logits_topk": 64}
    assert recipe["parallel"]["tensor_model_parallel_size"] == 2
    assert "loss_fn.kl_type = mixed: " in report
    assert "megatron_cfg" not in report


def test_nemo_with_megatron(workspace):
    recipe, report = workspace.migrate("nemo_megatron.yaml")
    assert recipe["parallel"]["pipeline_model_parallel_size"] == 2
    assert recipe["data"]["packing"] is True and recipe["distill"]["beta"] == 1.0
    assert (recipe["train"]["lr"], recipe["train"]["min_lr"]) == (2.00001e-5, 2e-5)
    assert recipe["memory"]["use_precision_aware_optimizer"] is True
    assert recipe["parallel"]["overlap_param_gather"] is True
    assert "policy.dtensor_cfg" not in report


@pytest.mark.parametrize(("name", "processes"), EXAMPLES)
def test_a_written_recipe_has_our_names_alone(workspace, name, processes):
    recipe, _ = workspace.migrate(name)
    assert flat(recipe).keys() <= flat(load_all(workspace, processes)).keys()


def load_all(workspace, processes):
    recipe = load(workspace.folder / "recipe.yaml", world_size=processes, require_paths=False)
    return {section: value or {} for section, value in recipe.model_dump(mode="json").items()} | {
        "lora": dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout"))
    }
