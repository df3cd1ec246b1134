"""The loss of a chunk by the kernel that keeps rows on chip, run by the emulator, against the loss in three passes."""

import pytest
import torch
from csrc.emulated_clusters import Options, cluster_loss
from csrc.rows_of_logits import random_logits

from megatron_gkd.ops import passes
from megatron_gkd.ops.chunk_loss import compute_full_loss
from megatron_gkd.ops.params import ChunkTargets, LossSums, TokenResults
from megatron_gkd.ops.spec import DivergenceSpec

ROWS, WIDTH = 4, 1003


@pytest.fixture
def calls(library, monkeypatch):
    """Let rows be kept on chip by the emulator; returns the widths of the calls."""
    widths = []

    def loss(out, logits, labels, weights, spec):
        student, label_logits, arguments = logits.student, [], None
        if labels is not None:
            here, column = spec.shard.owned(labels)
            label_logits = [torch.where(here, student.gather(1, column[:, None])[:, 0].float(), -torch.inf)]
            arguments = weights.cross_entropy, labels
        options = Options(spec.divergence.name, spec.beta, spec.temperature)
        found = cluster_loss(library, out, student, logits.teacher, weights.divergence, options, arguments)
        widths.append(out.shape[1])
        return LossSums(torch.cat([found.statistics.flatten(), *label_logits]), found.sums)

    library.use_clusters(True)
    monkeypatch.setattr(passes, "loss", loss)
    monkeypatch.setattr(passes, "uses_clusters", lambda: True)
    yield widths
    library.use_clusters(False)


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.5, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize("cross_entropy", ["none", "metric", "loss"])
def test_results_and_gradient_of_a_chunk(request, beta, temperature, cross_entropy):
    student, teacher = (x.bfloat16() for x in random_logits(ROWS, WIDTH))
    labels = None if cross_entropy == "none" else torch.tensor([3, -100, WIDTH - 1, 0])
    label_weights = torch.tensor([0.5, 1.0, 0.0, 2.0]) if cross_entropy == "loss" else None
    targets = ChunkTargets(torch.tensor([1.0, 0.5, 0.0, 2.0]), labels, label_weights, factor=8.0)
    spec = DivergenceSpec(beta, temperature).on_shard(WIDTH)

    def compute():
        results, out = TokenResults.empty(student, has_losses=True), student.clone()
        compute_full_loss(out, teacher, targets, results, spec, needs_gradient=True)
        return results, out

    expected, expected_gradient = compute()
    calls = request.getfixturevalue("calls")
    actual, gradient = compute()
    assert calls == [WIDTH]
    torch.testing.assert_close(actual.metrics, expected.metrics, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2**-7, atol=1e-6)


def test_rows_are_not_kept_on_chip_without_a_kernel(monkeypatch):
    """On a CPU: nothing is done, and the three passes follow."""
    monkeypatch.setattr(passes, "uses_clusters", lambda: True)
    student, teacher = (x.bfloat16() for x in random_logits(ROWS, WIDTH))
    gradients = []
    for needs_gradient in (False, True):
        results, out = TokenResults.empty(student, has_losses=True), student.clone()
        spec = DivergenceSpec(0.5).on_shard(WIDTH)
        compute_full_loss(out, teacher, ChunkTargets(torch.ones(ROWS)), results, spec, needs_gradient)
        gradients.append(out)
    assert torch.equal(gradients[0], student) and not torch.equal(gradients[1], student)
