"""Random models, without a checkpoint on disk, and random rows for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.data.microbatch import Microbatch, collate
from megatron_gkd.data.sample import Sample
from megatron_gkd.models.build_options import BuildOptions
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Mesh


def build_random_model(mesh: Mesh, config: PretrainedConfig) -> MegatronModel:
    """Build a model in bf16 with random weights."""
    checkpoint = Checkpoint(Path("random"), config, {})
    model = MegatronModel.load(checkpoint, mesh, BuildOptions(dtype=torch.bfloat16), needs_weights=False)
    with torch.no_grad():
        for chunk in model.chunks:
            for name, parameter in chunk.named_parameters():
                parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02)
    return model


def random_microbatch(vocab_size: int, length: int, seed: int) -> Microbatch:
    """Return a microbatch of one row of random ids, on the device; each is the label of the one before it."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, length)
    sample = Sample(input_ids=tokens, labels=np.append(tokens[1:], -100), source="dataset", row_id=0)
    return collate([sample], pad_multiple=1, pad_token_id=0).to(portability.device())
