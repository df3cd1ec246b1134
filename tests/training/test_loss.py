"""What the objective makes of the ways in which a teacher may speak."""

from __future__ import annotations

import pytest
import torch

from megatron_gkd.ops.topk import TopK

LABELS, V, H = 7, 23, 8


def compute_all(rank, world_size, beta, tail):
    """Total, per-token divergences, what counts, and the gradients, for each of several signals on the same labels."""
    from megatron_gkd.models.sharded_rows import ShardedRows
    from megatron_gkd.ops.output_head import OutputHead
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.teachers.base import Hidden, Part, Parts
    from megatron_gkd.training.loss import Objective

    mesh = initialize_mesh(Layout(), seed=1)

    def sharded(rows):
        return ShardedRows.from_replicated(rows, mesh.tp)

    objective = Objective(mesh, V, beta=beta, temperature=0.8, sft_alpha=0.3, tail_mode=tail)
    hidden, head = torch.randn(LABELS, H), torch.randn(V, H)
    states, teacher_head = torch.randn(LABELS, 5), torch.randn(V, 5)
    labels, from_dataset = torch.randint(V, (LABELS,)), torch.tensor([1.0, 0, 1, 1, 0, 1, 1])
    logits = states @ teacher_head.t()
    nothing = torch.full((LABELS,), -torch.inf)
    everything = TopK(torch.arange(V).expand(LABELS, V).contiguous(), logits, nothing, 0.8)
    odd, even = torch.arange(1, LABELS, 2), torch.arange(0, LABELS, 2)
    silent = torch.tensor([1, 4])
    ids, values = everything.ids.clone(), logits.clone()
    ids[1], values[4] = -1, -torch.inf
    signals = {
        "hidden": Hidden(sharded(states), OutputHead(teacher_head)),
        "top-k of all": everything,
        "parts": Parts(
            (Part(odd, Hidden(sharded(states[odd]), OutputHead(teacher_head))), Part(even, _rows(everything, even)))
        ),
        "silent": TopK(ids, values, nothing, 0.8),
        "beside the silent": _rows(everything, torch.tensor([0, 2, 3, 5, 6])),
    }
    found = {}
    for name, signal in signals.items():
        a, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        rows = [0, 2, 3, 5, 6] if name == "beside the silent" else slice(None)
        losses = objective.compute(a[rows], OutputHead(w), labels[rows], from_dataset[rows], signal)
        losses.total.backward()
        found[name] = (losses.total, losses.token.divergence, losses.valid_mask, a.grad, w.grad)
    destroy_mesh()
    return found | {"silent rows": silent}


def _rows(topk: TopK, rows: torch.Tensor) -> TopK:
    return TopK(topk.ids[rows], topk.values[rows], topk.tail[rows], topk.temperature)


@pytest.mark.parametrize(("beta", "tail"), [(0.0, "renormalize"), (0.5, "bucket"), (1.0, "renormalize")])
def test_signals_of_the_same_teacher_give_equal_losses(beta, tail, gloo_world):
    found = gloo_world(1).run(compute_all, beta, tail)[0]
    for name in ("top-k of all", "parts"):
        for a, b in zip(found[name], found["hidden"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert found[name][2].tolist() == [1.0] * LABELS


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_labels_without_a_teacher_distribution_do_not_count(tail, gloo_world):
    found = gloo_world(1).run(compute_all, 0.5, tail)[0]
    total, divergence, valid_mask, hidden_gradient, head_gradient = found["silent"]
    expected = found["beside the silent"]
    assert valid_mask.tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert (divergence[found["silent rows"]] == 0).all() and (hidden_gradient[found["silent rows"]] == 0).all()
    torch.testing.assert_close(total, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden_gradient, expected[3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head_gradient, expected[4], rtol=1e-5, atol=1e-6)
