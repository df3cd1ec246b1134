"""Other tools' names of the recipe's keys."""

from megatron_gkd.config.aliases import readers as r
from megatron_gkd.config.aliases.entry import NEMO, SWIFT, TRL, Alias, Values

_BOTH = (SWIFT, TRL)
_DTYPES = {"bfloat16": "bf16", "float32": "fp32", "bf16": "bf16", "fp32": "fp32"}
_ATTENTION = {
    "flash_attn": "flash",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "sdpa": "sdpa",
    "auto": "auto",
}
_SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_FULL_RECOMPUTE: Values = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def _switch(name: str) -> Alias:
    read = r.flag({name: "off"}, {name: "auto"})
    return Alias((name,), (SWIFT,), read, note="true: `off`")


def _engine_option(name: str) -> Alias:
    note = "an entry of the mapping"
    return Alias(("vllm_engine_kwargs",), (SWIFT,), r.entry("vllm_engine_kwargs", name), note=note)


_PLAIN: dict[tuple[str, ...], dict[str, str]] = {
    (SWIFT,): {
        "train_type": "tuner_type",
        "save": "output_dir",
        "use_distributed_optimizer": "distributed_optimizer",
        "extra_megatron_kwargs": "megatron_extra_kwargs",
        "num_workers": "dataloader_num_workers",
        "max_epochs": "num_train_epochs",
        "dataset_shuffle": "shuffle",
        "train_dataloader_shuffle": "shuffle",
        "gpu_memory_utilization": "vllm_gpu_memory_utilization",
        "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
        "vllm_enforce_eager": "enforce_eager",
        "vllm_server_timeout": "vllm_server_timeout_s",
        "router_aux_loss_coef": "moe_aux_loss_coeff",
    },
    _BOTH: {
        "save_steps": "save_interval",
        "logging_steps": "log_interval",
        "eval_steps": "eval_interval",
        "dataset_num_proc": "preprocessing_num_workers",
        "learning_rate": "lr",
        "adam_epsilon": "adam_eps",
        "warmup_ratio": "lr_warmup_fraction",
        "warmup_steps": "lr_warmup_iters",
        "per_device_train_batch_size": "micro_batch_size",
    },
    (SWIFT, TRL, NEMO): {"max_grad_norm": "clip_grad"},
    (TRL, NEMO): {"max_new_tokens": "max_completion_length"},
    (TRL,): {
        "model_name_or_path": "model",
        "teacher_model_name_or_path": "teacher_model",
        "lora_r": "lora_rank",
        "lora_target_modules": "target_modules",
        "lora_modules_to_save": "modules_to_save",
        "dataset_name": "dataset",
        "shuffle_dataset": "shuffle",
        "max_seq_length": "max_length",
    },
    (NEMO,): {
        "train_global_batch_size": "global_batch_size",
        "train_micro_batch_size": "micro_batch_size",
        "max_total_sequence_length": "max_length",
        "topk_logits_k": "gkd_logits_topk",
        "max_num_steps": "train_iters",
        "max_num_epochs": "num_train_epochs",
        "val_period": "eval_interval",
        "save_period": "save_interval",
        "checkpoint_dir": "output_dir",
        "num_generations_per_prompt": "num_generations",
        "stop_strings": "stop_words",
    },
}

