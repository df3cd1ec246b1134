"""Recipes and command lines may use other tools' names of keys."""

import warnings

import pytest
import yaml

ENGINE = ["--lmbda", "1", "--max_length", "1024"]


def value_of(recipe, key):
    section, leaf = key.split(".")
    return getattr(getattr(recipe, section), leaf)


CASES = [
    ("--torch_dtype bfloat16", "train.dtype", "bf16"),
    ("--torch_dtype float32 --train.min_lr=0", "train.dtype", "fp32"),
    ("--dtype float32", "train.dtype", "fp32"),
    ("--bf16", "train.dtype", "bf16"),
    ("--save_steps 5", "output.save_interval", 5),
    ("--output.save_steps=5", "output.save_interval", 5),
    ("--save 2024_01", "output.output_dir", "2024_01"),
    ("--logging_steps 3", "output.log_interval", 3),
    ("--eval_steps 7", "train.eval_interval", 7),
    ("--eval_iters -1", "train.eval_iters", None),
    ("--no_save_optim", "output.save_optim", False),
    ("--no_save_optim false", "output.save_optim", True),
    ("--save_only_model true", "output.save_optim", False),
    ("--use_distributed_optimizer true", "parallel.distributed_optimizer", True),
    ("--use_distributed_optimizer false", "parallel.distributed_optimizer", False),
    ("--enable_thinking false", "data.chat_template_kwargs", {"enable_thinking": False}),
    ("--dataset_num_proc 4", "data.preprocessing_num_workers", 4),
    ("--num_workers 1", "data.dataloader_num_workers", 1),
    ("--max_epochs 2 --train_iters null", "train.num_train_epochs", 2.0),
    ("--train_type lora", "train.tuner_type", "lora"),
    ("--tuner_type lora --lora_r 4", "lora.lora_rank", 4),
    ("--tuner_type lora --lora_dtype bfloat16", "lora.lora_dtype", "bf16"),
    ("--tuner_type lora --lora_target_modules o_proj down_proj", "lora.target_modules", ("o_proj", "down_proj")),
    ("--learning_rate 3e-5", "train.lr", 3e-5),
    ("--warmup_ratio 0.05", "train.lr_warmup_fraction", 0.05),
    ("--lr_scheduler_type constant_with_warmup", "train.lr_decay_style", "constant"),
    ("--max_grad_norm 0.5", "train.clip_grad", 0.5),
    ("--per_device_train_batch_size 2", "train.micro_batch_size", 2),
    ("--max_steps 9", "train.train_iters", 9),
    ("--max_steps -1 --num_train_epochs 1", "train.train_iters", None),
    ("--gradient_checkpointing true", "parallel.recompute_method", "uniform"),
    ("--recompute_granularity none", "parallel.recompute_granularity", None),
    ("--no_gradient_accumulation_fusion true", "megatron.gradient_accumulation_fusion", "off"),
    ("--no_rope_fusion", "megatron.apply_rope_fusion", "off"),
    ("--moe_router_dtype none", "megatron.moe_router_dtype", None),
    ("--distributed_timeout_minutes 60", "cluster.ddp_timeout", 3600.0),
    ("--logging_level INFO", "output.log_level", "info"),
    ("--report_to tensorboard", "output.tensorboard", True),
    ("--report_to none", "output.tensorboard", False),
    ("--resume_from_checkpoint true", "train.resume", "auto"),
    ("--truncation_mode keep_end", "data.truncation_strategy", "left"),
    ("--assistant_only_loss true", "data.loss_scale", "default"),
    ("--loss_scale last_round", "data.loss_scale", "last_round"),
    ("--strict false", "data.data_errors", "skip"),
    ("--overlong_filter true", "rollout.truncated_completions", "mask"),
    ("--max_new_tokens 64", "rollout.max_completion_length", 64),
    ("--top_k -1", "rollout.top_k", None),
    ("--vllm_enforce_eager true --engine vllm", "rollout.enforce_eager", True),
    ("--use_vllm false", "rollout.engine", "megatron"),
    ("--use_vllm false --vllm_mode colocate", "rollout.engine", "megatron"),
    ("--max-total-sequence-length 256", "data.max_length", 256),
    ("--topk_logits_k 8", "distill.gkd_logits_topk", 8),
]


