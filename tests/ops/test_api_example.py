"""The example of the Python API, which the README shows, as a doctest."""

import doctest

import pytest

EXAMPLE = """
>>> import torch
>>> from megatron_gkd.ops import DivergenceSpec, LinearHead, TokenTargets, fused_linear_divergence, vocab_parallel_divergence
>>> spec = DivergenceSpec(beta=0.5, temperature=0.9)  # with sharded logits also group=...
>>> student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)  # logits [tokens, vocabulary]
>>> vocab_parallel_divergence(student, teacher, spec).mean().backward()
>>> student = LinearHead(torch.randn(8, 16, requires_grad=True), torch.randn(100, 16))  # hidden states, head's weight
>>> teacher = LinearHead(torch.randn(8, 32), torch.randn(100, 32))
>>> loss, metrics = fused_linear_divergence(student, teacher, TokenTargets(torch.full((8,), 1 / 8)), spec)
>>> loss.backward()
"""


@pytest.mark.cpu
def test_the_example_runs():
    assert len(EXAMPLE.strip().splitlines()) <= 12
    example = doctest.DocTestParser().get_doctest(EXAMPLE, {}, "example", None, None)
    assert doctest.DocTestRunner().run(example).failed == 0
