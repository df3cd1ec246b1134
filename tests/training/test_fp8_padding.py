"""Microbatches that are padded for FP8: each rank computes whole multiples of tokens, and trains as without padding."""

from __future__ import annotations

from functools import partial

import pytest
from checkpoints import tiny_checkpoint
from layouts import CP2, PP2, SP, TP2
from rows import RandomRows
from training_layouts import assert_equal_runs, train_steps

CASES = {
    "packed": (1, {"data": {"packing": True}}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "CP2": (2, {"parallel": CP2}),
    "PP2xVPP2": (2, {"parallel": PP2 | {"virtual_pipeline_model_parallel_size": 2}}),
}
MULTIPLE = 16


def train_padded(rank, world_size, *arguments):
    """Return what `train_steps` does, and the numbers of tokens that the layers of this rank computed at once."""
    from megatron_gkd.runtime.mesh import Layout

    from mcore_bridge.model.modules.transformer_layer import TransformerLayer

    forward, computed = TransformerLayer.forward, set()

    def counted(layer, hidden_states, *args, **kwargs):
        computed.add(hidden_states.shape[0] * hidden_states.shape[1])
        return forward(layer, hidden_states, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "from_section", partial(Layout.from_section, token_multiple=MULTIPLE))
        patch.setattr(TransformerLayer, "forward", counted)
        return train_steps(rank, world_size, *arguments), computed


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing_else(case, gloo_world):
    """Rows have a `teacher_prompt`, so that the teacher's microbatches are padded by themselves."""
    world_size, changes = CASES[case]
    pair = tiny_checkpoint("qwen3_tied", seed=2), tiny_checkpoint("qwen3", seed=1, hidden_size=48)
    rows = RandomRows(count=24, privileged=True)
    expected = gloo_world(world_size).run(train_steps, *pair, changes, False, rows)[0]
    found = gloo_world(world_size).run(train_padded, *pair, changes, False, rows)
    assert_equal_runs(found[0][0], expected)
    for _, computed in found:
        assert computed and all(tokens % MULTIPLE == 0 for tokens in computed)
