"""The settings of NeMo-RL's distillation as data: the key of each that has one, or the reason why it has none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A setting of NeMo-RL with a key of the recipe.

    Attributes:
        leaf: the key.
        note: a remark for the documentation.
        is_written: whether the value is that of the key; false where other code computes it.
    """

    leaf: str
    note: str = ""
    is_written: bool = True


_GENERATION, _VLLM = "policy.generation", "policy.generation.vllm_cfg"
_MEGATRON, _DTENSOR = "policy.megatron_cfg", "policy.dtensor_cfg"

COMMON: dict[str, Setting] = {
    "policy.model_name": Setting("model"),
    "teacher.model_name": Setting("teacher_model"),
    "policy.tokenizer.chat_template_kwargs": Setting("chat_template_kwargs"),
    "policy.train_global_batch_size": Setting("global_batch_size"),
    "policy.train_micro_batch_size": Setting("micro_batch_size", "1 with packing"),
    "policy.max_total_sequence_length": Setting("max_length"),
    "policy.sequence_packing.enabled": Setting("packing"),
    "policy.max_grad_norm": Setting("clip_grad"),
    "policy.precision": Setting("dtype", "`bfloat16`: `bf16`, `float32`: `fp32`", is_written=False),
    "distillation.num_prompts_per_step": Setting(
        "steps_per_generation", "x `num_generations_per_prompt` / `train_global_batch_size`", is_written=False
    ),
    "distillation.num_generations_per_prompt": Setting("num_generations"),
    "distillation.max_num_steps": Setting("train_iters", "x `steps_per_generation`", is_written=False),
    "distillation.max_num_epochs": Setting("num_train_epochs", "where `max_num_steps` is null", is_written=False),
    "distillation.val_period": Setting("eval_interval", "x `steps_per_generation`", is_written=False),
    "distillation.topk_logits_k": Setting("gkd_logits_topk"),
    "distillation.seed": Setting("seed"),
    "loss_fn.kl_type": Setting("beta", "`forward`: 0, `reverse`: 1", is_written=False),
    "checkpointing.checkpoint_dir": Setting("output_dir"),
    "checkpointing.save_period": Setting("save_interval", "x `steps_per_generation`", is_written=False),
    "checkpointing.keep_top_k": Setting("save_total_limit", "the newest, and the best"),
    "checkpointing.save_optimizer": Setting("save_optim"),
    "data.train": Setting("dataset", "`data_path`, or the hub's id of `dataset_name`", is_written=False),
    "data.validation": Setting("val_dataset", "as `data.train`", is_written=False),
    "data.shuffle": Setting("shuffle"),
    "data.max_input_seq_length": Setting(
        "max_prompt_length", "as much as `max_new_tokens` leaves of `max_total_sequence_length`", is_written=False
    ),
    "data.default.system_prompt_file": Setting("system"),
    f"{_GENERATION}.backend": Setting("engine", "`vllm` or `megatron`", is_written=False),
    f"{_GENERATION}.colocated.enabled": Setting("engine", "false: `vllm_server`", is_written=False),
    f"{_GENERATION}.max_new_tokens": Setting(
        "max_completion_length", "with room for the prompt in `max_length`", is_written=False
    ),
    f"{_GENERATION}.temperature": Setting("rollout_temperature"),
    f"{_GENERATION}.top_p": Setting("top_p"),
    f"{_GENERATION}.top_k": Setting("top_k"),
    f"{_GENERATION}.stop_token_ids": Setting("stop_token_ids"),
    f"{_GENERATION}.stop_strings": Setting("stop_words"),
    f"{_VLLM}.tensor_parallel_size": Setting("vllm_tensor_parallel_size"),
    f"{_VLLM}.expert_parallel_size": Setting("vllm_enable_expert_parallel", "above 1: true", is_written=False),
    f"{_VLLM}.gpu_memory_utilization": Setting("vllm_gpu_memory_utilization"),
    f"{_VLLM}.max_model_len": Setting("vllm_max_model_len"),
    f"{_VLLM}.enforce_eager": Setting("enforce_eager"),
    f"{_GENERATION}.vllm_kwargs": Setting("vllm_engine_kwargs"),
}
MEGATRON: dict[str, Setting] = {
    **{
        f"{_MEGATRON}.{name}": Setting(name)
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "sequence_parallel",
            "moe_router_dtype",
            "moe_token_dispatcher_type",
            "moe_shared_expert_overlap",
            "freeze_moe_router",
        )
    },
    f"{_MEGATRON}.num_layers_in_first_pipeline_stage": Setting("decoder_first_pipeline_num_layers"),
    f"{_MEGATRON}.num_layers_in_last_pipeline_stage": Setting("decoder_last_pipeline_num_layers"),
    f"{_MEGATRON}.optimizer.lr": Setting("lr"),
    f"{_MEGATRON}.optimizer.min_lr": Setting("min_lr"),
    f"{_MEGATRON}.optimizer.weight_decay": Setting("weight_decay"),
    f"{_MEGATRON}.optimizer.adam_beta1": Setting("adam_beta1"),
    f"{_MEGATRON}.optimizer.adam_beta2": Setting("adam_beta2"),
    f"{_MEGATRON}.optimizer.adam_eps": Setting("adam_eps"),
    f"{_MEGATRON}.optimizer.use_distributed_optimizer": Setting("distributed_optimizer"),
    f"{_MEGATRON}.optimizer.use_precision_aware_optimizer": Setting("use_precision_aware_optimizer"),
    f"{_MEGATRON}.optimizer.optimizer_cpu_offload": Setting("optimizer_cpu_offload"),
    f"{_MEGATRON}.optimizer.optimizer_offload_fraction": Setting(
        "optimizer_offload_fraction", "with `optimizer_cpu_offload`", is_written=False
    ),
    f"{_MEGATRON}.scheduler.lr_decay_style": Setting("lr_decay_style"),
    f"{_MEGATRON}.scheduler.lr_warmup_iters": Setting("lr_warmup_iters"),
    f"{_MEGATRON}.distributed_data_parallel_config.overlap_grad_reduce": Setting("overlap_grad_reduce"),
    f"{_MEGATRON}.distributed_data_parallel_config.overlap_param_gather": Setting("overlap_param_gather"),
    f"{_MEGATRON}.activation_checkpointing": Setting("recompute_granularity", is_written=False),
    f"{_MEGATRON}.peft.enabled": Setting("tuner_type", "true: `lora`", is_written=False),
    f"{_MEGATRON}.peft.dim": Setting("lora_rank", is_written=False),
    f"{_MEGATRON}.peft.alpha": Setting("lora_alpha", is_written=False),
    f"{_MEGATRON}.peft.dropout": Setting("lora_dropout", is_written=False),
    f"{_MEGATRON}.fp8_cfg.enabled": Setting("fp8_format", "true: `fp8_cfg.fp8`", is_written=False),
}
DTENSOR: dict[str, Setting] = {
    f"{_DTENSOR}.tensor_parallel_size": Setting("tensor_model_parallel_size"),
    f"{_DTENSOR}.context_parallel_size": Setting("context_parallel_size"),
    f"{_DTENSOR}.sequence_parallel": Setting("sequence_parallel"),
    f"{_DTENSOR}.activation_checkpointing": Setting("recompute_granularity", is_written=False),
    "policy.optimizer.kwargs.lr": Setting("lr"),
    "policy.optimizer.kwargs.weight_decay": Setting("weight_decay"),
    "policy.optimizer.kwargs.betas": Setting("adam_beta1", "and `adam_beta2`", is_written=False),
    "policy.optimizer.kwargs.eps": Setting("adam_eps"),
    "policy.scheduler": Setting("lr_decay_style", "and `lr_warmup_iters`", is_written=False),
}

