# Full training on Hugging Face models with DeepSpeed; the teacher's answers are written first.
export teacher='Qwen/Qwen2.5-14B-Instruct'
swift infer --model $teacher --infer_backend vllm --val_dataset 'AI-ModelScope/alpaca-gpt4-data-en#5000' \
    --max_new_tokens 2048 --result_path answers.jsonl

NPROC_PER_NODE=4 CUDA_VISIBLE_DEVICES=0,1,2,3 \
swift rlhf --rlhf_type gkd \
    --model Qwen/Qwen2.5-7B --teacher_model $teacher --train_type full \
    --dataset answers.jsonl --split_dataset_ratio 0.01 --lmbda 0 --seq_kd false \
    --torch_dtype bfloat16 --attn_impl flash_attn --deepspeed zero3 --teacher_deepspeed zero3_offload \
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 \
    --num_train_epochs 1 --learning_rate 1e-5 --warmup_ratio 0.05 \
    --max_length 2048 --eval_steps 100 --save_steps 100 --save_total_limit 2 --save_only_model true \
    --logging_steps 5 --output_dir output --dataloader_num_workers 4 --dataset_num_proc 4
