"""The GPU's kernels, run on a CPU by an emulator, against the CPU's kernels and against fp64."""

import pytest
import torch
from csrc.emulated_kernels import DIVERGENCES, LOG2_E, SUMMED, TYPES, normalizers_of
from csrc.rows_of_logits import LAYOUTS, elements_around, hard_logits, random_logits

from megatron_gkd.ops import reference

WIDTHS = (1, 7, 8, 9, 63, 257, 2049, 5000)
MASK = torch.tensor([True, False, True])
TYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in TYPES]
LN_2 = 0.6931471805599453
# One unit in the last place; 16-bit gradients may round differently after different fp32 sums.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_same(actual, expected, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def assert_same_statistics(actual, expected, moments=True):
    exact = [0, 2] + ([6, 9] if moments else [])  # maxima, and where they are
    assert_same(actual[:, exact], expected[:, exact], rtol=0, atol=0)
    assert_same(actual, expected, rtol=1e-5, atol=3e-5)


def both_statistics(cuda, cpu, *logits, **options):
    return cuda.statistics(*logits, **options), cpu.statistics(*logits, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
def test_statistics(cuda, cpu, dtype, width, layout):
    values = random_logits(3, width, seed=width)
    logits = [place.place(x, dtype) for place, x in zip(LAYOUTS[layout], values, strict=False)]
    options = {"mask": MASK, "temperature": 0.7, "first": 1000}
    assert_same_statistics(*both_statistics(cuda, cpu, *logits, **options, untempered=True))
    actual, expected = both_statistics(cuda, cpu, *logits, **options, moments=False)
    assert_same_statistics(actual, expected, moments=False)
    assert actual[1].tolist() == [0, 1, 0, 1]  # the masked row


@pytest.mark.parametrize("layout", ["aligned", "strides apart"])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("case", hard_logits())
def test_statistics_of_hard_rows(cuda, cpu, case, dtype, layout):
    values = hard_logits()[case]
    logits = [place.place(x[None], dtype) for place, x in zip(LAYOUTS[layout], values, strict=False)]
    actual, expected = both_statistics(cuda, cpu, *logits, temperature=2.0, untempered=True)
    assert_same_statistics(actual, expected)
    actual, expected = both_statistics(cuda, cpu, *logits, moments=False)
    assert_same_statistics(actual, expected, moments=False)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
def test_no_columns(cuda, cpu, dtype):
    """A shard of padding: no maximum, no mass; the gradient is zero."""
    logits = [torch.zeros(2, 0, dtype=dtype)] * 2
    actual, expected = both_statistics(cuda, cpu, *logits, first=64, untempered=True)
    assert_same(actual, expected, rtol=0, atol=0)
    assert actual[0].tolist() == [-torch.inf, 0] * 2 + [0, 0, 64, 0, 0, 64, 0]
    normalizers = torch.zeros(2, 4)
    assert cuda.sums(*logits, normalizers, kind="alpha").tolist() == [[0, 0]] * 2
    out = torch.ones(2, 300, dtype=dtype)
    labels = torch.ones(2), torch.zeros(2, 2), torch.tensor([-1, -1])
    cuda.gradient(out, *logits, normalizers, torch.ones(2), torch.ones(2), kind="reverse_kl", cross_entropy=labels)
    assert not out.any()


@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("kind", SUMMED)
def test_sums(cuda, cpu, kind, dtype):
    for layout, width, beta in (
        ("aligned", 5000, 0.3),
        ("alike", 2049, 0.999),
        ("bases apart", 257, 0.5),
        ("alike", 1, 0.01),
    ):
        values = random_logits(3, width, seed=width)
        logits = [place.place(x, dtype) for place, x in zip(LAYOUTS[layout], values, strict=False)]
        normalizers = normalizers_of(cpu.statistics(*logits, temperature=1.3, moments=False))
        options = {"kind": kind, "beta": beta, "mask": MASK, "temperature": 1.3}
        actual, expected = cuda.sums(*logits, normalizers, **options), cpu.sums(*logits, normalizers, **options)
        assert_same(actual, expected, rtol=1e-5, atol=1e-6)
        assert actual[1].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layout", ["aligned", "bases apart"])
def test_the_student_alone(cuda, cpu, layout, width, dtype):
    """Bitwise equal to the student's numbers beside a teacher, in statistics and gradient."""
    student, teacher = (LAYOUTS[layout][0].place(x, dtype) for x in random_logits(3, width))
    label_weight, label = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, width - 1, -1])
    for kernels in (cuda, cpu):
        statistics = kernels.statistics(student, teacher, temperature=0.7, untempered=True)
        alone = kernels.student_statistics(student, temperature=0.7)
        assert torch.equal(alone, statistics[:, [0, 1, 4, 10]])
        untempered = torch.stack([alone[:, 0], alone[:, 3].log2()]).contiguous()
        outs = [torch.full((3, width + 5), 9.0, dtype=dtype) for _ in range(2)]
        kernels.cross_entropy_gradient(outs[0], student, untempered, label_weight, label)
        rows = normalizers_of(statistics), torch.zeros(3), torch.zeros(3)
        cross_entropy = (label_weight, untempered, label)
        kernels.gradient(outs[1], student, teacher, *rows, kind="generalized_jsd", cross_entropy=cross_entropy)
        assert torch.equal(*outs) and not outs[0][1].any() and not outs[0][:, width:].any()


