"""The logits of a sharded model, whole and in the tokens' order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

LENGTHS = (7, 16, 11)


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 99, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def logits_of_megatron(model) -> torch.Tensor | None:
    """Return the logits [tokens, V] of the packed sequences, in order, on the last stage's ranks; None elsewhere."""
    from megatron_gkd.data.microbatch import collate, shard_context_parallel
    from megatron_gkd.data.sample import Sample
    from megatron_gkd.models.megatron_model import hidden_states, in_eval_mode
    from megatron_gkd.models.pipeline import Pipeline
    from megatron_gkd.runtime.context_parallel import context_parallel_indices

    mesh = model.mesh
    samples = [Sample(s.numpy(), s.numpy(), "dataset", i) for i, s in enumerate(sequences())]
    whole = collate(samples, pad_multiple=mesh.layout.pad_multiple, pad_token_id=0)
    head = model.head

    def gathered(x, group, dim):
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    def logits(hidden, microbatch):
        rows = hidden.squeeze(0)
        if mesh.layout.sequence_parallel:
            rows = gathered(rows, mesh.tp, 0)
        own = gathered(head.compute_logits(rows), mesh.tp, 1)[:, : model.checkpoint.vocab_size]
        in_rank_order = gathered(own, mesh.cp, 0)
        places = [context_parallel_indices(whole.cu_seqlens, r, mesh.cp.size()) for r in range(mesh.cp.size())]
        return in_rank_order[torch.cat(places).argsort()][~whole.padding_mask.squeeze(0)]

    microbatch = shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size())
    with in_eval_mode(model.chunks):
        return Pipeline(model.chunks, mesh).forward_only([microbatch, microbatch], hidden_states, logits)[-1]


@torch.no_grad()
def logits_of_transformers(path, adapters=None) -> torch.Tensor:
    """Return the logits [tokens, V] of the same sequences, one after the other. `adapters`: folder of PEFT adapters."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    if adapters is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapters)
    return torch.cat([model.eval()(sequence[None]).logits[0] for sequence in sequences()])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
