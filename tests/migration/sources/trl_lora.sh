accelerate launch --num_processes 4 trl/experimental/gkd/gkd.py \
    --model_name_or_path="Qwen/Qwen2-0.5B-Instruct" \
    --teacher_model_name_or_path="Qwen/Qwen2-1.5B-Instruct" \
    --dataset_name="trl-lib/chatbot_arena_completions" \
    --use_peft --lora_r=64 --lora_alpha=16 \
    --learning_rate=2e-4 --num_train_epochs=1 \
    --per_device_train_batch_size=4 --gradient_accumulation_steps=8 \
    --output_dir="gkd-model" --push_to_hub