@pytest.mark.parametrize(("flags", "key", "expected"), CASES)
def test_on_the_command_line(workspace, flags, key, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = workspace.load(*flags.split(), require_paths=False)
    assert value_of(recipe, key) == expected


def test_every_name_in_its_section_of_the_file(workspace):
    """The same values in YAML, without the command line."""
    tree = yaml.safe_load(workspace.recipe.read_text())
    tree["train"] |= {"torch_dtype": "bfloat16", "warmup_ratio": 0.1, "rlhf_type": "gkd"}
    tree["data"] |= {"enable_thinking": False, "chat_template_kwargs": {"style": "brief"}, "padding_free": True}
    tree["rollout"] = {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": ["a", "b"], "vllm_server_port": 80}
    tree["output"]["save_steps"] = tree["output"].pop("save_interval")
    workspace.recipe.write_text(yaml.safe_dump(tree))
    recipe = workspace.load(require_paths=False)
    assert recipe.train.dtype == "bf16" and recipe.train.lr_warmup_fraction == 0.1
    assert recipe.data.chat_template_kwargs == {"style": "brief", "enable_thinking": False}
    assert recipe.rollout.engine == "vllm_server"
    assert recipe.rollout.vllm_server_urls == ("http://a:80", "http://b:80")
    assert recipe.output.save_interval == 10
    written = yaml.safe_load(recipe.to_yaml())
    assert "torch_dtype" not in written["train"] and "use_vllm" not in written["rollout"]


@pytest.mark.parametrize(
    ("flags", "engine", "urls"),
    [
        ("--use_vllm true --vllm_mode colocate", "vllm", ()),
        ("--use_vllm", "vllm", ()),
        ("--vllm_mode server --vllm_server_host h --vllm_server_port 81", "vllm_server", ("http://h:81",)),
        ("--vllm_mode server --vllm_server_host h", "vllm_server", ("http://h:8000",)),
        (
            "--vllm_mode server --vllm_server_host h i --vllm_server_port 1 2",
            "vllm_server",
            ("http://h:1", "http://i:2"),
        ),
        (
            "--vllm_mode server --vllm_server_base_url http://h:81/ --vllm_server_host x",
            "vllm_server",
            ("http://h:81",),
        ),
    ],
)
def test_engines_and_their_servers(workspace, flags, engine, urls):
    rollout = workspace.load(*ENGINE, *flags.split(), require_paths=False).rollout
    assert (rollout.engine, rollout.vllm_server_urls) == (engine, urls)


def test_an_entry_is_added_to_the_files_mapping(workspace):
    tree = yaml.safe_load(workspace.recipe.read_text())
    tree["data"]["chat_template_kwargs"] = {"style": "brief", "enable_thinking": True}
    workspace.recipe.write_text(yaml.safe_dump(tree))
    recipe = workspace.load("--enable_thinking", "false")
    assert recipe.data.chat_template_kwargs == {"style": "brief", "enable_thinking": False}


def test_the_command_line_overrides_the_file_under_either_name(workspace):
    assert workspace.load("--save_steps", "3").output.save_interval == 3
    text = workspace.recipe.read_text().replace("save_interval", "save_steps")
    workspace.recipe.write_text(text)
    assert workspace.load().output.save_interval == 10
    assert workspace.load("--save_interval", "4").output.save_interval == 4


@pytest.mark.parametrize(
    "flags",
    [
        "--rlhf_type gkd",
        "--finetune",
        "--finetune true",
        "--no_save_rng",
        "--padding_free true",
        "--seq_kd false",
        "--task_type causal_lm",
        "--cross_entropy_loss_fusion true",
        "--optim adamw_torch",
        "--fp16 false",
        "--max_turns 1",
        "--attention_dropout 0.0",
    ],
)
def test_settings_that_hold_anyway(workspace, flags):
    assert workspace.load(*flags.split()) == workspace.load()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--torch_dtype float16", "--torch_dtype = float16: must be one of bfloat16, float32, bf16, fp32"),
        ("--save_steps 5 --save_interval 6", "--save_steps = 5: is another name of output.save_interval; remove "
         "one of the two"),
        ("--save out --output_dir out", "--save = out: is another name of output.output_dir; remove one of the two"),
        ("--learning_rate 1 --warmup_ratio 0.1 --lr 2", "--learning_rate = 1: is another name of train.lr; remove "
         "one of the two"),
        ("--dataset_shuffle true --train_dataloader_shuffle true", "--train_dataloader_shuffle = true: is another "
         "name of shuffle, as dataset_shuffle is; remove one of the two"),
        ("--train.save_steps 5", "--train.save_steps: is another name of output.save_interval; it belongs in the "
         "section output"),
        ("--save_steps 0", "output.save_interval = 0: must be an integer >= 1, or null"),
        ("--save_steps", "--save_steps: needs a value: an integer >= 1, or null"),
        ("--save_steps 1 2", "--save_steps: takes one value, not 2 (1 2)"),
        ("--padding_free false", "--padding_free = false: must be true: rows of a microbatch follow each other "
         "without padding"),
        ("--rlhf_type dpo", "--rlhf_type = dpo: must be gkd: the package does nothing else"),
        ("--seq_kd true", "--seq_kd = true: must be false: responses are the data's or the student's; write the "
         "teacher's responses with "
         "`megatron-gkd generate recipe.yaml --from teacher --output rows.jsonl`, and train on rows.jsonl with "
         "distill.lmbda 0"),
        ("--deepspeed zero3", "--deepspeed = zero3: not supported; parameters and optimizer are sharded by the "
         "section parallel "
         "(parallel.distributed_optimizer is ZeRO-1)"),
        ("--multi_turn_scheduler x", "--multi_turn_scheduler = x: not supported; multi-turn rollouts are not "
         "supported: a completion is one turn"),
        ("--gradient_accumulation_steps 8", "--gradient_accumulation_steps = 8: not supported; set "
         "train.global_batch_size: "
         "per_device_train_batch_size x gradient_accumulation_steps x data-parallel size"),
        ("--vllm_mode embedded", "--vllm_mode = embedded: must be colocate or server"),
        ("--vllm_server_port 80", "--vllm_server_port = 80: needs vllm_server_host"),
        ("--vllm_server_host a b c --vllm_server_port 1 2", "--vllm_server_port = [1, 2]: must be as many ports "
         "as there are hosts (3)"),
        ("--enable_thinking maybe", "--enable_thinking = maybe: must be true or false"),
        ("--report_to wandb", "--report_to = wandb: must be tensorboard or none; metrics are also written to "
         "output_dir/metrics.jsonl"),
        ("--no_save_optim 3", "--no_save_optim = 3: must be true or false"),
        ("--torch_dtyp bfloat16", "--torch_dtyp: unknown key; did you mean torch_dtype, another name of train.dtype?"),
        ("--lora_alphas 16", "--lora_alphas: unknown key; did you mean lora.lora_alpha?"),
        ("--gradient_checkpointing true --recompute_granularity selective", "--gradient_checkpointing = true: is "
         "another name of "
         "parallel.recompute_granularity; remove one of the two"),
    ],
)  # fmt: skip
def test_refused_in_one_line(workspace, flags, problem):
    assert workspace.problems(*flags.split(), require_paths=False) == [problem]


