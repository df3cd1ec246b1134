"""The kernel that keeps rows on chip, run by the emulator, against the three passes and against fp64."""

import ctypes

import pytest
import torch
from csrc.emulated_clusters import Options, cluster_loss
from csrc.emulated_kernels import DIVERGENCES, SUMMED, KernelError, check, normalizers_of
from csrc.rows_of_logits import LAYOUTS, elements_around, hard_logits, random_logits

from megatron_gkd.ops import reference

BF16_ROUNDING = 2**-7
LN_2 = 0.6931471805599453


def assert_same(actual, expected, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def bf16_logits(rows, width, layout="aligned", **options):
    values = random_logits(rows, width, **options)
    return [place.place(x, torch.bfloat16) for place, x in zip(LAYOUTS[layout], values, strict=False)]


@pytest.fixture(autouse=True)
def clusters(library):
    library.use_clusters(True)
    yield
    library.use_clusters(False)


@pytest.fixture(params=[False, True], ids=["first block first", "last block first"])
def any_order(request, library):
    library.reverse_threads(request.param)
    yield
    library.reverse_threads(False)


@pytest.fixture
def multiprocessors(library):
    """Set how many the device has: rows are shared by more blocks where there are fewer rows."""
    yield library.set_multiprocessors
    library.set_multiprocessors(4)


def exact_loss(student, teacher, options, weight, labels):
    """Return the divergence [N] and the gradient [N, V] of the loss, in fp64."""
    z = student.double().requires_grad_()
    a, b = ((x / options.temperature).log_softmax(-1) for x in (z, teacher.double()))
    divergence = reference.DIVERGENCES[options.kind].value(a, b, options.beta).sum(-1)
    loss = (weight * divergence).sum()
    if labels is not None:
        label_weight, column = labels
        loss = loss - (label_weight * z.log_softmax(-1).gather(1, column.clamp(min=0)[:, None])[:, 0]).sum()
    return divergence.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "multiprocessor_count"), [(1.0, 4), (1.7, 20)])
def test_loss_and_gradient_against_fp64(library, multiprocessors, kind, temperature, multiprocessor_count):
    """One block a row, and four; two clusters take three rows."""
    multiprocessors(multiprocessor_count)
    options = Options(kind, beta=0.3, temperature=temperature)
    student, teacher = bf16_logits(3, 1003, "alike")
    weight, labels = torch.tensor([0.5, -2.0, 3.0]), (torch.tensor([1.0, 0.25, 0.0]), torch.tensor([1002, 0, 5]))
    out = torch.full((3, 1010), 9.0, dtype=torch.bfloat16)
    found = cluster_loss(library, out, student, teacher, weight, options, labels)
    divergence, gradient = exact_loss(student, teacher, options, weight, labels)
    if kind in SUMMED:
        assert_same(found.sums[:, 0].double(), divergence, rtol=2e-6, atol=1e-6)
    exact = gradient.to(torch.bfloat16)
    assert_same(out[:, :1003].double(), exact.double(), rtol=BF16_ROUNDING, atol=1e-7)
    error, rounding = ((x.double() - gradient).norm() for x in (out[:, :1003], exact))
    assert error < 1.02 * rounding and not out[:, 1003:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "multiprocessor_count"), [(1, 4), (257, 20), (5000, 4), (5003, 80)])
