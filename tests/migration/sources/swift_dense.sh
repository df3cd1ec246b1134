#!/usr/bin/env bash
# LoRA student of 8B under a teacher of 32B: tensor, pipeline and context parallelism, vLLM in the training processes.
set -euo pipefail

export PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7

models=(--model Qwen/Qwen3-8B-Base --teacher_model Qwen/Qwen3-32B --offload_teacher_model true)
layout=(
    --tensor_model_parallel_size 2 --pipeline_model_parallel_size 2
    --context_parallel_size 2 --expert_model_parallel_size 1  # dense models
    --sequence_parallel true
)

NPROC_PER_NODE=8 megatron rlhf --rlhf_type gkd "${models[@]}" "${layout[@]}" \
    --tuner_type lora \
    --dataset "AI-ModelScope/alpaca-gpt4-data-en#2000" "AI-ModelScope/alpaca-gpt4-data-zh#2000" \
    --max_length 8192 --max_completion_length 8192 --padding_free true \
    --beta 1 --lmbda 1 --temperature 1.0 \
    --use_vllm true --vllm_mode colocate --sleep_level 1 \
    --vllm_gpu_memory_utilization 0.5 --vllm_max_model_len 16384 --vllm_tensor_parallel_size 1 \
    --micro_batch_size 2 --global_batch_size 16 --num_train_epochs 1 --lr 5e-6 \
    --torch_dtype bfloat16 --attention_backend flash --recompute_granularity selective \
    --finetune --no_save_optim --no_save_rng \
    --logging_steps 1
