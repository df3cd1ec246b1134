"""The divergence of unsharded logits against the fp64 oracle: values, gradients, edge cases, memory, errors."""

import math

import pytest
import torch
from ops.oracle import (
    BETAS,
    MIDDLES,
    NEAR_THE_ENDS,
    POINTS,
    TEMPERATURES,
    divergence_of,
    oracle,
    pad_columns,
    random_logits,
    relative_error,
    rounding,
    statistics_of,
    tolerance,
)

from megatron_gkd.ops import passes, reference
from megatron_gkd.ops.spec import TEMPERATURES as TEMPERATURES_ALLOWED


def value_and_gradient(student, teacher, upstream, **options):
    student = student.clone().requires_grad_()
    per_token = divergence_of(student, teacher, **options)
    per_token.backward(upstream.to(per_token.dtype))
    return per_token.detach(), student.grad


@pytest.mark.parametrize(("divergence", "beta"), POINTS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_equal_the_oracle(divergence, beta, temperature, dtype):
    s, t = (random_logits(2, 5, 101, seed=seed, dtype=dtype) for seed in (0, 1))
    upstream = random_logits(2, 5, seed=2, scale=1000.0)  # clear of fp16's underflow
    options = {"divergence": divergence, "beta": beta, "temperature": temperature}
    value, gradient = value_and_gradient(s, t, upstream, **options)
    exact_value, exact_gradient = oracle(s, t, upstream, **options)
    own_value, own_gradient = oracle(s, t, upstream, dtype=torch.float32, **options)
    assert value.shape == (2, 5)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert relative_error(value, exact_value) < tolerance(dtype, relative_error(own_value, exact_value))
    own_error = relative_error(own_gradient, exact_gradient)
    assert relative_error(gradient, exact_gradient) < tolerance(dtype, own_error) + rounding(dtype)


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize(("divergence", "beta"), NEAR_THE_ENDS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_near_the_ends_of_beta(divergence, beta, scale, dtype, kernels, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr(passes, "_kernels", None)
    s, t = (random_logits(8, 1024, seed=seed, scale=scale, dtype=dtype) for seed in (0, 1))
    options = {"divergence": divergence, "beta": beta}
    _, unscaled = oracle(s, t, torch.ones(8), **options)
    upstream = 1000 / unscaled.abs().amax(-1).float()  # clear of fp16's underflow
    value, gradient = value_and_gradient(s, t, upstream, **options)
    exact_value, exact_gradient = oracle(s, t, upstream, **options)
    own_value, own_gradient = oracle(s, t, upstream, dtype=torch.float32, **options)
    # A skewed divergence is a difference of larger terms there, which no formula in fp32 keeps exact.
    own_error = relative_error(own_value, exact_value, scale=0) if "skewed" in divergence else 0
    assert relative_error(value, exact_value, scale=0) < tolerance(dtype, own_error)
    own_error = relative_error(own_gradient, exact_gradient) if "skewed" in divergence else 0
    stored_error = relative_error(exact_gradient.to(dtype), exact_gradient)
    assert relative_error(gradient, exact_gradient) < tolerance(dtype, own_error) + 1.1 * stored_error


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", TEMPERATURES_ALLOWED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_and_the_highest_temperature(beta, temperature, dtype):
    s, t = (random_logits(32, 257, seed=seed, dtype=dtype) for seed in (0, 1))
    options = {"beta": beta, "temperature": temperature}
    value, gradient = value_and_gradient(s, t, torch.ones(32), **options)
    exact_value, exact_gradient = oracle(s, t, torch.ones(32), **options)
    assert relative_error(value, exact_value, scale=0) < 0.01
    assert relative_error(gradient, exact_gradient, scale=1e-4 / temperature) < 0.01


@pytest.mark.parametrize(("divergence", "beta"), POINTS)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_the_fp32_error_is_at_most_the_references_own(divergence, beta, scale):
    s, t = (random_logits(32, 257, seed=seed, scale=scale) for seed in (0, 1))
    upstream = torch.ones(32)
    options = {"divergence": divergence, "beta": beta}
    exact = oracle(s, t, upstream, **options)
    naive = oracle(s, t, upstream, dtype=torch.float32, **options)
    ours = value_and_gradient(s, t, upstream, **options)
    for actual, reference_in_fp32, expected in zip(ours, naive, exact, strict=True):
        own = (reference_in_fp32.double() - expected).norm()
        rounding_of_probabilities = 2.0**-23 * upstream.norm()
        error = (actual.double() - expected).norm()
        assert error <= 1.5 * own + 1e-6 * expected.norm() + rounding_of_probabilities


@pytest.mark.parametrize(("divergence", "beta"), MIDDLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_equal_the_reference(divergence, beta, dtype, masked):
    s, t = (random_logits(6, 33, seed=seed, dtype=dtype) for seed in (0, 1))
    t[::2] += 2 * s[::2]  # so that some of the most likely tokens agree
    mask = torch.arange(6) != 4 if masked else None
    statistics = statistics_of(s, t, divergence=divergence, beta=beta, temperature=0.8, mask=mask)
    s, t = s.double(), t.double()
    expected = {
        "student_entropy": reference.entropy(s, temperature=0.8),
        "teacher_entropy": reference.entropy(t, temperature=0.8),
        "forward_kl": reference.divergence(s, t, beta=0.0, temperature=0.8),
        "reverse_kl": reference.divergence(s, t, beta=1.0, temperature=0.8),
        "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double(),
    }
    assert 0 < expected["top1_agreement"].sum() < 6
    for name, value in expected.items():
        value = value if mask is None else torch.where(mask, value, 0)
        torch.testing.assert_close(getattr(statistics, name).double(), value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("tokens", [(), (0,), (2, 0), (2, 3)])
def test_statistics_have_the_shape_of_the_tokens(tokens):
    logits = torch.zeros(*tokens, 5)
    assert all(x.shape == tokens for x in statistics_of(logits, logits, beta=0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_for_the_most_likely_token_go_to_the_lower_id(dtype):
    student = torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 2, dtype=dtype)
    teacher = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]], dtype=dtype)
    statistics = statistics_of(student, teacher, beta=0.5)
    assert statistics.top1_agreement.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("divergence", "beta"), POINTS)
def test_gradcheck(divergence, beta):
    s = random_logits(3, 6, seed=0, dtype=torch.float64).requires_grad_()
    t = random_logits(3, 6, seed=1, dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(
        lambda s: divergence_of(s, t, divergence=divergence, beta=beta, temperature=0.7, vocab_size=5, mask=mask),
        (s,),
    )


@pytest.mark.parametrize(("divergence", "beta"), POINTS)
def test_masked_rows_and_padded_columns_are_exactly_zero_whatever_they_hold(divergence, beta):
    s, t = (pad_columns(random_logits(4, 13, seed=seed), 3) for seed in (0, 1))
    mask = torch.tensor([True, False, True, False])
    s[1], t[3] = torch.nan, torch.inf
    upstream = torch.ones(4)
    options = {"divergence": divergence, "beta": beta, "vocab_size": 13}
    value, gradient = value_and_gradient(s, t, upstream, mask=mask, **options)
    expected = oracle(s[mask], t[mask], upstream[mask], **options)
    assert (value[~mask] == 0).all() and (gradient[~mask] == 0).all() and (gradient[:, 13:] == 0).all()
    assert relative_error(value[mask], expected[0]) < 1e-5
    assert relative_error(gradient[mask], expected[1]) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,)])