def test_statistics_sums_and_gradient_of_the_three_passes(
    library, cuda, multiprocessors, layout, width, multiprocessor_count
):
    """Rows with both losses, with one, with none, wherever they lie in memory."""
    multiprocessors(multiprocessor_count)
    *_, output = LAYOUTS[layout]
    rows = 5
    student, teacher = bf16_logits(rows, width, layout)
    weight = torch.tensor([0.5, 2.0, -1.0, 0.0, 0.0])
    labels = torch.tensor([1.0, 0.0, 0.5, 0.3, 0.0]), torch.tensor([0, width - 1, -1, width - 1, 0])
    out, expected = (output.place(torch.full((rows, width + 5), 9.0), torch.bfloat16, around=7.0) for _ in range(2))
    options = {"kind": "generalized_jsd", "beta": 0.3, "temperature": 0.7}
    found = cluster_loss(library, out, student, teacher, weight, Options(**options), labels)

    statistics = cuda.statistics(student, teacher, temperature=0.7, untempered=True)
    normalizers = normalizers_of(statistics)
    sums = cuda.sums(student, teacher, normalizers, **options)
    untempered = torch.stack([statistics[:, 0], statistics[:, -1].log2()]).contiguous()
    cross_entropy = labels[0], untempered, labels[1]
    slope_sum = sums[:, 1].contiguous()
    cuda.gradient(expected, student, teacher, normalizers, slope_sum, weight, **options, cross_entropy=cross_entropy)
    assert_same(found.statistics[:, [0, 2, 6, 9]], statistics[:, [0, 2, 6, 9]], rtol=0, atol=0)
    assert_same(found.statistics, statistics, rtol=1e-5, atol=3e-5)
    assert_same(found.sums, sums, rtol=1e-5, atol=1e-6)
    assert_same(out, expected, rtol=BF16_ROUNDING, atol=1e-6)
    assert (elements_around(out) == 7).all() and not out[:, width:].any() and not out[4].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("case", hard_logits())
def test_hard_rows(library, cpu, cuda, multiprocessors, case, temperature):
    multiprocessors(2)
    student, teacher = (x[None].to(torch.bfloat16) for x in hard_logits()[case])
    out, expected, weight = torch.empty_like(student), torch.empty_like(student), torch.ones(1)
    labels = torch.ones(1), torch.tensor([17])
    options = {"kind": "generalized_jsd", "temperature": temperature}
    found = cluster_loss(library, out, student, teacher, weight, Options(**options), labels)
    statistics = cpu.statistics(student, teacher, temperature=temperature, untempered=True)
    assert_same(found.statistics[:, [0, 2, 6, 9]], statistics[:, [0, 2, 6, 9]], rtol=0, atol=0)
    assert_same(found.statistics, statistics, rtol=1e-5, atol=3e-5)
    if not statistics.isfinite().all() and "only" not in case:
        return  # a model without any distribution
    normalizers = normalizers_of(statistics)
    sums = cuda.sums(student, teacher, normalizers, **options)
    assert_same(found.sums, sums, rtol=1e-5, atol=1e-6)
    untempered = torch.stack([statistics[:, 0], statistics[:, -1].log2()]).contiguous()
    slope_sum = sums[:, 1].contiguous()
    cross_entropy = labels[0], untempered, labels[1]
    cuda.gradient(expected, student, teacher, normalizers, slope_sum, weight, **options, cross_entropy=cross_entropy)
    assert_same(out, expected, rtol=BF16_ROUNDING, atol=1e-6)


@pytest.mark.parametrize("over", ["student", "teacher"])
def test_in_place(library, over):
    """Bitwise: a cluster's next row is read while one is written."""
    student, teacher = bf16_logits(5, 5000)
    labels = torch.ones(5), torch.tensor([4999, 2048, 0, 1, 2])
    arguments = torch.ones(5), Options("reverse_kl"), labels
    expected = torch.empty_like(student)
    statistics = cluster_loss(library, expected, student, teacher, *arguments).statistics
    out = {"student": student, "teacher": teacher}[over]
    assert torch.equal(cluster_loss(library, out, student, teacher, *arguments).statistics, statistics)
    assert torch.equal(out, expected)


def test_blocks_and_warps_run_in_any_order(library, multiprocessors):
    """Bitwise: no result depends on which block or warp comes first, so no barrier is missing between them."""
    multiprocessors(20)
    results = []
    for reverse in (False, True):
        library.reverse_threads(reverse)
        student, teacher = bf16_logits(5, 5000)
        labels = torch.ones(5), torch.tensor([4999, 2048, 0, 1, 2])
        found = cluster_loss(library, student, student, teacher, torch.ones(5), Options("generalized_jsd"), labels)
        results.append((*found, student))
    library.reverse_threads(False)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_equal_models_have_zero_divergence(library):
    student, _ = bf16_logits(2, 5000, scale=30.0)
    out = torch.empty_like(student)
    options = Options("generalized_jsd", temperature=0.7)
    found = cluster_loss(library, out, student, student.clone(), torch.ones(2), options)
    assert not found.statistics[:, [5, 8]].any() and not found.sums.any() and not out.any()


