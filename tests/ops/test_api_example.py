"""The example of the Python API, which the README shows, as a doctest."""

import doctest

import pytest

EXAMPLE = """
>>> import torch
>>> from megatron_gkd import ops
>>> spec = ops.DivergenceSpec(beta=0.5, temperature=0.9)  # with sharded logits also group=...
>>> student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)  # logits [tokens, vocabulary]
>>> ops.vocab_parallel_divergence(student, teacher, spec).mean().backward()
>>> student = ops.LinearHead(torch.randn(8, 16, requires_grad=True), torch.randn(100, 16))  # hidden states, weight
>>> teacher = ops.LinearHead(torch.randn(8, 32), torch.randn(100, 32))
>>> loss, metrics = ops.fused_linear_divergence(student, teacher, ops.TokenTargets(torch.ones(8) / 8), spec)
>>> loss.backward()
"""


@pytest.mark.cpu
def test_the_example_runs():
    assert len(EXAMPLE.strip().splitlines()) <= 12
    example = doctest.DocTestParser().get_doctest(EXAMPLE, {}, "example", None, None)
    assert doctest.DocTestRunner().run(example).failed == 0