SILENT: dict[str, tuple[object, ...]] = {
    "distillation.max_rollout_turns": (1, None),
    "distillation.val_at_start": (False, None),
    "distillation.val_at_end": (False, None),
    "loss_fn.zero_outside_topk": (False, None),
    "checkpointing.enabled": (True,),
    "checkpointing.checkpoint_must_save_by": (None,),
    "policy.dynamic_batching.enabled": (False,),
    "policy.offload_optimizer_for_logprob": (False,),
    "policy.optimizer.name": ("torch.optim.AdamW",),
    f"{_DTENSOR}.cpu_offload": (False,),
    f"{_DTENSOR}.custom_parallel_plan": (None,),
    f"{_MEGATRON}.optimizer.optimizer": ("adam",),
    f"{_MEGATRON}.optimizer.fp16": (False,),
    f"{_MEGATRON}.optimizer.overlap_cpu_optimizer_d2h_h2d": (False,),
    f"{_MEGATRON}.cuda_graph_impl": ("none", None),
    f"{_MEGATRON}.moe_enable_deepep": (False,),
    f"{_MEGATRON}.moe_router_load_balancing_type": ("none",),
    f"{_MEGATRON}.moe_router_bias_update_rate": (0.0,),
    f"{_MEGATRON}.fine_grained_activation_offloading": (False,),
    f"{_VLLM}.async_engine": (False,),
    f"{_VLLM}.pipeline_parallel_size": (1,),
    f"{_VLLM}.kv_cache_dtype": ("auto",),
    f"{_VLLM}.use_deep_gemm": (False,),
}
"""By setting, the values that hold here anyway."""

WITHOUT_MEANING = (
    f"{_MEGATRON}.optimizer.bf16",
    f"{_MEGATRON}.optimizer.params_dtype",
    f"{_MEGATRON}.optimizer.sgd_momentum",
    f"{_MEGATRON}.optimizer.clip_grad",
    f"{_MEGATRON}.pipeline_dtype",
    f"{_MEGATRON}.cuda_graph_warmup_steps",
    f"{_VLLM}.precision",
    "policy.sequence_packing.train_mb_tokens",
    "policy.sequence_packing.logprob_mb_tokens",
    "policy.dynamic_batching.train_mb_tokens",
    "policy.dynamic_batching.logprob_mb_tokens",
    "policy.dynamic_batching.sequence_length_round",
    "policy.sequence_packing.sequence_length_round",
    "checkpointing.higher_is_better",
)
"""Settings that repeat others, or that belong to one that is reported."""