def test_large_logits_keep_their_digits(library):
    """The reference is rounded in bits, which the sums then have to make up for."""
    options = Options("generalized_jsd", temperature=0.7)
    student, teacher = (x + 1000 for x in bf16_logits(2, 1003, scale=30.0))
    out = torch.empty_like(student)
    found = cluster_loss(library, out, student, teacher, torch.ones(2), options)
    scores = student.double() / 0.7
    expected = (scores - scores.amax(-1, keepdim=True)).exp().sum(-1)
    assert_same(found.statistics[:, 1].double(), expected, rtol=1e-6, atol=0)
    divergence, gradient = exact_loss(student, teacher, options, torch.ones(2), None)
    # The form for equal weights leaves out 2^-24 of the log-sum-exp in bits, here 2,300 of them.
    assert_same(found.sums[:, 0].double(), divergence, rtol=1e-4, atol=1e-6)
    assert_same(out.double(), gradient.bfloat16().double(), rtol=BF16_ROUNDING, atol=1e-5)


def test_a_device_without_clusters_and_a_row_that_does_not_fit(library):
    student, teacher = bf16_logits(1, 9)
    wide = torch.empty(1, 470_000, dtype=torch.bfloat16)
    arguments = torch.ones(1), Options("generalized_jsd")
    with pytest.raises(KernelError, match="not started"):
        cluster_loss(library, wide, wide, wide, *arguments)
    library.set_compute_capability(8)
    try:
        with pytest.raises(KernelError, match="not started"):
            cluster_loss(library, student, student, teacher, *arguments)
    finally:
        library.set_compute_capability(9)


@pytest.mark.parametrize("width", [5003, 20_001])
@pytest.mark.parametrize("layout", ["alike", "bases apart"])
def test_the_three_passes_with_few_rows(library, cuda, multiprocessors, layout, width):
    """Two blocks a row, and four; what they write is what one block writes, but for rounding."""
    mask, labels = torch.tensor([True, False, True]), torch.tensor([width - 1, -1, 0])
    student, teacher = bf16_logits(3, width, layout)
    options = {"kind": "generalized_jsd", "temperature": 0.7}
    results = []
    for clusters in (False, True):
        library.use_clusters(clusters)
        statistics = cuda.statistics(student, teacher, mask=mask, temperature=0.7, first=1000, untempered=True)
        normalizers = normalizers_of(statistics)
        sums = cuda.sums(student, teacher, normalizers, mask=mask, **options)
        untempered = torch.stack([statistics[:, 0], statistics[:, -1].log2()]).contiguous()
        cross_entropy = torch.tensor([0.5, 0.0, 0.0]), untempered, labels
        out = torch.full((3, width + 5), 9.0, dtype=torch.bfloat16)
        rows = normalizers, sums[:, 1].contiguous(), torch.tensor([1.0, 0.0, -2.0])
        cuda.gradient(out, student, teacher, *rows, **options, cross_entropy=cross_entropy)
        results.append((statistics, sums, out))
    (statistics, sums, out), actual = results
    assert_same(actual[0][:, [0, 2, 6, 9]], statistics[:, [0, 2, 6, 9]], rtol=0, atol=0)
    assert_same(actual[0], statistics, rtol=1e-5, atol=3e-5)
    assert_same(actual[1], sums, rtol=1e-5, atol=1e-6)
    assert_same(actual[2], out, rtol=BF16_ROUNDING, atol=1e-6)
    assert not actual[2][1].any() and not actual[2][:, width:].any()
    assert not torch.equal(actual[0], statistics), "the sums were added in another order"


def test_reductions_over_a_cluster_follow_each_other(library, any_order):
    """However far one block is ahead of another."""
    out = torch.zeros(128, 8)
    library.cuda_reduce_over_a_cluster.argtypes = [ctypes.c_void_p]
    library.cuda_reduce_over_a_cluster.restype = ctypes.c_char_p
    check(library.cuda_reduce_over_a_cluster(out.data_ptr()))
    assert (out == 8256.0 * torch.arange(1, 9)).all()


def test_copies_arrive_when_they_are_waited_for(library):
    out = torch.zeros(64)
    library.cuda_use_copies.argtypes, library.cuda_use_copies.restype = [ctypes.c_void_p], ctypes.c_char_p
    check(library.cuda_use_copies(out.data_ptr()))
    assert out.all()
