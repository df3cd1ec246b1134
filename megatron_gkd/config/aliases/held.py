"""Settings of other tools that hold here anyway: accepted with the values that hold, and nothing else happens."""

from megatron_gkd.config.aliases.entry import NEMO, SWIFT, TRL, Held

_BOTH = (SWIFT, TRL)

HELD: dict[str, Held] = {
    "rlhf_type": Held((SWIFT,), ("gkd",), "the package does nothing else"),
    "task_type": Held((SWIFT,), ("causal_lm",), "the students are language models"),
    "finetune": Held(
        (SWIFT,), (True,), "a run starts from the weights of the model", "train.resume continues an earlier run"
    ),
    "no_save_rng": Held(
        (SWIFT,), (True, False), "the order of rows and the samples follow from the seed; few bytes are saved"
    ),
    "padding_free": Held(_BOTH, (True,), "rows of a microbatch follow each other without padding"),
    "seq_kd": Held(
        _BOTH,
        (False,),
        "responses are the data's or the student's",
        "write the teacher's responses with `megatron-gkd generate recipe.yaml --from teacher --output rows.jsonl`, "
        "and train on rows.jsonl with distill.lmbda 0",
    ),
    "cross_entropy_loss_fusion": Held((SWIFT,), (True,), "head and loss are one op"),
    "use_fused_linear_loss": Held((TRL,), (True,), "head and loss are one op, over distill.loss_chunk_tokens tokens"),
    "use_liger_kernel": Held(_BOTH, (True, False), "the package has its own kernels", ""),
    "calculate_per_token_loss": Held(
        (SWIFT,), (True,), "the loss is the mean over the response tokens of the global batch"
    ),
    "average_tokens_across_devices": Held(
        _BOTH, (True,), "the loss is the mean over the response tokens of the global batch"
    ),
    "optimizer": Held((SWIFT,), ("adam", "adamw"), "the optimizer is AdamW"),
    "optim": Held(_BOTH, ("adamw_torch", "adamw_torch_fused", "adamw"), "the optimizer is AdamW"),
    "fp16": Held(_BOTH, (False,), "train.dtype is bf16 or fp32"),
    "disable_dropout": Held((TRL,), (True,), "there is no dropout but lora.lora_dropout"),
    "attention_dropout": Held((SWIFT,), (0, 0.0), "there is no dropout but lora.lora_dropout"),
    "hidden_dropout": Held((SWIFT,), (0, 0.0), "there is no dropout but lora.lora_dropout"),
    "ddp_backend": Held(_BOTH, ("nccl",), "GPUs use NCCL"),
    "distributed_backend": Held((SWIFT,), ("nccl",), "GPUs use NCCL"),
    "save_safetensors": Held(_BOTH, (True,), "exports are safetensors"),
    "safe_serialization": Held((SWIFT,), (True,), "exports are safetensors"),
    "ckpt_format": Held((SWIFT,), ("torch_dist",), "checkpoints are torch.distributed.checkpoint's"),
    "use_chat_template": Held((SWIFT,), (True,), "conversations are rendered by the tokenizer's chat template"),
    "template_backend": Held((SWIFT,), ("jinja",), "conversations are rendered by the tokenizer's chat template"),
    "add_version": Held((SWIFT,), (False,), "output.output_dir is the folder itself, in which a run is continued"),
    "create_checkpoint_symlink": Held((SWIFT,), (False,), "`megatron-gkd checkpoint list` names the best and the last"),
    "remove_unused_columns": Held(_BOTH, (True,), "other columns of the rows are for preprocessors alone"),
    "lazy_tokenize": Held((SWIFT,), (False,), "rows are tokenized before training", "set data.streaming"),
    "load_from_cache_file": Held(
        (SWIFT,), (True,), "tokenized rows are kept", "name an empty folder in data.dataset_cache_dir"
    ),
    "save_strategy": Held(
        _BOTH, ("steps",), "checkpoints are counted in steps", "set output.save_interval, null for none"
    ),
    "eval_strategy": Held(
        _BOTH, ("steps",), "validations are counted in steps", "set train.eval_interval; none without data.val_dataset"
    ),
    "logging_strategy": Held(_BOTH, ("steps",), "progress is counted in steps"),
    "logging_first_step": Held(_BOTH, (True,), "every step is in metrics.jsonl"),
    "do_train": Held((TRL,), (True,), "`megatron-gkd train` trains"),
    "push_to_hub": Held(
        _BOTH, (False,), "exports stay in output.output_dir", "upload output_dir/hf with `hf upload` after the run"
    ),
    "max_turns": Held((SWIFT,), (1,), "a completion is one turn", "multi-turn rollouts are not supported"),
    "max_rollout_turns": Held((NEMO,), (1,), "a completion is one turn", "multi-turn rollouts are not supported"),
    "vllm_server_pass_dataset": Held((SWIFT,), (False,), "servers get prompts alone"),
    "sequence_parallel_size": Held(
        (SWIFT,), (1,), "sequences are sharded by context parallelism", "set parallel.context_parallel_size"
    ),
    "vllm_pipeline_parallel_size": Held((SWIFT,), (1,), "an engine has tensor parallelism alone"),
    "load_in_4bit": Held((TRL,), (False,), "the base of adapters has train.dtype"),
    "load_in_8bit": Held((TRL,), (False,), "the base of adapters has train.dtype"),
    "async_engine": Held((NEMO,), (False,), "the engine of rollout.engine vllm works step by step"),
    "use_ray": Held((SWIFT,), (False,), "the processes are started by --nproc or torchrun"),
    "log_throughput": Held((SWIFT,), (True,), "metrics.jsonl holds the tokens per second"),
    "ignore_args_error": Held((SWIFT,), (False,), "an unknown key is an error"),
}  # fmt: skip
"""Settings by name."""
