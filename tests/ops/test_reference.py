"""The oracle itself: hand-worked numbers, independent formulas, and its slopes against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from ops.oracle import BETAS, POINTS, TEMPERATURES, random_logits

from megatron_gkd.ops import reference


def logits_of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),  # KL(T||S)
        (1.0, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),  # KL(S||T)
        (0.5, 0.25 * math.log(0.5 / 0.375 * 0.5 / 0.625) + 0.125 * math.log(2 / 3) + 0.375 * math.log(1.2)),
    ],
)
def test_values_worked_by_hand(beta, expected):
    value = reference.divergence(logits_of(0.25, 0.75), logits_of(0.5, 0.5), beta=beta)
    assert value.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("beta", BETAS)
def test_equals_torch_kl_div(beta):
    s, t = (random_logits(4, 11, seed=seed, dtype=torch.float64) for seed in (0, 1))
    a, b = (s / 0.7).log_softmax(-1), (t / 0.7).log_softmax(-1)
    if beta in (0.0, 1.0):
        expected = (
            F.kl_div(a, b, log_target=True, reduction="none")
            if beta == 0
            else F.kl_div(b, a, log_target=True, reduction="none")
        )
    else:
        m = (beta * b.exp() + (1 - beta) * a.exp()).log()
        expected = beta * F.kl_div(m, b, log_target=True, reduction="none")
        expected = expected + (1 - beta) * F.kl_div(m, a, log_target=True, reduction="none")
    actual = reference.divergence(s, t, beta=beta, temperature=0.7)
    torch.testing.assert_close(actual, expected.sum(-1), rtol=1e-10, atol=1e-14)


def test_the_jsd_tends_to_the_kl_divergences_at_both_ends():
    s, t = (random_logits(3, 7, seed=seed, dtype=torch.float64) for seed in (0, 1))
    near_zero = reference.divergence(s, t, beta=1e-7) / 1e-7
    near_one = reference.divergence(s, t, beta=1 - 1e-7) / 1e-7
    torch.testing.assert_close(near_zero, reference.divergence(s, t, beta=0.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(near_one, reference.divergence(s, t, beta=1.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("name", "beta"), POINTS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradcheck_and_the_closed_form_gradient(name, beta, temperature):
    s = random_logits(3, 6, seed=0, dtype=torch.float64).requires_grad_()
    t = random_logits(3, 6, seed=1, dtype=torch.float64)

    def divergence(s):
        return reference.divergence(s, t, beta=beta, divergence=name, temperature=temperature)

    assert torch.autograd.gradcheck(divergence, (s,))
    (by_autograd,) = torch.autograd.grad(divergence(s).sum(), s)
    a, b = ((z / temperature).log_softmax(-1) for z in (s.detach(), t))
    slope = reference.divergence_at(beta, name).slope(a, b, beta)
    closed_form = (slope - a.exp() * slope.sum(-1, keepdim=True)) / temperature
    torch.testing.assert_close(closed_form, by_autograd, rtol=1e-10, atol=1e-15)


def test_the_other_divergences_worked_by_hand():
    p, q, beta = [0.25, 0.75], [0.5, 0.5], 0.2
    m = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]

    def kl(x, y):
        return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))

    expected = {
        "total_variation": 0.25,
        "skewed_forward_kl": kl(q, m),
        "skewed_reverse_kl": kl(p, m),
        "alpha": (1 - sum(x**beta * y ** (1 - beta) for x, y in zip(p, q, strict=True))) / (beta * (1 - beta)),
        "jsd": beta * kl(q, m) + (1 - beta) * kl(p, m),
    }
    assert expected.keys() == reference.FAMILIES.keys()
    for name, value in expected.items():
        found = reference.divergence(logits_of(*p), logits_of(*q), beta=beta, divergence=name)
        assert found.item() == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("name", ["alpha", "skewed_forward_kl", "skewed_reverse_kl"])
def test_other_families_tend_to_the_kl_divergences_at_their_ends(name):
    s, t = (random_logits(3, 7, seed=seed, dtype=torch.float64) for seed in (0, 1))
    family = reference.FAMILIES[name]
    for end, near, member in ((0.0, 1e-7, family.at_0), (1.0, 1 - 1e-7, family.at_1)):
        if member is not None:
            at_end = reference.divergence(s, t, beta=end, divergence=name)
            close = reference.divergence(s, t, beta=near, divergence=name)
            torch.testing.assert_close(close, at_end, rtol=1e-3, atol=0)
            assert member in ("forward_kl", "reverse_kl")


def test_entropy_and_cross_entropy_equal_torchs_own():
    z = random_logits(5, 9, seed=0, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=z[:, :7] / 0.8).entropy()
    torch.testing.assert_close(reference.entropy(z, temperature=0.8, vocab_size=7), entropy)
    labels = torch.tensor([3, -100, 0, 6, 1])
    expected = F.cross_entropy(z[:, :7], labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(reference.cross_entropy(z, labels, vocab_size=7), expected)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_minus_infinity_is_probability_zero_and_keeps_the_gradient_finite(beta):
    s = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.5, 0.3, -torch.inf, -torch.inf]], dtype=torch.float64)
    value = reference.divergence(s, t, beta=beta)
    value.backward()
    finite = torch.tensor([[0.0, -600.0, 1.0, -600.0]], dtype=torch.float64)
    expected = reference.divergence(finite, t.clamp(min=-600), beta=beta)
    torch.testing.assert_close(value, expected)
    assert s.grad.isfinite().all() and s.grad[0, 1] == s.grad[0, 3] == 0
