"""Identities that hold for any two distributions, over logits from nearly uniform to one-hot."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.oracle import BETAS, POINTS, divergence_of


@st.composite
def problems(draw):
    """(student, teacher, beta, temperature); logits are multiples of 1/64, so that sums with integers are exact."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(2, 33))
    device = torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(draw(st.integers(0, 2**32)))
    student, teacher = (
        torch.randint(-reach, reach + 1, (rows, columns), generator=generator, device="cpu").to(device) / 64
        for reach in draw(st.tuples(*[st.sampled_from([1, 64, 640, 640_000])] * 2))
    )
    beta = draw(st.one_of(st.sampled_from(BETAS), st.floats(0.01, 0.99)))
    return student, teacher, beta, draw(st.sampled_from([0.5, 0.9, 1.0, 2.0]))


def gradient(student, teacher, beta, temperature, divergence="jsd"):
    student = student.clone().requires_grad_()
    options = {"beta": beta, "temperature": temperature, "divergence": divergence}
    divergence_of(student, teacher, **options).sum().backward()
    return student.grad


quick = settings(max_examples=60, deadline=None)


@quick
@given(problems())
def test_never_negative_and_never_above_the_entropy_of_the_mixture_weight(problem):
    student, teacher, beta, temperature = problem
    value = divergence_of(student, teacher, beta=beta, temperature=temperature)
    assert (value >= 0).all()
    if 0 < beta < 1:
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert (value <= entropy * (1 + 1e-5)).all()


@quick
@given(problems(), st.sampled_from(POINTS))
def test_zero_with_zero_gradient_for_equal_distributions(problem, point):
    student, _, _, temperature = problem
    divergence, beta = point
    options = {"divergence": divergence, "temperature": temperature}
    assert (divergence_of(student, student, beta=beta, **options) == 0).all()
    assert (gradient(student, student, beta, **options) == 0).all()


@quick
@given(problems(), st.sampled_from(POINTS))
def test_no_divergence_is_negative(problem, point):
    student, teacher, _, temperature = problem
    divergence, beta = point
    value = divergence_of(student, teacher, beta=beta, divergence=divergence, temperature=temperature)
    assert (value >= 0).all()


@quick
@given(problems())
def test_the_gradient_sums_to_zero(problem):
    student, teacher, _, temperature = problem
    largest_term = ((student - teacher).abs().amax(-1) + 1) / temperature  # of those that cancel, bar a factor
    assert (gradient(*problem).double().sum(-1).abs() <= 1e-5 * largest_term / temperature).all()


@quick
@given(problems(), st.integers(-50, 50), st.integers(-50, 50))
def test_shifting_a_row_changes_nothing(problem, student_shift, teacher_shift):
    student, teacher, beta, temperature = problem
    shifted = student + student_shift, teacher + teacher_shift
    options = {"beta": beta, "temperature": temperature}
    torch.testing.assert_close(
        divergence_of(student, teacher, **options),
        divergence_of(*shifted, **options),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(
        gradient(student, teacher, beta, temperature),
        gradient(*shifted, beta, temperature),
        rtol=1e-4,
        atol=1e-6 * max(1.0, (student - teacher).abs().max().item()),
    )


@quick
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_the_vocabulary_permutes_the_gradient(problem, random):
    student, teacher, beta, temperature = problem
    order = random.sample(range(student.shape[-1]), student.shape[-1])
    options = {"beta": beta, "temperature": temperature}
    torch.testing.assert_close(
        divergence_of(student[:, order], teacher[:, order], **options),
        divergence_of(student, teacher, **options),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(
        gradient(student[:, order], teacher[:, order], beta, temperature),
        gradient(student, teacher, beta, temperature)[:, order],
        rtol=1e-4,
        atol=1e-6 * max(1.0, (student - teacher).abs().max().item()),
    )


@quick
@given(problems())
def test_swapping_the_models_mirrors_beta(problem):
    student, teacher, beta, temperature = problem
    torch.testing.assert_close(
        divergence_of(teacher, student, beta=1 - beta, temperature=temperature),
        divergence_of(student, teacher, beta=beta, temperature=temperature),
        rtol=1e-4,
        atol=1e-7,
    )