@pytest.mark.parametrize(
    "name", ["kd_alpha", "rpo_alpha", "ld_alpha", "cpo_alpha", "vllm_alpha", "num_samples", "ref_model"]
)
def test_no_suggestion_is_better_than_a_wrong_one(workspace, name):
    (problem,) = workspace.problems(f"--{name}", "1")
    assert "did you mean" not in problem


@pytest.mark.parametrize(
    ("section", "entry", "problem"),
    [
        ("output", {"save_steps": 5}, "output.save_steps = 5: is another name of output.save_interval; remove one "
         "of the two"),
        ("train", {"save_total_limit_": 5}, "train.save_total_limit_: unknown key; did you mean "
         "output.save_total_limit?"),
        ("train", {"eval_step": 5}, "train.eval_step: unknown key; did you mean eval_steps, another name of "
         "train.eval_interval?"),
        ("data", {"deepspeed": "zero1"}, "data.deepspeed = zero1: not supported; parameters and optimizer are "
         "sharded by the section "
         "parallel (parallel.distributed_optimizer is ZeRO-1)"),
        ("student", {"torch_dtype": "bfloat16"}, "student.torch_dtype: is another name of train.dtype; it belongs "
         "in the section train"),
        ("data", {"padding_free": False}, "data.padding_free = false: must be true: rows of a microbatch follow "
         "each other without padding"),
    ],
)  # fmt: skip
def test_refused_in_the_file(workspace, section, entry, problem):
    tree = yaml.safe_load(workspace.recipe.read_text())
    tree[section] |= entry
    workspace.recipe.write_text(yaml.safe_dump(tree))
    assert workspace.problems() == [problem]


@pytest.mark.parametrize("text", ["policy: {}\ndata: {}\n", "model: m\ntorch_dtype: bfloat16\n", "beta: 1\nlmbda: 0\n"])
def test_a_configuration_of_another_tool(workspace, text):
    workspace.recipe.write_text(text)
    (problem,) = workspace.problems()
    assert problem.startswith("has no sections of a recipe but keys of another tool; megatron-gkd migrate ")
