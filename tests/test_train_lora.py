"""Runs that train adapters, whole: what they leave behind, and what they start from."""

from __future__ import annotations

import torch
from checkpoints import tiny_checkpoint
from command_line import run, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LORA = "--tuner_type lora --lora_rank 4 --lora_alpha 16 --lora_dropout 0.1 --lr 0.01 --adam_eps 1e-3".split()
LORA += ["--global_batch_size", "4"]


def adapters_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_exports_open_in_transformers_and_peft_and_start_other_runs(workspace):
    from peft import PeftModel

    options = (*LORA, "--dtype", "fp32", "--merge_lora", "true", "--save_interval", "2", "--train_iters", "4")
    finished = train(workspace, *options)
    assert finished.returncode == 0, finished.stderr
    folder = workspace / "runs/x"
    assert "exporting to runs/x/adapters-step-000002 (PEFT adapters) and runs/x/hf-step-000002 (adapters merged)" in (
        finished.stdout
    )
    assert "adapters   runs/x/adapters\ncheckpoint runs/x/hf\n" in finished.stdout
    assert "K trainable" in finished.stdout
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3_tied", seed=2), dtype=torch.float32)
    prompt = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        logits = base(prompt).logits
        for suffix in ("-step-000002", ""):
            adapted = PeftModel.from_pretrained(base, folder / f"adapters{suffix}").eval()
            expected = AutoModelForCausalLM.from_pretrained(folder / f"hf{suffix}", dtype=torch.float32)(prompt).logits
            assert torch.allclose(adapted(prompt).logits, expected, atol=1e-5)
            assert not torch.allclose(logits, expected, atol=1e-3)
            base = adapted.unload()
    assert AutoTokenizer.from_pretrained(folder / "adapters").eos_token == "<|im_end|>"

    again = (*LORA, "--dtype", "fp32", "--train_iters", "1", "--lr", "1e-9", "--export_interval", "null")
    started = train(workspace, *again, "--adapters", "runs/x/adapters", "--output_dir", "runs/y")
    assert started.returncode == 0, started.stderr
    assert "with the adapters of runs/x/adapters" in started.stdout and not (workspace / "runs/y/hf").exists()
    first, second = adapters_of(folder / "adapters"), adapters_of(workspace / "runs/y/adapters")
    assert all(torch.allclose(first[name], second[name], atol=1e-7) for name in first)

    for flags, name in ((["--merge"], "hf"), ([], "adapters")):
        exported = run(workspace, "checkpoint", "export", "runs/x", "4", "--output", name, *flags)
        assert exported.returncode == 0, exported.stderr
        for path in (folder / name).iterdir():
            assert (workspace / name / path.name).read_bytes() == path.read_bytes(), path


def refusal(folder, *options):
    refused = run(folder, "train", "recipe.yaml", *options)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
    return refused.stderr


def test_adapters_that_can_not_be_started_from_are_refused_in_one_line(workspace):
    options = (*LORA, "--train_iters", "1", "--tensor_model_parallel_size", "1", "--export_interval", "null")
    assert train(workspace, *options, processes=1).returncode == 0
    other = ("--output_dir", "runs/y", "--adapters")
    key = "lora.adapters = runs/x/adapters"
    assert f"{key}: has rank 4 for model.layers.0.self_attn.q_proj; lora.lora_rank (or rank_pattern) gives it 8" in (
        refusal(workspace, *options, *other, "runs/x/adapters", "--lora_rank", "8", "--lora_alpha", "32")
    )
    message = "lora.adapters = nowhere: must be a folder of PEFT adapters; there is no adapter_config.json in it"
    assert message in refusal(workspace, *options, *other, "nowhere")
    base = ("--model", str(tiny_checkpoint("qwen3_tied", seed=3)))
    assert (
        refusal(workspace, *options, *other, "runs/x/adapters", *base).count(f"{key}: its adapters are of other") == 1
    )
    refused = run(workspace, "checkpoint", "export", "runs/x", "--merge=1")
    assert refused.returncode == 2 and "--merge = 1: takes no value" in refused.stderr
