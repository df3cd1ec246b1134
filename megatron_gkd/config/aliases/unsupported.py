"""Settings of other tools that have no counterpart, each with the reason or with what to use instead."""

from megatron_gkd.config.aliases.entry import NEMO, SWIFT, TRL, Unsupported

_LAYOUT = "parameters and optimizer are sharded by the section parallel (parallel.distributed_optimizer is ZeRO-1)"
_ENGINE = "set it where `vllm serve` starts"
_FROM_CONFIG = "read from the model's config.json"
_ADAPTERS = "LoRA is the only tuner beside training all parameters"
_QUANTIZED = "the base of adapters has train.dtype"
_TURNS = "multi-turn rollouts are not supported: a completion is one turn"
_REWARDS = "there are no rewards; the loss is the divergence from the teacher"
_LOGGERS = "metrics go to TensorBoard and output_dir/metrics.jsonl"
_LOADER = "set data.dataloader_num_workers; the rest of the loader has no keys"
_FREEZING = "set train.freeze_llm, freeze_vit or freeze_aligner, or train adapters"
_MUON = "the optimizer is AdamW"
_KWARGS = "where the model needs it, set it in megatron.megatron_extra_kwargs"
_SCHEDULE = "the schedule is a linear warm-up from 0 and train.lr_decay_style; the weight decay is constant"
_RUN = "the trainer has no such setting"
_HUB = "upload output_dir/hf with `hf upload` after the run"

