"""What keeps vLLM from being started in the ranks: no vLLM is needed to see it."""

from __future__ import annotations

import pytest
from checkpoints import tiny_checkpoint

from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.rollout.vllm.process import require_head_dim


def test_a_size_of_heads_without_a_kernel_is_refused():
    checkpoint = Checkpoint.open(str(tiny_checkpoint("qwen3", head_dim=24)))
    message = rf"{checkpoint.path}: head_dim = 24: vLLM can't serve this on CPUs; allowed are 32, 64; use"
    with pytest.raises(UserError, match=message):
        require_head_dim(checkpoint, [32, 64])
    require_head_dim(checkpoint, [24])
    require_head_dim(checkpoint, [])


def test_the_size_of_heads_may_follow_from_other_sizes():
    checkpoint = Checkpoint.open(str(tiny_checkpoint("llama")))
    checkpoint.config.head_dim = None
    checkpoint.config.hidden_size, checkpoint.config.num_attention_heads = 96, 4
    with pytest.raises(UserError, match="head_dim = 24"):
        require_head_dim(checkpoint, [32])