def test_no_tokens_and_a_single_row(beta, shape):
    s, t = (random_logits(*shape, seed=seed) for seed in (0, 1))
    upstream = torch.ones(shape[:-1])
    value, gradient = value_and_gradient(s, t, upstream, beta=beta)
    expected = oracle(s, t, upstream, beta=beta)
    assert value.shape == shape[:-1] and gradient.shape == shape
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["student one-hot", "teacher one-hot", "both", "opposite"])
def test_one_hot_rows_of_large_logits(beta, kind):
    s, t = (random_logits(3, 11, seed=seed) for seed in (0, 1))
    if kind != "teacher one-hot":
        s[:] = -1e4
        s[:, 2] = 1e4
    if kind != "student one-hot":
        t[:] = -1e4
        t[:, 5 if kind == "opposite" else 2] = 1e4
    value, gradient = value_and_gradient(s, t, torch.ones(3), beta=beta, temperature=0.5)
    expected = oracle(s, t, torch.ones(3), beta=beta, temperature=0.5)
    assert relative_error(value, expected[0]) < 1e-5
    # A gradient is a difference of terms as large as the largest log-ratio, near 4e4 / temperature here.
    largest = expected[0].max().clamp(min=1) / 0.5
    assert (gradient - expected[1]).abs().max() <= 1e-6 * largest


