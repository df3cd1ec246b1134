# Two turns of mathematics for each prompt; loss on the last one.
TOTAL=2000
NPROC_PER_NODE=4 \
CUDA_VISIBLE_DEVICES=0,1,2,3 \
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
megatron rlhf \
    --rlhf_type=gkd \
    --model=Qwen/Qwen3.5-2B \
    --teacher_model=Qwen/Qwen3.5-4B \
    --offload_teacher_model=true \
    --tuner_type=lora \
    --dataset="AI-ModelScope/NuminaMath-TIR#${TOTAL}" \
    --remove_unused_columns=false \
    --truncation_strategy=delete \
    --enable_thinking=false \
    --loss_scale=last_round \
    --multi_turn_scheduler=math_tip_trick \
    --max_turns=2 \
    --max_length=2048 \
    --max_completion_length=1024 \
    --padding_free=true \
    --lmbda=1 \
    --beta=0.5 \
    --temperature=1.0 \
    --use_vllm=true \
    --vllm_mode=colocate \
    --vllm_gpu_memory_utilization=0.3 \
    --vllm_tensor_parallel_size=1 \
    --vllm_max_model_len=4096 \
    --vllm_server_pass_dataset=true \
    --sleep_level=1 \
    --tensor_model_parallel_size=2 \
    --sequence_parallel=true \
    --recompute_granularity=selective \
    --attention_backend=flash \
    --torch_dtype=bfloat16 \
    --micro_batch_size=2 \
    --global_batch_size=16 \
    --num_train_epochs=1 \
    --lr=5e-6 \
    --finetune \
    --no_save_optim \
    --no_save_rng \
    --output_dir=output \
    --save_steps=200 \
    --save_total_limit=2 \
    --logging_steps=5
