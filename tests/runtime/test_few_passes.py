"""What takes fewer passes than Megatron's or torch's own computes the same, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU other kernels take their place")


@pytest.fixture(scope="module", autouse=True)
def portable():
    import megatron_gkd.runtime.preload  # noqa: F401


@pytest.mark.parametrize("size", [16, 8])
def test_rotations_are_those_of_megatron(size):
    from megatron.core.models.common.embeddings import rope_utils

    rotate = rope_utils._apply_rotary_pos_emb_bshd
    torch.manual_seed(0)
    heads, freqs = torch.randn(5, 1, 3, 16, requires_grad=True), torch.randn(5, 1, 1, size)
    outputs = [function(heads, freqs, mscale=1.3) for function in (rotate, rotate.__wrapped__)]
    gradient = torch.randn(5, 1, 3, 16)
    gradients = [torch.autograd.grad(output, heads, gradient)[0] for output in outputs]
    assert type(outputs[0].grad_fn).__name__ == "_RotationBackward"
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_norms_are_those_of_torch():
    from megatron_gkd.runtime.transformer_engine.norm import _RmsNorm

    torch.manual_seed(0)
    x, gamma = torch.randn(4, 3, 16).double().requires_grad_(), torch.randn(16).double().requires_grad_()
    torch.testing.assert_close(_RmsNorm.apply(x, gamma, 1e-6), gamma * F.rms_norm(x, (16,), eps=1e-6))
    # Transposed: the gradient that arrives is not contiguous.
    assert torch.autograd.gradcheck(lambda *inputs: _RmsNorm.apply(*inputs, 1e-6).transpose(0, 1), (x, gamma))


@pytest.mark.parametrize("is_shared", [False, True])
def test_embeddings_add_to_the_buffer_what_autograd_would(is_shared):
    from megatron_gkd.runtime.embedding_gradient import embedding

    torch.manual_seed(0)
    weight: Tensor = torch.nn.Parameter(torch.randn(7, 4))
    ids, gradient = torch.tensor([[3, 0, 3, 6]]), torch.randn(1, 4, 4)
    F.embedding(ids, weight).backward(gradient)
    expected, weight.grad = weight.grad + 1, None
    weight.main_grad, weight.zero_out_wgrad = torch.ones(7, 4), is_shared
    embedding(ids, weight).backward(gradient)
    torch.testing.assert_close(weight.main_grad, expected)
    assert weight.grad_added_to_main_grad
    # The head that shares the weight triggers its hook, and need not return zeros to add to.
    assert (weight.grad is None, weight.zero_out_wgrad) == (is_shared, False)