@pytest.mark.parametrize(("divergence", "beta"), [point for point in POINTS if point[1] in BETAS[1:-1]])
def test_minus_infinity_excludes_an_entry(divergence, beta):
    s, t = (random_logits(4, 11, seed=seed) for seed in (0, 1))
    s[:, 1] = t[:, 4] = s[:, 7] = t[:, 7] = -torch.inf
    value, gradient = value_and_gradient(s, t, torch.ones(4), divergence=divergence, beta=beta)
    expected = oracle(s, t, torch.ones(4), divergence=divergence, beta=beta)
    assert relative_error(value, expected[0]) < 1e-5
    assert relative_error(gradient, expected[1]) < 1e-5
    assert (gradient[:, [1, 7]] == 0).all()


def test_kl_divergences_are_infinite_outside_the_support():
    s, t = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    assert divergence_of(s, t, beta=0.0).item() == math.inf
    assert divergence_of(s, t, beta=1.0).item() == pytest.approx(math.log(2))
    assert divergence_of(t, s, beta=1.0).item() == math.inf
    assert divergence_of(t, s, beta=0.0).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("beta", BETAS)
def test_nan_stays_nan(beta):
    s, t = (random_logits(2, 5, seed=seed) for seed in (0, 1))
    s[0, 3] = torch.nan
    value = divergence_of(s, t, beta=beta)
    assert value[0].isnan() and value[1].isfinite()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_saves_the_inputs_and_16_bytes_per_token(beta, dtype):
    s, t = random_logits(6, 50, seed=0, dtype=dtype).requires_grad_(), random_logits(6, 50, seed=1, dtype=dtype)
    mask = torch.ones(6, dtype=torch.bool)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        divergence_of(s, t, beta=beta, mask=mask)
    inputs = {s.data_ptr(), t.data_ptr(), mask.data_ptr()}
    own = [x for x in saved if x.data_ptr() not in inputs]
    assert len(saved) - len(own) == 3
    assert sum(x.numel() * x.element_size() for x in own) == 16 * 6


def test_the_teacher_gets_no_gradient_and_backward_can_repeat():
    s, t = random_logits(3, 5, seed=0).requires_grad_(), random_logits(3, 5, seed=1).requires_grad_()
    total = divergence_of(s, t, beta=0.5).sum()
    (first,) = torch.autograd.grad(total, s, retain_graph=True)
    total.backward()
    assert torch.equal(first, s.grad)
    assert t.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.5}, "beta = 1.5: must be from 0 to 1"),
        ({"beta": float("nan")}, "beta = nan"),
        (
            {"divergence": "hellinger"},
            "divergence = 'hellinger': must be one of jsd, total_variation, skewed_forward_kl",
        ),
        (
            {"divergence": "skewed_forward_kl", "beta": 1.0},
            "beta = 1.0: must be below 1 with divergence = skewed_forward_kl",
        ),
        (
            {"divergence": "skewed_reverse_kl", "beta": 0.0},
            "beta = 0.0: must be above 0 with divergence = skewed_reverse_kl",
        ),
        ({"temperature": 0.0}, "temperature = 0.0: must be from 0.01 to 1000"),
        ({"temperature": 1e-40}, "temperature = 1e-40: must be from 0.01 to 1000"),
        ({"temperature": 1e38}, "temperature = 1e.38: must be from 0.01 to 1000"),
        ({"temperature": torch.inf}, "temperature = inf: must be from 0.01 to 1000"),
        ({"temperature": torch.nan}, "temperature = nan: must be from 0.01 to 1000"),
        ({"vocab_size": 6}, "vocab_size = 6: must be from 1 to 5"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        (
            {"teacher_logits": torch.zeros(3, 4)},
            r"teacher_logits = torch.float32 \[3, 4\]: must be torch.float32 \[3, 5\]",
        ),
        ({"teacher_logits": torch.zeros(3, 5).bfloat16()}, "teacher_logits = torch.bfloat16"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask = torch.bool \[5\]: must be torch.bool \[3\]"),
        ({"mask": torch.ones(3)}, "mask = torch.float32"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, message):
    arguments = {"teacher_logits": torch.zeros(3, 5), "beta": 0.5} | change
    with pytest.raises(ValueError, match=message):
        divergence_of(torch.zeros(3, 5), arguments.pop("teacher_logits"), **arguments)


def test_integer_logits_are_an_error():
    logits = torch.zeros(3, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be floats"):
        divergence_of(logits, logits, beta=0.5)