_SWIFT: dict[str, str] = {
    **dict.fromkeys(("teacher_deepspeed", "zero_hpz_partition_size", "deepspeed_autotp_size"), _LAYOUT),
    **dict.fromkeys(("use_megatron_fsdp", "data_parallel_sharding_strategy"), _LAYOUT),
    **dict.fromkeys(("model_type", "teacher_model_type", "rope_scaling", "max_model_len", "num_layers"), _FROM_CONFIG),
    **dict.fromkeys(("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"), _FROM_CONFIG),
    **dict.fromkeys(("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_layer_freq"), _FROM_CONFIG),
    **dict.fromkeys(("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_layernorm"), _FROM_CONFIG),
    **dict.fromkeys(("tuner_backend", "lorap_lr_ratio", "use_galore", "lisa_activated_layers"), _ADAPTERS),
    **dict.fromkeys(("llamapro_num_new_blocks", "reft_rank", "vera_rank", "boft_block_size"), _ADAPTERS),
    **dict.fromkeys(("adalora_target_r", "fourier_n_frequency", "target_parameters"), _ADAPTERS),
    **dict.fromkeys(("quant_method", "quant_bits", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type"), _QUANTIZED),
    **dict.fromkeys(("multi_turn_scheduler", "completion_length_limit_scope", "use_gym_env", "gym_env"), _TURNS),
    **dict.fromkeys(("reward_funcs", "reward_weights", "reward_model", "reward_model_plugin"), _REWARDS),
    **dict.fromkeys(("teacher_kl_coef", "advantage_estimator", "scale_rewards", "dynamic_sample"), _REWARDS),
    **dict.fromkeys(("wandb_project", "wandb_exp_name", "wandb_save_dir", "swanlab_project"), _LOGGERS),
    **dict.fromkeys(("swanlab_exp_name", "swanlab_token", "swanlab_mode", "swanlab_workspace"), _LOGGERS),
    **dict.fromkeys(("log_params_norm", "tensorboard_queue_size", "tensorboard_log_interval"), _LOGGERS),
    **dict.fromkeys(("freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio"), _FREEZING),
    **dict.fromkeys(("trainable_parameters", "trainable_parameters_regex"), _FREEZING),
    **dict.fromkeys(("sgd_momentum", "muon_momentum", "muon_num_ns_steps"), _MUON),
    **dict.fromkeys(("attention_softmax_in_fp32", "apply_query_key_layer_scaling", "tp_comm_overlap"), _KWARGS),
    **dict.fromkeys(("no_bias_dropout_fusion", "moe_enable_deepep", "moe_router_load_balancing_type"), _KWARGS),
    **dict.fromkeys(("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity"), _KWARGS),
    **dict.fromkeys(("moe_token_drop_policy", "moe_router_bias_update_rate", "fp8_amax_history_len"), _KWARGS),
    **dict.fromkeys(("fp8_amax_compute_algo", "fp8_param_gather", "cross_entropy_fusion_impl"), _KWARGS),
    **dict.fromkeys(("vllm_use_async_engine", "vllm_data_parallel_size", "vllm_reasoning_parser"), _ENGINE),
    "vllm_max_lora_rank": "with rollout.weight_sync lora, set --max-lora-rank where `vllm serve` starts",
    "vllm_enable_lora": "rollout.engine vllm_server sends adapters alone with rollout.weight_sync lora",
    "vllm_speculative_config": "set speculative_config in rollout.vllm_engine_kwargs",
    "vllm_server_group_port": "weights are sent as rollout.weight_sync says",
    "offload_bridge": "weights are sent tensor by tensor, without a copy on the host",
    "move_model_batches": "weights are sent tensor by tensor",
    **dict.fromkeys(("adapter_load", "mcore_adapter"), "name a folder of PEFT adapters in lora.adapters"),
    **dict.fromkeys(("ref_model", "ref_adapters", "ref_load", "ref_adapter_load"), _REWARDS),
    **dict.fromkeys(("num_generations_eval", "importance_sampling_level", "epsilon", "epsilon_high"), _REWARDS),
    **dict.fromkeys(("delta", "top_entropy_quantile", "sync_ref_model", "reference_free"), _REWARDS),
    **dict.fromkeys(("bias_dropout_fusion", "bias_activation_fusion", "cp_comm_type", "overlap_p2p_comm"), _KWARGS),
    **dict.fromkeys(("batch_p2p_comm", "fp4_format", "fp4_recipe", "moe_layer_recompute"), _KWARGS),
    **dict.fromkeys(("apply_wd_to_qk_layernorm", "dsa_indexer_loss_coeff"), _KWARGS),
    **dict.fromkeys(("lr_warmup_init", "lr_wsd_decay_style", "lr_wsd_decay_iters"), _SCHEDULE),
    **dict.fromkeys(("weight_decay_incr_style", "start_weight_decay", "end_weight_decay"), _SCHEDULE),
    **dict.fromkeys(("num_labels", "problem_type"), "the students are language models"),
    **dict.fromkeys(("router_replay_mode", "mlp_padding_free"), "there is no such mode"),
    "custom_register_path": "write a row preprocessor, and name it in data.external_plugins and data.preprocessor",
    "vit_gradient_checkpointing_kwargs": "set train.vit_gradient_checkpointing",
    "vit_attn_impl": "set train.attention_backend",
    "bridge_backend": "checkpoints are read and written by mcore-bridge",
    "max_shard_size": "the files of an export have a size of their own",
    "microbatch_group_size_per_vp_stage": "Megatron-Core's default is used",
    "manual_gc_steps": "the garbage collector needs no setting",
    "load": "name a Hugging Face folder in student.model, or a run of this package in train.init_from",
    "mcore_model": "name a Hugging Face folder in student.model, or a run of this package in train.init_from",
    "no_load_optim": "train.init_from takes the weights of a run without its optimizer",
    "no_load_rng": "train.init_from takes the weights of a run without its optimizer",
    "resume_only_model": "train.init_from takes the weights of a run without its optimizer",
    "ignore_data_skip": "train.init_from starts with the first row; train.resume goes on where a run stopped",
    "template": "conversations are rendered by the tokenizer's chat template; set data.chat_template_kwargs",
    "agent_template": "tools are rendered by the tokenizer's chat template",
    "response_prefix": "set data.chat_template_kwargs, where the chat template has such a variable",
    "norm_bbox": "coordinates in rows are not changed",
    "padding_side": "rows of a microbatch follow each other without padding",
    "seq_length": "set data.max_length",
    "packing_length": "microbatches are packed to data.max_length",
    "packing_num_proc": "rows are packed while they are loaded",
    "interleave_prob": "give each entry of data.dataset a weight",
    "stopping_strategy": "give each entry of data.dataset a weight",
    "cached_dataset": "name the rows themselves; tokenized rows are kept in data.dataset_cache_dir",
    "data_seed": "train.seed is the seed of the data's order, too",
    "val_dataset_shuffle": "validation rows keep their order",
    "download_mode": "empty the cache of the hub instead",
    "model_kwargs": "set data.min_pixels and data.max_pixels",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN",
    "lr_decay_iters": "the decay ends with the run; train.min_lr is the learning rate there",
    "num_layers_per_virtual_pipeline_stage": "set parallel.virtual_pipeline_model_parallel_size",
    "microbatch_group_size_per_virtual_pipeline_stage": "Megatron-Core's default is used",
    "deterministic_mode": "repeated runs are compared in docs/correctness.md",
    "manual_gc": "the garbage collector needs no setting",
    "manual_gc_interval": "the garbage collector needs no setting",
    "use_cpu_initialization": "weights are read straight to the device",
    "transformer_impl": "Transformer Engine is used where it is installed",
    "tensorboard_dir": "TensorBoard events are written beside metrics.jsonl in output.output_dir",
    "enable_dft_loss": "distill.sft_alpha weighs the cross-entropy",
    "enable_channel_loss": "the loss is not reported by channel",
    "loss_type": "name the loss in distill.divergence",
    "label_smoothing": "name the loss in distill.divergence",
    "num_iterations": "rollout.steps_per_generation steps train on one generation",
    "rollout_importance_sampling_mode": "rollout.mismatch_kl_threshold warns where engine and trainer differ",
    "predict_with_generate": "validations compute the loss; `megatron-gkd generate` writes completions",
    "early_stop_interval": "the best checkpoint is kept; train.max_runtime limits the time",
    "mtp_num_layers": "layers that predict further tokens are not trained",
    "check_model": "files are compared with the model's shape in any case",
}  # fmt: skip
_TRL: dict[str, str] = {
    **dict.fromkeys(("fsdp", "fsdp_config"), _LAYOUT),
    **dict.fromkeys(("activation_offloading",), "recompute activations with parallel.recompute_granularity"),
    **dict.fromkeys(("use_bnb_nested_quant",), _QUANTIZED),
    **dict.fromkeys(("lora_task_type",), _ADAPTERS),
    "teacher_model_init_kwargs": "set teacher.teacher_model_revision and teacher_trust_remote_code",
    "model_init_kwargs": "set student.model_revision and trust_remote_code",
    "chat_template_path": "the chat template is that of the folder of student.model",
    "eos_token": "set rollout.stop_token_ids",
    "pad_token": "rows of a microbatch follow each other without padding",
    "pad_to_multiple_of": "rows of a microbatch follow each other without padding",
    "dataset_text_field": "rename the column to text with data.columns",
    "dataset_config": "write it behind the data set, id:subset, in data.dataset",
    "dataset_train_split": "write it behind the data set, id:split, in data.dataset",
    "dataset_test_split": "write it behind the data set, id:split, in data.val_dataset",
    "dataset_kwargs": "rows are always tokenized",
    "packing_strategy": "rows longer than data.max_length follow data.truncation_strategy",
    "completion_only_loss": "the loss is on responses alone",
    "hub_strategy": _HUB,
    **dict.fromkeys(("torch_compile", "tf32", "bf16_full_eval", "fp16_full_eval", "dataloader_drop_last"), _RUN),
    **dict.fromkeys(("eval_accumulation_steps", "eval_on_start", "disable_tqdm", "local_rank", "label_names"), _RUN),
    **dict.fromkeys(("trackio_space_id", "project"), _LOGGERS),
}  # fmt: skip
_BOTH: dict[str, str] = {
    "deepspeed": _LAYOUT,
    "gradient_accumulation_steps": "set train.global_batch_size: per_device_train_batch_size x "
    "gradient_accumulation_steps x data-parallel size",
    "per_device_eval_batch_size": "validations use train.micro_batch_size",
    "lr_scheduler_kwargs": "set train.min_lr",
    "logging_dir": "TensorBoard events are written beside metrics.jsonl in output.output_dir",
    "run_name": _LOGGERS,
    "gradient_checkpointing_kwargs": "set parallel.recompute_granularity, recompute_method and recompute_num_layers",
    "neftune_noise_alpha": "embeddings get no noise",
    "metric_for_best_model": "the best checkpoint is that of the least validation loss",
    "greater_is_better": "the best checkpoint is that of the least validation loss",
    "load_best_model_at_end": "the best checkpoint is kept; `megatron-gkd checkpoint export RUN best` writes it",
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "ddp_find_unused_parameters": "gradients are reduced by Megatron-Core",
    "full_determinism": "repeated runs are compared in docs/correctness.md",
    "save_on_each_node": "output.output_dir is a folder that the nodes share",
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "num_beams": "the student samples",
}
_NEMO: dict[str, str] = {
    "mixed_kl_weight": "with kl_type forward or reverse set distill.beta 0 or 1; the sum of both is not a divergence "
    "here",
    "kl_type": "set distill.beta: 0 for forward, 1 for reverse",
    "zero_outside_topk": "set distill.gkd_topk_tail",
    "num_prompts_per_step": "set train.global_batch_size",
    "logprob_batch_size": "the teacher scores the student's microbatches; set teacher.teacher_micro_batch_tokens",
    "logprob_chunk_size": "set distill.loss_chunk_tokens",
    "keep_top_k": "set output.save_total_limit: the newest are kept, beside the best",
}

UNSUPPORTED: dict[str, Unsupported] = {
    name: Unsupported(tools, reason)
    for tools, names in (((SWIFT,), _SWIFT), ((TRL,), _TRL), ((SWIFT, TRL), _BOTH), ((NEMO,), _NEMO))
    for name, reason in names.items()
}
"""Settings by name."""

SECTIONS = dict.fromkeys(
    ("policy", "distillation", "loss_fn", "checkpointing", "env", "logger", "grpo"),
    Unsupported((NEMO,), "`megatron-gkd migrate FILE` writes a recipe for it"),
)
"""Sections of other tools' YAML that no recipe has."""