ALIASES: dict[str, Alias] = {
    name: Alias((leaf,), tools) for tools, names in _PLAIN.items() for name, leaf in names.items()
} | {
    "torch_dtype": Alias(("dtype",), _BOTH, r.one_of("dtype", _DTYPES), note="`bfloat16` or `float32`"),
    "bf16": Alias(("dtype",), _BOTH, r.flag({"dtype": "bf16"}, {"dtype": "fp32"})),
    "attn_impl": Alias(("attention_backend",), (SWIFT,), r.one_of("attention_backend", _ATTENTION)),
    "attn_implementation": Alias(("attention_backend",), (TRL,), r.one_of("attention_backend", _ATTENTION)),
    "no_save_optim": Alias(("save_optim",), (SWIFT,), r.opposite("save_optim")),
    "save_only_model": Alias(("save_optim",), _BOTH, r.opposite("save_optim")),
    "max_steps": Alias(("train_iters",), _BOTH, r.unless("train_iters", -1, 0), note="-1: null"),
    "lr_scheduler_type": Alias(("lr_decay_style",), _BOTH, r.one_of("lr_decay_style", _SCHEDULES)),
    "resume_from_checkpoint": Alias(("resume",), _BOTH, r.read_resume, note="true: `auto`, false: `never`"),
    "report_to": Alias(("tensorboard",), _BOTH, r.read_report_to, note="`tensorboard` or `none`"),
    "gradient_checkpointing": Alias(
        ("recompute_granularity", "recompute_method", "recompute_num_layers"),
        _BOTH,
        r.flag(_FULL_RECOMPUTE, {"recompute_granularity": None}),
        note="true: `full`, `uniform`, 1",
    ),
    "logging_level": Alias(
        ("log_level",), (SWIFT,), lambda value: {"log_level": str(value).lower()}, note="in small letters"
    ),
    "use_peft": Alias(("tuner_type",), (TRL,), r.flag({"tuner_type": "lora"}, {"tuner_type": "full"})),
    "truncation_mode": Alias(
        ("truncation_strategy",), (TRL,), r.one_of("truncation_strategy", {"keep_start": "right", "keep_end": "left"})
    ),
    "assistant_only_loss": Alias(
        ("loss_scale",),
        (TRL,),
        r.flag({"loss_scale": "default"}, {"loss_scale": "last_round"}),
        note="true: `default`",
    ),
    "strict": Alias(("data_errors",), (SWIFT,), r.flag({"data_errors": "raise"}, {"data_errors": "skip"})),
    "init_weights": Alias(
        ("init_lora_weights",),
        (SWIFT,),
        r.one_of("init_lora_weights", {"true": "kaiming", "gaussian": "gaussian"}),
    ),
    "enable_thinking": Alias(
        ("chat_template_kwargs",),
        (SWIFT,),
        lambda value: {"chat_template_kwargs": {"enable_thinking": r.as_boolean(value)}},
        note="an entry of the mapping",
    ),
    "async_generate": Alias(
        ("steps_ahead",), (SWIFT,), r.flag({"steps_ahead": 1}, {"steps_ahead": 0}), note="true: 1"
    ),
    "overlong_filter": Alias(
        ("truncated_completions",),
        (SWIFT,),
        r.flag({"truncated_completions": "mask"}, {"truncated_completions": "keep"}),
        note="true: `mask`",
    ),
    "use_vllm": Alias(("engine",), _BOTH, group="engine", note="false: `megatron`"),
    "vllm_mode": Alias(("engine",), _BOTH, group="engine", note="`colocate`: `vllm`, `server`: `vllm_server`"),
    "vllm_server_base_url": Alias(("vllm_server_urls",), _BOTH, group="servers"),
    "vllm_server_host": Alias(("vllm_server_urls",), _BOTH, group="servers", note="with the port"),
    "vllm_server_port": Alias(("vllm_server_urls",), _BOTH, group="servers", note="8000 where it is left out"),
    "vllm_disable_custom_all_reduce": _engine_option("disable_custom_all_reduce"),
    "vllm_disable_cascade_attn": _engine_option("disable_cascade_attn"),
    "vllm_mm_processor_cache_gb": _engine_option("mm_processor_cache_gb"),
    "no_masked_softmax_fusion": _switch("masked_softmax_fusion"),
    "no_bias_swiglu_fusion": _switch("bias_swiglu_fusion"),
    "no_rope_fusion": _switch("apply_rope_fusion"),
    "no_gradient_accumulation_fusion": _switch("gradient_accumulation_fusion"),
    "distributed_timeout_minutes": Alias(("ddp_timeout",), (SWIFT,), r.seconds("ddp_timeout"), note="in minutes"),
}  # fmt: skip
"""Aliases by name. No name is one of the recipe's own."""

VALUES: dict[str, dict[object, object]] = {
    "dtype": {"bfloat16": "bf16", "float32": "fp32"},
    "lora_dtype": {"bfloat16": "bf16", "float32": "fp32"},
    "moe_router_dtype": {"none": None},
    "recompute_granularity": {"none": None},
    "eval_iters": {-1: None},
    "top_k": {-1: None, 0: None},
}
"""By leaf, other tools' values for ours, where the key has the same name."""