GRADIENT_CASES = [(kind, "alike", 2049) for kind in DIVERGENCES]
GRADIENT_CASES += [("generalized_jsd", layout, width) for layout in LAYOUTS for width in WIDTHS]


@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize(("kind", "layout", "width"), GRADIENT_CASES)
def test_gradient(cuda, cpu, kind, layout, width, dtype):
    """Rows with both losses, with one, with none; labels here and on other ranks; padding up to `out`'s width.

    At temperature 1 the cross-entropy has the divergence's probabilities, at another one its own.
    """
    padding = 5
    rows = 6
    *inputs, output = LAYOUTS[layout]
    student, teacher = (place.place(x, dtype) for place, x in zip(inputs, random_logits(rows, width), strict=True))
    teacher[4] = torch.nan  # not read, as the divergence's weight is 0
    student[5] = torch.nan  # not read at all
    weight = torch.tensor([0.5, 2.0, -1.0, 0.25, 0.0, 0.0])
    label_weight = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.3, 0.0])
    label = torch.tensor([0, width - 1, width // 2, -1, width - 1, 0])
    for temperature, with_labels in ((1.3, False), (1.0, True), (1.3, True)):
        statistics = cpu.statistics(student, teacher, temperature=temperature, untempered=True)
        arguments = (student, teacher, normalizers_of(statistics), torch.full((rows,), 0.1), weight)
        untempered = torch.stack([statistics[:, 0], statistics[:, -1].log2()]).contiguous()
        options = {"kind": kind, "beta": 0.3, "temperature": temperature}
        options["cross_entropy"] = (label_weight, untempered, label) if with_labels else None
        outs = [output.place(torch.full((rows, width + padding), 9.0), dtype, around=7.0) for _ in range(2)]
        for kernels, out in zip((cuda, cpu), outs, strict=True):
            kernels.gradient(out, *arguments, **options)
        assert_same(*outs, rtol=ROUNDING[dtype], atol=1e-7)
        actual = outs[0]
        assert not actual[:, width:].any() and (elements_around(actual) == 7).all()
        assert not actual[5].any() and actual.isfinite().all()
        assert with_labels or not actual[4].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 9, 2049])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
def test_softcap(cuda, cpu, dtype, width, layout):
    cap, (place, _, output) = 5.0, LAYOUTS[layout]
    values = random_logits(4, width, scale=5.0)[0]
    values[1, 0], values[2, 0], values[3, 0] = torch.nan, torch.inf, -torch.inf
    exact = cap * (values.to(dtype).double() / cap).tanh()
    for kernels in (cuda, cpu):
        logits, out = place.place(values, dtype), output.place(torch.zeros(4, width), dtype, around=7.0)
        kernels.softcap(out, logits, cap)
        assert_same(out.double(), exact, rtol=ROUNDING[dtype], atol=0)
        assert (elements_around(out) == 7).all() and out[2:, 0].tolist() == [cap, -cap]
        kernels.softcap(logits, logits, cap)
        assert_same(logits, out, rtol=0, atol=0)


CAPPED_CASES = [(kind, "alike", 257) for kind in DIVERGENCES]
CAPPED_CASES += [("generalized_jsd", layout, 9) for layout in LAYOUTS]


