"""The sharded Megatron model gives the logits that transformers gives, for every family and layout."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from checkpoints import tiny_checkpoint
from transformers import AutoModelForCausalLM

from megatron_gkd.checkpoint_format.config_file import ROPE_TYPES

FAMILIES = ["llama", "qwen2", "qwen2_tied", "qwen3", "qwen3_tied", "qwen3_moe"]
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "EP2": (2, {"expert": 2}),
}
LENGTHS = (7, 16, 11)


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 99, (length,), generator=generator) for length in LENGTHS]


def megatron_logits(rank, world_size, path, layout):
    """[tokens, V] of the packed sequences, in order, on the last stage's ranks; None elsewhere."""
    from megatron_gkd.data.context_parallel import context_parallel_indices
    from megatron_gkd.data.microbatch import collate, shard_context_parallel
    from megatron_gkd.data.sample import Sample
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel, hidden_states
    from megatron_gkd.models.pipeline import forward_only
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(**layout), seed=1)
    model = MegatronModel.load(Checkpoint.open(str(path)), mesh, BuildOptions())
    for chunk in model.chunks:
        chunk.eval()
    samples = [Sample(s.numpy(), s.numpy(), "dataset", i) for i, s in enumerate(sequences())]
    whole = collate(samples, pad_multiple=mesh.layout.pad_multiple, pad_token_id=0)
    head = model.head_weight

    def gathered(x, group, dim):
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    def logits(hidden, microbatch):
        rows = hidden.squeeze(0)
        if mesh.layout.sequence_parallel:
            rows = gathered(rows, mesh.tp, 0)
        own = gathered(rows @ head.T, mesh.tp, 1)[:, : model.checkpoint.vocab_size]
        in_rank_order = gathered(own, mesh.cp, 0)
        places = [context_parallel_indices(whole.cu_seqlens, r, mesh.cp.size()) for r in range(mesh.cp.size())]
        return in_rank_order[torch.cat(places).argsort()][~whole.padding_mask.squeeze(0)]

    with torch.no_grad():
        microbatch = shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size())
        result = forward_only(model.chunks, [microbatch, microbatch], hidden_states, logits, mesh)[-1]
    destroy_mesh()
    return result


def logits_of_transformers(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return torch.cat([model(sequence[None]).logits[0] for sequence in sequences()])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, gloo_world):
    expected = logits_of_transformers(tiny_checkpoint(family))
    for name, (world_size, layout) in LAYOUTS.items():
        if layout.get("expert") and family != "qwen3_moe":
            continue
        if family == "qwen3_moe" and layout.get("tensor") and not layout.get("sequence_parallel"):
            continue  # Megatron's MoE asks for sequence parallelism beside tensor parallelism
        results = gloo_world(world_size).run(megatron_logits, tiny_checkpoint(family), layout)
        found = [result for result in results if result is not None]
        assert found, f"{name}: no rank had logits"
        for logits in found:
            assert logits.shape == expected.shape
            error = (logits - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, f"{name}: relative error {error:.1e}"


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_every_rope_type_that_is_allowed_is_that_of_transformers(rope_type, gloo_world, tmp_path):
    source = tiny_checkpoint("qwen2")
    path = tmp_path / "model"
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]}
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    expected = logits_of_transformers(path)
    (found,) = gloo_world(1).run(megatron_logits, path, {})
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    if rope_type != "default":
        assert (expected - logits_of_transformers(source)).abs().max() > 1e-3 * expected.abs().max(), "it must show"
