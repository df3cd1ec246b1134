"""Tiny random Hugging Face checkpoints of every supported family, with a tokenizer, for tests."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(num_words: int = 60, prefix: str = "w") -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each of `w0 w1 …`, and ChatML's control tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    words = special + [f"{prefix}{i}" for i in range(num_words)] + ["user", "assistant", "system", "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def family_config(family: str, **changes) -> PretrainedConfig:
    """Return a configuration of a family, with other values of Hugging Face's keys.

    Args:
        family: llama, qwen2, qwen2_tied, qwen3, qwen3_tied or qwen3_moe.
        changes: values by key.
    """
    sizes = dict(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.08,
        tie_word_embeddings=family.endswith("_tied"),
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    sizes |= changes
    match family.removesuffix("_tied"):
        case "llama":
            scaling = dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
                rope_theta=10000.0,
            )
            return LlamaConfig(**sizes, rope_parameters=scaling)
        case "qwen2":
            return Qwen2Config(**sizes)
        case "qwen3":
            return Qwen3Config(**{"head_dim": 16} | sizes)
        case "qwen3_moe":
            experts = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
            return Qwen3MoeConfig(
                **{"head_dim": 16} | experts | sizes, decoder_sparse_step=1, router_aux_loss_coef=0.01
            )
    raise ValueError(family)


@functools.cache
def tiny_checkpoint(family: str, seed: int = 0, **changes) -> Path:
    """Return a checkpoint folder, made once a session; the same arguments give the same weights."""
    torch.manual_seed(seed)
    # mcore-bridge registers its own for all models of the process; it can not read configurations of transformers 5.19.
    ROPE_INIT_FUNCTIONS.pop("default", None)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # neither ones nor zeros: a mix-up must show
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    path = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    model.should_save_on_this_rank = lambda is_main_process: True  # transformers 5.19 would write in rank 0 only
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    assert AutoConfig.from_pretrained(path).vocab_size == model.config.vocab_size
    return path