@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize(("kind", "layout", "width"), CAPPED_CASES)
def test_gradient_before_a_softcap(cuda, cpu, kind, layout, width, dtype):
    """The gradient by the logits times 1 - (logit / cap)^2, of rows with both losses, with one, with none."""
    cap, (*inputs, output) = 5.0, LAYOUTS[layout]
    values = [x.clamp(-cap, cap) for x in random_logits(4, width)]
    student, teacher = (place.place(x, dtype) for place, x in zip(inputs, values, strict=True))
    statistics = cpu.statistics(student, teacher, untempered=True)
    rows = normalizers_of(statistics), torch.full((4,), 0.1), torch.tensor([0.5, -2.0, 0.0, 0.0])
    untempered = torch.stack([statistics[:, 0], statistics[:, -1].log2()]).contiguous()
    labels = torch.tensor([1.0, 0.0, 0.3, 0.0]), untempered, torch.tensor([0, width - 1, width - 1, 0])
    slope = 1 - (student.double() / cap).square()
    for cross_entropy in (None, labels):
        by_logits = torch.empty_like(student)
        options = {"kind": kind, "beta": 0.3, "cross_entropy": cross_entropy}
        cpu.gradient(by_logits, student, teacher, *rows, **options)
        for kernels in (cuda, cpu):
            out = output.place(torch.full((4, width + 5), 9.0), dtype, around=7.0)
            kernels.gradient(out, student, teacher, *rows, **options, softcap=cap)
            assert_same(out[:, :width].double(), by_logits.double() * slope, rtol=2 * ROUNDING[dtype], atol=1e-6)
            assert not out[:, width:].any() and (elements_around(out) == 7).all() and not out[3].any()
    for kernels in (cuda, cpu):  # row 2 has a label alone
        alone = torch.empty_like(student)
        kernels.cross_entropy_gradient(alone, student, untempered, labels[0], labels[2], softcap=cap)
        assert_same(alone[2], out[2, :width], rtol=ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize("layout", ["aligned", "alike", "bases apart"])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("over", ["student", "teacher"])
def test_gradient_in_place(cuda, cpu, over, dtype, layout):
    values = random_logits(2, 5000)
    student, teacher = (place.place(x, dtype) for place, x in zip(LAYOUTS[layout], values, strict=False))
    statistics = cpu.statistics(student, teacher, untempered=True)
    rest = normalizers_of(statistics), torch.full((2,), 0.1), torch.ones(2)
    untempered = torch.stack([statistics[:, 0], statistics[:, -1].log2()]).contiguous()
    options = {"kind": "reverse_kl", "cross_entropy": (torch.ones(2), untempered, torch.tensor([4999, 2048]))}
    expected = torch.empty(2, 5000, dtype=dtype)
    cuda.gradient(expected, student, teacher, *rest, **options)
    out = {"student": student, "teacher": teacher}[over]
    cuda.gradient(out, student, teacher, *rest, **options)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize(
    "case", ["-inf at the same places", "NaN in the student", "NaN in the teacher", "far apart", "one-hot"]
)
def test_sums_and_gradient_of_hard_rows(cuda, cpu, case, dtype):
    student, teacher = (x[None].to(dtype) for x in hard_logits()[case])
    normalizers = normalizers_of(cpu.statistics(student, teacher, moments=False))
    for kind in SUMMED:
        actual, expected = (kernels.sums(student, teacher, normalizers, kind=kind) for kernels in (cuda, cpu))
        assert_same(actual, expected, rtol=1e-5, atol=1e-6)
    for kind in DIVERGENCES:
        outs = torch.empty(2, *student.shape, dtype=dtype)
        for kernels, out in zip((cuda, cpu), outs, strict=True):
            kernels.gradient(out, student, teacher, normalizers, torch.ones(1), torch.ones(1), kind=kind)
        assert_same(*outs, rtol=ROUNDING[dtype], atol=1e-7)


def test_warps_run_in_any_order(library, cuda):
    """Bitwise: no result depends on which warp comes first, so no barrier is missing between them."""
    student, teacher = random_logits(2, 5000)
    results = []
    for reverse in (False, True):
        library.reverse_threads(reverse)
        statistics = cuda.statistics(student, teacher, untempered=True)
        normalizers = normalizers_of(statistics)
        sums = cuda.sums(student, teacher, normalizers, kind="generalized_jsd")
        out = student.clone()
        cuda.gradient(out, out, teacher, normalizers, sums[:, 1].contiguous(), torch.ones(2), kind="generalized_jsd")
        results.append((statistics, sums, out))
    library.reverse_threads(False)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
def test_equal_models_have_zero_divergence(cuda, dtype):
    student = random_logits(2, 5000)[0].to(dtype)
    statistics = cuda.statistics(student, student.clone(), temperature=0.7)
    assert not statistics[:, [5, 8]].any()  # both gaps: exactly 0
    sums = cuda.sums(student, student.clone(), normalizers_of(statistics), kind="generalized_jsd", temperature=0.7)
    assert not sums.any()


def value(kind, a, b, beta):
    """Each divergence of fp64 log-probabilities [N, V], in nats, [N]."""
    return reference.DIVERGENCES[kind].value(a, b, beta).sum(-1)


@pytest.mark.parametrize("beta", [1e-6, 1e-5, 1 - 1e-5, 1 - 1e-6])
@pytest.mark.parametrize("kind", ["generalized_jsd", "alpha"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=TYPE_IDS[1:])
def test_16_bit_logits_near_the_ends_of_beta(cuda, cpu, kind, beta, dtype):
    """Terms are proportional to min(beta, 1 - beta), which the error of a fast logarithm is not."""
    student, teacher = (x.to(dtype) for x in random_logits(2, 1003, scale=1.0))
    z = student.double().requires_grad_()
    expected = value(kind, z.log_softmax(-1), teacher.double().log_softmax(-1), beta)
    (unscaled,) = torch.autograd.grad(expected.sum(), z)
    weight = (100 / unscaled.abs().amax(-1)).float()
    for kernels in (cuda, cpu):
        normalizers = normalizers_of(kernels.statistics(student, teacher, moments=False))
        loss, slope_sum = kernels.sums(student, teacher, normalizers, kind=kind, beta=beta).t().contiguous()
        gradient = torch.empty_like(student)
        kernels.gradient(gradient, student, teacher, normalizers, slope_sum, weight, kind=kind, beta=beta)
        assert_same(loss.double(), expected.detach(), rtol=1e-5, atol=0)
        exact = unscaled * weight[:, None].double()
        error, stored = ((x.double() - exact).norm() / exact.norm() for x in (gradient, exact.to(dtype)))
        assert error < 1e-5 + 1.1 * stored


@pytest.mark.parametrize("beta", [0.5, 0.3])
@pytest.mark.parametrize("kind", SUMMED)
def test_large_16_bit_logits(cuda, cpu, kind, beta):
    """The normalizers' rounding in bits, here 2^-13, is made up for."""
    student, teacher = ((x + 1000).bfloat16() for x in random_logits(2, 1003, scale=30.0))
    z = student.double().requires_grad_()
    expected = value(kind, (z / 0.7).log_softmax(-1), (teacher.double() / 0.7).log_softmax(-1), beta)
    (exact,) = torch.autograd.grad(expected.sum(), z)
    for kernels in (cuda, cpu):
        # Rounded as the loss does it: the biases are what the shifts have lost.
        tops = torch.stack([student, teacher], 1).double()
        shifts = 0.7 * (tops / 0.7).logsumexp(-1)
        biases = (shifts - shifts.float().double()) * LOG2_E / 0.7
        normalizers = torch.stack([shifts, biases], -1).flatten(1).float()
        options = {"kind": kind, "beta": beta, "temperature": 0.7}
        loss, slope_sum = kernels.sums(student, teacher, normalizers, **options).t().contiguous()
        gradient = torch.empty_like(student)
        kernels.gradient(gradient, student, teacher, normalizers, slope_sum, torch.ones(2), **options)
        assert_same(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        error, stored = ((x.double() - exact).norm() / exact.norm() for x in (gradient, exact.bfloat16()))
        assert error < 1e-4 + 1.1 * stored


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradient_of_the_three_passes_against_fp64(cuda, kind):
    temperature, beta = 1.7, 0.3
    student, teacher = random_logits(2, 1003)
    weight, label_weight, label = torch.tensor([0.5, -2.0]), torch.tensor([1.0, 0.25]), torch.tensor([1002, 0])

    statistics = cuda.statistics(student, teacher, temperature=temperature, untempered=True)
    normalizers = normalizers_of(statistics)
    options = {"kind": kind, "beta": beta, "temperature": temperature}
    student_bits, teacher_bits = statistics[:, 1].log2(), statistics[:, 3].log2()
    if kind == "forward_kl":
        loss = (statistics[:, 8] / statistics[:, 3] - teacher_bits + student_bits) * LN_2
        slope_sum = torch.zeros(2)
    elif kind == "reverse_kl":
        slope_sum = loss = (statistics[:, 5] / statistics[:, 1] - student_bits + teacher_bits) * LN_2
    else:
        loss, slope_sum = (x.contiguous() for x in cuda.sums(student, teacher, normalizers, **options).unbind(-1))
    untempered = torch.stack([statistics[:, 0], statistics[:, -1].log2()]).contiguous()
    gradient = torch.empty_like(student)
    labels = label_weight, untempered, label
    cuda.gradient(gradient, student, teacher, normalizers, slope_sum, weight, **options, cross_entropy=labels)

    z = student.double().requires_grad_()
    log_probs = ((x / temperature).log_softmax(-1) for x in (z, teacher.double()))
    expected = value(kind, *log_probs, beta)
    cross_entropy = -z.log_softmax(-1).gather(1, label[:, None])[:, 0]
    (weight * expected + label_weight * cross_entropy).sum().backward()
    assert_same(loss.double(), expected.detach(), rtol=2e-6, atol=1e-6)
    assert_same(gradient.double(), z.grad, rtol=2e-5, atol=1e-8)
