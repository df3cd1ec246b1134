"""The passes over a top-k on the emulated GPU, thread by thread, and on the CPU, against torch and fp64."""

import pytest
import torch
from csrc.emulated_kernels import DIVERGENCES, TYPES
from csrc.emulated_top_k import Problem, TopKKernels, build
from csrc.rows_of_logits import LAYOUTS, elements_around, random_logits

from megatron_gkd.ops import reference

TYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in TYPES]
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The emulated GPU and the CPU."""
    library = build(tmp_path_factory.mktemp("emulated_top_k"))
    return TopKKernels(library, True), TopKKernels(library, False)


def expected_choice(logits, k, temperature):
    """(values, ids, tail) of fp64 logits: NaN first, equals by rising column."""
    order = torch.where(logits.isnan(), torch.inf, logits.double())
    ids = order.sort(stable=True, dim=-1, descending=True).indices
    values = logits.double().gather(1, ids)
    rest = values[:, k:] / temperature
    return values[:, :k], ids[:, :k], rest.logsumexp(-1) if rest.shape[1] else torch.full_like(values[:, 0], -torch.inf)


def rows_to_choose_from(width):
    """Rows by what is hard about them; the radix select is reached where a bound from maxima leaves too many."""
    rows = {name: random_logits(1, width, seed=seed)[0][0] for seed, name in enumerate(("random", "ties", "half"))}
    rows["ties"] = rows["ties"].sign() * (rows["ties"].abs() > 2)  # -1, -0, 0 and 1
    rows["half"][: width // 2] = -torch.inf
    rows["equal"] = torch.ones(width)
    rows["excluded"] = torch.full((width,), -torch.inf)
    rows["rising"] = torch.arange(width) / 8
    rows["falling"] = -rows["rising"]
    rows["one thread's"] = torch.where(torch.arange(width) % 2048 < 8, 100.0, -100.0)
    return rows


@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize(("width", "k"), [(1, 1), (9, 9), (257, 64), (2501, 1), (2501, 300)])
def test_select(both, dtype, width, k):
    rows = rows_to_choose_from(width)
    logits = LAYOUTS["alike"][0].place(torch.stack(list(rows.values())), dtype)
    values, ids, tail = expected_choice(logits, k, 0.7)
    for kernels in both:
        found = kernels.select(logits, k, 0.7, first=1000)
        assert torch.equal(found[:, :k].view(torch.float32).double(), values), list(rows)
        assert torch.equal(found[:, -k:] - 1000, ids.int()), list(rows)
        maximum, total = found[:, k : k + 2].view(torch.float32).double().unbind(-1)
        torch.testing.assert_close(maximum / 0.7 + total.log(), tail, rtol=1e-5, atol=1e-5)
        without = kernels.select(logits, k)
        assert torch.equal(without[:, :k], found[:, :k]) and torch.equal(without[:, k:] + 1000, found[:, -k:])


def test_select_with_nan_and_fewer_columns_than_places(both):
    logits = random_logits(2, 300)[0]
    logits[0, [7, 200]], logits[1] = torch.nan, torch.nan
    for kernels in both:
        found = kernels.select(logits, 3, 1.0)
        assert found[0, -3:-1].tolist() == [7, 200] and found[1, -3:].tolist() == [0, 1, 2]
        assert found[0, :2].view(torch.float32).isnan().all() and found[0, 4:5].view(torch.float32) > 1
        few = kernels.select(logits[:, 10:12], 4, 1.0)
        assert (few[0, -2:] == -1).all() and (few[0, 2:4].view(torch.float32) == -torch.inf).all()
        none = kernels.select(logits[:, :0], 2, 1.0)
        assert none[0, -2:].tolist() == [-1, -1] and none[0, 2:4].view(torch.float32).tolist() == [-torch.inf, 0]


@pytest.mark.parametrize("ranks", [1, 3])
def test_merge(both, ranks):
    rows = torch.stack(list(rows_to_choose_from(90).values()))
    for k in (1, 20, 60):
        places = min(k, 90 // ranks)
        values, ids, tail = expected_choice(rows, k, 0.7)
        shift = values[:, :1].nan_to_num(neginf=0)
        for kernels in both:
            shards = [
                kernels.select(shard.contiguous(), places, 0.7, first=rank * 90 // ranks)
                for rank, shard in enumerate(rows.chunk(ranks, 1))
            ]
            found = kernels.merge(torch.stack(shards), places, k, 0.7)
            assert torch.equal(found[0], ids) and torch.equal(found[1], (values - shift).float())
            torch.testing.assert_close(found[2].double(), tail - shift[:, 0] / 0.7, rtol=1e-5, atol=1e-5)


def problem_of(student, bucket, labels=None, **options):
    """A teacher's top 5 of other logits, of which some are missing or not this shard's."""
    rows, width = student.shape
    k = min(5, width)
    teacher = random_logits(rows, width, seed=7)[1]
    values, ids = teacher.topk(k)
    tail = teacher.scatter(1, ids, -torch.inf).logsumexp(-1) if bucket else None
    if width > 5:
        ids[1, 2] = -1
    return Problem(student, ids, values, tail, labels=labels, **options)


def outcomes(problem, z):
    """Log-probabilities of student and teacher, [N, k (+ 1)], in fp64."""
    ids, temperature = problem.ids, problem.temperature
    present = ids >= 0
    a = torch.where(present, z.gather(1, ids.clamp(min=0)) / temperature, -torch.inf)
    b = torch.where(present, problem.values.double() / temperature, -torch.inf)
    if problem.tail is not None:
        chosen = torch.zeros_like(z).scatter_add(1, ids.clamp(min=0), present.double()) > 0
        if (~chosen).any():
            a = torch.cat([a, torch.where(chosen, -torch.inf, z / temperature).logsumexp(-1, keepdim=True)], -1)
            b = torch.cat([b, problem.tail.double()[:, None]], -1)
    return a.log_softmax(-1), b.log_softmax(-1)


@pytest.mark.parametrize("bucket", [False, True], ids=["renormalize", "bucket"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradient_against_fp64(both, kind, bucket):
    labels = torch.tensor([2, -100, 1, 299])
    weight, label_weight = torch.tensor([0.5, -2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.5, 2.0])
    student, width = random_logits(4, 300)[0], 300
    problem = problem_of(student, bucket, labels, kind=kind, temperature=1.7)
    labels[0] = problem.ids[0, 3]
    z = student.double().requires_grad_()
    loss = reference.DIVERGENCES[kind].value(*outcomes(problem, z), problem.beta).sum(-1)
    own = z.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    cross_entropy = torch.where(labels == -100, 0, -own)
    (weight * loss + label_weight * cross_entropy).sum().backward()
    for kernels in both:
        normalizers, sums, found = kernels.sums(problem, kernels.statistics(problem))
        torch.testing.assert_close(sums[:, 0].double(), loss.detach(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(found.double(), cross_entropy.detach(), rtol=2e-6, atol=1e-6)
        out = torch.full((4, width + 3), 9.0)
        kernels.gradient(out, problem, normalizers, sums, weight, label_weight)
        torch.testing.assert_close(out[:, :width].double(), z.grad, rtol=2e-5, atol=1e-7)
        assert not out[:, width:].any()


@pytest.mark.parametrize("with_labels", [False, True])
def test_combine(both, with_labels):
    """More rows than a block has threads."""
    rows, factor = 300, 3.0
    gathered = torch.rand(2, rows, 7, generator=torch.Generator().manual_seed(0))
    weight, label_weight, cross_entropy = gathered[0, :, 0].sqrt(), gathered[0, :, 1].sqrt(), gathered[1, :, 0].sqrt()
    weight[4], gathered[:, 4] = 0, torch.inf
    labels = torch.arange(rows)
    labels[7] = -100
    own = torch.where(labels == -100, 0, label_weight) if with_labels else torch.zeros(rows)
    sums = gathered.double().sum(0)
    sums[:, 6].clamp_(max=1)
    losses = torch.where(weight == 0, 0, weight * sums[:, 0]) + own * cross_entropy
    metrics = sums.clone()
    metrics[:, 1] = cross_entropy if with_labels else 0
    expected = metrics, losses, sums[:, 1], factor * weight, factor * own
    of_labels = (cross_entropy, weight, labels, label_weight) if with_labels else (None, weight, None, None)
    found = [kernels.combine(gathered, *of_labels, factor) for kernels in both]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    for actual, exact in list(zip(found[0], expected, strict=True))[: 5 if with_labels else 4]:
        torch.testing.assert_close(actual, exact.float())


SHAPES = [(width, layout) for width in (1, 9, 2500) for layout in LAYOUTS]


@pytest.mark.parametrize(("width", "layout"), [*SHAPES, (66001, "alike")])  # more than one window of excluded columns
@pytest.mark.parametrize("dtype", TYPES, ids=TYPE_IDS)
def test_both_devices_agree_in_every_layout(both, dtype, width, layout):
    """Also with a softcap, in place, for the bucket alone, the labels alone, neither and no weight at all."""
    place, _, output = LAYOUTS[layout]
    student = place.place(random_logits(4, width)[0].clamp(-5, 5), dtype)
    labels = torch.tensor([0, width - 1, width // 2, 0])
    label_weight, weight = torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.tensor([0.5, -2.0, 0.0, 0.0])
    for bucket, with_labels in ((True, True), (True, False), (False, True), (False, False)):
        problem = problem_of(student, bucket, labels if with_labels else None)
        outs, numbers = [], []
        for kernels in both:
            statistics = kernels.statistics(problem)
            normalizers, sums, _ = kernels.sums(problem, statistics)
            numbers.append((statistics, normalizers, sums))
            out = output.place(torch.full((4, width + 5), 9.0), dtype, around=7.0)
            rest = problem, normalizers, sums, weight, label_weight if with_labels else None
            kernels.gradient(out, *rest, softcap=5.0)
            assert (elements_around(out) == 7).all() and not out[:, width:].any() and not out[3].any()
            in_place = student.clone()
            kernels.gradient(in_place, Problem(in_place, *list(vars(problem).values())[1:]), *rest[1:], softcap=5.0)
            assert torch.equal(in_place, out[:, :width])
            outs.append(out)
        for pair in (*zip(*numbers, strict=True), outs):
            torch.testing.assert_close(*pair, rtol=ROUNDING[dtype], atol=1e-6)


def test_warps_run_in_any_order(both):
    """Bitwise: no result depends on which warp comes first, so no barrier is missing between them."""
    kernels = both[0]
    problem = problem_of(random_logits(3, 2500)[0], True, torch.tensor([2, 3, 4]))
    equal = torch.ones(1, 2500)
    results = []
    for reverse in (False, True):
        kernels.library.reverse_threads(reverse)
        found = [kernels.select(x, 64, 0.9) for x in (problem.student, equal)]
        statistics = kernels.statistics(problem)
        numbers = kernels.sums(problem, statistics)
        out = problem.student.clone()
        kernels.gradient(out, problem, *numbers[:2], torch.ones(3), torch.ones(3))
        results.append((*found, statistics, *numbers, out))
    kernels.library.reverse_threads(False)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