_FUSIONS = "kernels are chosen by what is installed; the section megatron has switches"
REASONS: dict[str, str] = {
    "env": "there are no environments and rewards; the loss is the divergence from the teacher",
    "logger": "metrics go to TensorBoard and output_dir/metrics.jsonl",
    "cluster": "start the processes with --nproc and --nnodes, without Ray",
    "teacher": "the teacher has the student's layout and microbatches",
    "loss_fn.mixed_kl_weight": "a weighted sum of both KL divergences is not a divergence here (distill.divergence)",
    "loss_fn.zero_outside_topk": "distill.gkd_topk_tail renormalizes the most likely tokens or counts the others "
    "as one",
    "distillation.max_rollout_turns": "multi-turn rollouts are not supported: a completion is one turn",
    "distillation.val_batch_size": "validations use train.micro_batch_size",
    "distillation.max_val_samples": "set train.eval_iters: validate on that many times global_batch_size rows",
    "distillation.val_at_start": "validations are counted in steps (train.eval_interval)",
    "distillation.val_at_end": "validations are counted in steps (train.eval_interval)",
    "distillation.max_num_epochs": "train.train_iters ends the run",
    "checkpointing.metric_name": "the best checkpoint is that of the least validation loss",
    "checkpointing.higher_is_better": "the best checkpoint is that of the least validation loss",
    "checkpointing.checkpoint_must_save_by": "set train.max_runtime",
    "checkpointing": "checkpoints are those of docs/checkpoints.md",
    "policy.tokenizer": "the tokenizer is that of the folder of student.model",
    "policy.generation_batch_size": "vLLM batches prompts itself; rollout.max_batch_tokens limits the engine megatron",
    "policy.logprob_batch_size": "the teacher scores the student's microbatches (teacher.teacher_micro_batch_tokens)",
    "policy.logprob_chunk_size": "head and loss are one op over distill.loss_chunk_tokens tokens",
    "policy.offload_optimizer_for_logprob": "set memory.offload_optimizer",
    "policy.dynamic_batching": "set data.packing: microbatches of data.max_length tokens",
    "policy.sequence_packing": "microbatches are packed to data.max_length tokens",
    "policy.make_sequence_length_divisible_by": "sequences are padded as the layout needs it",
    "policy.optimizer": "the optimizer is AdamW",
    "policy.scheduler": "train.lr_decay_style is cosine, linear or constant, after a linear warm-up",
    "policy.dtensor_cfg": "the layout is that of the section parallel",
    "policy.automodel_cfg": "the layout is that of the section parallel",
    f"{_MEGATRON}.peft": "adapters are those of the section lora",
    f"{_MEGATRON}.fp8_cfg": "set megatron.fp8_format and fp8_recipe",
    f"{_MEGATRON}.optimizer": "the optimizer is AdamW; its types are in the section memory",
    f"{_MEGATRON}.scheduler": "train.lr_decay_style is cosine, linear or constant, after a linear warm-up from 0",
    f"{_MEGATRON}.distributed_data_parallel_config": "gradients are reduced in memory.main_grads_dtype",
    f"{_MEGATRON}.moe_permute_fusion": _FUSIONS,
    f"{_MEGATRON}.apply_rope_fusion": _FUSIONS,
    f"{_MEGATRON}.bias_activation_fusion": _FUSIONS,
    f"{_MEGATRON}.gradient_accumulation_fusion": _FUSIONS,
    _MEGATRON: "where the model needs it, set it in megatron.megatron_extra_kwargs",
    f"{_GENERATION}.colocated": "servers are started with `vllm serve`",
    f"{_GENERATION}.val_temperature": "validations compute the loss on the rows' responses",
    f"{_GENERATION}.val_top_p": "validations compute the loss on the rows' responses",
    f"{_GENERATION}.val_top_k": "validations compute the loss on the rows' responses",
    _VLLM: "rollout.vllm_engine_kwargs takes further arguments of vLLM's engine",
    _GENERATION: "the section rollout has no such key",
    "policy": "no key of a recipe has this meaning",
    "data.default.prompt_file": "write a row preprocessor that puts the prompt around the question (docs/extending.md)",
    "data": "rows are named in data.dataset and data.val_dataset",
}
"""By setting or section, why the recipe does not have it; the longest name that fits counts."""

DATASETS = {
    "DeepScaler": "agentica-org/DeepScaleR-Preview-Dataset",
    "AIME2024": "HuggingFaceH4/aime_2024",
    "OpenMathInstruct-2": "nvidia/OpenMathInstruct-2",
    "gsm8k": "openai/gsm8k:main:train",
    "tulu3_sft_mixture": "allenai/tulu-3-sft-mixture",
}
"""Hub ids of NeMo-RL's own names of data sets."""
