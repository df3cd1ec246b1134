"""The distributed optimizer's states are gathered piece by piece, on the ranks that write them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from checkpoints import tiny_checkpoint
from layouts import EP2, PP2, SP, TP2
from training_layouts import build

PIECE = 37
LAYOUTS = {
    "DP2": (2, "qwen3_tied", {}),
    "PP2xDP2": (4, "qwen3_tied", {"parallel": PP2}),  # several buckets, of which one is padded
    "TP2+SPxEP2xDP2": (4, "qwen3_moe", {"parallel": TP2 | SP | EP2}),
}


def gather(rank, world_size, model, changes):
    """Return the states in pieces and in one, the bytes that they take here, and whether a snapshot copies them."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing import gathered_states
    from megatron_gkd.training.checkpointing.sharded_write import _SnapshotPlanner
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds

    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    apply_workarounds()
    _, student, _, batches = build(model, None, changes | {"teacher": {"teacher_kind": "none"}})
    for microbatches in batches:
        student.compute_gradients(microbatches, [None] * len(microbatches))
        student.update()

    def states(saved):
        found = {one.key: one for one in nested_values(saved["optimizer"]) if hasattr(one, "replica_id")}
        return {key: one for key, one in found.items() if key.startswith("optimizer.state.")}

    with mock.patch.object(gathered_states, "CHUNK", PIECE):
        in_pieces = Saved(student).to_write()
    whole = Saved(student).to_write()
    pairs = [(states(in_pieces)[key], one) for key, one in states(whole).items()]
    written = [(a.data, b.data) for a, b in pairs if is_main_replica(b.replica_id)]
    others = {b.data.untyped_storage().data_ptr(): b.data.untyped_storage() for _, b in pairs} if written else {}
    planner = _SnapshotPlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.storages = whole.storages
    with mock.patch("megatron_gkd.training.checkpointing.sharded_write.MCoreSavePlanner.resolve_data") as resolve:
        kept = []
        for _, tensor in written:
            resolve.return_value = tensor
            kept.append(planner.resolve_data(None).data_ptr() == tensor.data_ptr())
        resolve.return_value = next(student.chunks[0].parameters()).detach()
        is_copied = planner.resolve_data(None).data_ptr() != resolve.return_value.data_ptr()
    result = {
        "equal": all(torch.equal(a, b) for a, b in written),
        "states": len(pairs),
        "written": sum(b.numel() for _, b in written),
        "bytes": sum(storage.nbytes() for storage in others.values()),
        "kept": all(kept),
        "is_copied": is_copied,
    }
    destroy_mesh()
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_make_the_whole_where_it_is_written_and_take_no_memory_elsewhere(layout, gloo_world):
    size, family, changes = LAYOUTS[layout]
    found = gloo_world(size).run(gather, tiny_checkpoint(family, seed=2, num_hidden_layers=2), changes)
    for one in found:
        assert one["equal"] and one["kept"] and one["is_copied"] and one["states"] >= 15
        assert one["bytes"] <= 4 * one["written"] + 4  # a number stands for those that other ranks write
    assert found[0]["written"] > 10_000
    if layout == "DP2":
        assert found[1]["written"] == 0
