"""Models of a supported family whose head has a bias, a scale and a softcap, as those of no supported family do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from checkpoints import tiny_checkpoint
from torch import nn

from megatron_gkd.checkpoint_format.families import FAMILIES
from megatron_gkd.checkpoint_format.output_head import HEAD_KEYS, read_head_scaling
from megatron_gkd.ops import reference

BIAS_SEED = "seed_of_the_heads_bias"
"""A key of config.json: the tests' alone."""
# Logits of these models are about 0.5: all are bent, and many are near the cap.
STUDENT = functools.partial(
    tiny_checkpoint,
    "qwen3_tied",
    seed=2,
    num_hidden_layers=2,
    **{"logits_scaling": 0.4, "final_logit_softcapping": 1.5, BIAS_SEED: 5},
)
TEACHER = functools.partial(
    tiny_checkpoint,
    "qwen3",
    seed=1,
    num_hidden_layers=2,
    hidden_size=48,
    vocab_size=112,
    **{"logit_scale": 3.0, "final_logit_softcapping": 2.5, BIAS_SEED: 6},
)


def bias_of(config) -> torch.Tensor:
    """Return the whole bias, fp32 [V], of a model of transformers."""
    return torch.randn(config.vocab_size, generator=torch.Generator().manual_seed(getattr(config, BIAS_SEED)))


class Head(nn.Module):
    """In place of a transformers model's head."""

    def __init__(self, model) -> None:
        super().__init__()
        self.weight = model.lm_head.weight
        self.bias = nn.Parameter(bias_of(model.config).to(self.weight.dtype))
        self.scaling = read_head_scaling(model.config.to_dict(), HEAD_KEYS)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return reference.logits(hidden, self.weight, bias=self.bias, **vars(self.scaling))


def with_head(model):
    """Return a transformers model with the head that its config.json asks for."""
    model.lm_head = Head(model)
    return model


@contextlib.contextmanager
def heads_are_read() -> Iterator[None]:
    """Make Megatron's models of the families qwen3 and qwen3_tied read their heads' keys, in this process."""
    from megatron_gkd.models.megatron_model import MegatronModel

    load = MegatronModel.load.__func__

    def load_with_bias(cls, checkpoint, mesh, *args, **options):
        model = load(cls, checkpoint, mesh, *args, **options)
        if model.head_weight is not None:
            model.chunks[-1].output_layer.bias = _shard(bias_of(checkpoint.config), model.head_weight.shape[0], mesh.tp)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "qwen3", replace(FAMILIES["qwen3"], head_keys=HEAD_KEYS))
        patch.setattr(MegatronModel, "load", classmethod(load_with_bias))
        yield


def _shard(whole: torch.Tensor, rows: int, group: dist.ProcessGroup) -> nn.Parameter:
    padded = torch.cat([whole, torch.full((rows * group.size() - len(whole),), 99.0)])  # padding must not count
    bias = nn.Parameter(padded.chunk(group.size())[group.rank()].clone())
    bias.tensor_model_parallel, bias.partition_dim, bias.partition_stride = True, 0, 1
    return bias


def bias_gradient(student) -> torch.Tensor:
    """Return the whole gradient of the student's bias on every rank."""
    mesh, vocab_size = student.model.mesh, student.model.checkpoint.vocab_size
    whole = torch.zeros(vocab_size)
    if student.model.head is not None:
        own = student.model.head.bias.main_grad
        shards = [torch.empty_like(own) for _ in range(mesh.tp.size())]
        dist.all_gather(shards, own, group=mesh.tp)
        whole = torch.cat(shards)[:vocab_size].contiguous()
    dist.broadcast(whole, src=dist.get_world_size() - 1)
    return whole
