# Teacher and student behind servers. The teacher's server is started first:
#   swift deploy --model Qwen/Qwen3.5-4B --infer_backend vllm --port 8000 --max_logprobs $logprobs
logprobs=64
prompt=2048
completion=2048
longest=$((prompt + completion))
echo "the servers need a length of $longest"

export IMAGE_MAX_TOKEN_NUM=1024

NPROC_PER_NODE=2 CUDA_VISIBLE_DEVICES=1,2 PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
megatron rlhf \
    --rlhf_type gkd \
    --model Qwen/Qwen3.5-4B \
    --teacher_model_server http://localhost:8000 \
    --gkd_logits_topk $logprobs \
    --dataset 'AI-ModelScope/clevr_cogen_a_train' \
    --max_length $prompt \
    --max_completion_length ${completion} \
    --padding_free true \
    --lmbda 1 --beta 0.5 --temperature 1.0 \
    --use_vllm true \
    --vllm_mode server \
    --vllm_server_host 127.0.0.1 \
    --vllm_server_port 8000 \
    --vllm_server_timeout 600 \
    --tensor_model_parallel_size 1 --pipeline_model_parallel_size 1 \
    --context_parallel_size 1 --expert_model_parallel_size 1 \
    --micro_batch_size 2 --global_batch_size 32 --train_iters 500 \
    --lr 5e-5 --lr_warmup_fraction 0.1 \
    --torch_dtype bfloat16 --attention_backend flash --recompute_granularity selective \
    --finetune --no_save_optim --no_save_rng \
    --save_steps 100 --save_total_limit 10 --logging_steps 1
