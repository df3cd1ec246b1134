# The student as its own teacher, which sees the worked solution (arXiv:2601.18734).
WORKERS=${WORKERS:-8}
CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7" NPROC_PER_NODE=$WORKERS \
    PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
    megatron rlhf \
    --rlhf_type gkd --model Qwen/Qwen3-4B \
    --dataset 'open-r1/OpenThoughts-114k-math' \
    --external_plugins examples/train/rlhf/opsd/opsd_plugin.py \
    --lmbda 1.0 --beta 0.5 --sft_alpha 0 --temperature 1.2 \
    --max_length 8192 --max_completion_length 2048 \
    --use_vllm true --vllm_mode colocate --vllm_max_model_len 10240 --vllm_gpu_memory_utilization 0.6 --sleep_level 1 \
    --micro_batch_size 1 --global_batch_size 32 --train_iters 1000 --lr 2e-5 \
    --tensor_model_parallel_size 1 --pipeline_model_parallel_size 1 \
    --torch_dtype bfloat16 --attention_backend flash --recompute_granularity selective \
    --finetune --no_save_optim --no_save_rng \
    --save_steps 100 --save_total_limit 10 --logging_steps 1 2>&1 | tee opsd.log
