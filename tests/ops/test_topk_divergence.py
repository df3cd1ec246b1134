"""The divergence over the teacher's top-k: loss and gradient of the WHOLE vocabulary, gathered over the ranks, against
the rows of the reference over the k tokens (and the bucket), unsharded and in fp64."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.oracle import BETAS, TEMPERATURES, pad_columns, random_logits, relative_error, shard, topk_divergence_of
from ops.oracle import oracle as full_oracle

from megatron_gkd.ops import reference
from megatron_gkd.ops import topk as topk_module
from megatron_gkd.ops.spec import DivergenceSpec, TopKShardSpec
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_choice import vocab_parallel_topk
from megatron_gkd.ops.topk_passes import gradient as write_topk_gradient
from megatron_gkd.ops.topk_statistics import compute_topk_forward

TOKENS = 7
TAILS = ["renormalize", "bucket"]
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    beta: float
    temperature: float = 1.0
    tail_mode: str = "bucket"
    dtype: torch.dtype = torch.float32
    k: int = 9
    width: int = 25 * 4  # over all ranks, padding included
    vocab_size: int | None = None
    tokens: int = TOKENS
    masked: bool = False
    scale: float = 3.0
    teacher: str = "random"
    missing: bool = False
    divergence: str = "jsd"

    @property
    def size(self):
        return self.vocab_size or self.width

    @property
    def mask(self):
        return torch.arange(self.tokens) % 3 != 1 if self.masked else None

    @property
    def options(self):
        return {
            "beta": self.beta,
            "temperature": self.temperature,
            "tail_mode": self.tail_mode,
            "divergence": self.divergence,
        }

    @property
    def inputs(self):
        """(student, teacher, upstream) of the whole vocabulary; columns past vocab_size hold ordinary numbers."""
        s, t = (random_logits(self.tokens, self.size, seed=seed, scale=self.scale) for seed in (0, 1))
        if self.teacher == "ties":
            t = t.sign()
        elif self.teacher == "one rank":
            t[:, -self.k :] += 100
        if self.teacher == "one-hot":
            s[:], t[:] = -1e4, -1e4
            s[:, 1] = t[:, 2] = 1e4
        s, t = (pad_columns(x.to(self.dtype), self.width - self.size, seed=4) for x in (s, t))
        return s, t, random_logits(self.tokens, seed=2, scale=1.0)

    def topk(self, teacher, group):
        chosen = vocab_parallel_topk(
            teacher, self.k, group=group, vocab_size=self.vocab_size, temperature=self.temperature
        )
        if not self.missing:
            return chosen
        gone = (torch.arange(self.k) + torch.arange(self.tokens)[:, None]) % 3 == 0
        gone[-1] = True  # nothing is known of one token
        outside = torch.where(torch.arange(self.k) % 2 == 0, -1, self.size)
        return replace(chosen, ids=torch.where(gone, outside, chosen.ids))


def oracle(
    student, upstream, topk, size, *, beta, temperature, tail_mode, divergence="jsd", mask=None, dtype=torch.float64
):
    """(D [N], gradient [N, V]) by autograd through the reference's row over the k tokens and the bucket."""
    student = student.detach().to(dtype).requires_grad_()
    z = student[:, :size] / temperature
    present = (topk.ids >= 0) & (topk.ids < size)
    ids = torch.where(present, topk.ids, 0)
    s = torch.where(present, z.gather(1, ids), -torch.inf)
    t = torch.where(present, topk.values.to(dtype) / temperature, -torch.inf)
    if tail_mode == "bucket" and (present.sum(-1) < size).any():
        chosen = torch.zeros_like(z).scatter_add(1, ids, present.to(dtype)) > 0
        s = torch.cat([s, torch.where(chosen, -torch.inf, z).logsumexp(-1, keepdim=True)], -1)
        t = torch.cat([t, topk.tail.to(dtype)[:, None]], -1)
    some = t.amax(-1) > -torch.inf
    a, b = (torch.where(some[:, None], x, 0).log_softmax(-1) for x in (s, t))
    value = reference.divergence_at(beta, divergence).value(a, b, beta).sum(-1)
    counts = some if mask is None else some & mask
    value = torch.where(counts, value, 0)
    value.backward(upstream.to(dtype))
    return value.detach(), torch.where(counts[:, None], student.grad, 0)


def run_cases(rank, world_size, cases):
    """For each case this rank's loss, the gradient of its shard and the fields of its top-k."""
    results = []
    for case in cases:
        s, t, upstream = case.inputs
        if case.masked:
            s[1], t[4] = torch.nan, torch.nan
        group = dist.group.WORLD
        mine, topk = shard(s, rank, world_size).requires_grad_(), case.topk(shard(t, rank, world_size), group)
        value = topk_divergence_of(mine, topk, group=group, vocab_size=case.vocab_size, mask=case.mask, **case.options)
        value.backward(upstream)
        results.append((value, mine.grad, vars(topk)))
    return results


def assert_exact(world, cases):
    for case, *by_rank in zip(cases, *world.run(run_cases, cases), strict=True):
        losses, gradients, topks = zip(*by_rank, strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses), case
        loss, gradient, topk = losses[0], torch.cat(gradients, -1), TopK(**topks[0])
        assert gradient.dtype == case.dtype and loss.dtype == torch.float32
        s, _, upstream = case.inputs
        exact, in_fp32 = (
            oracle(s, upstream, topk, case.size, mask=case.mask, dtype=dtype, **case.options)
            for dtype in (torch.float64, torch.float32)
        )
        assert relative_error(loss, exact[0]) < 1e-5, case
        own_error = relative_error(in_fp32[1], exact[1])  # cancellation, where one outcome has nearly all the mass
        rounding = 2.0**-8 if case.dtype == torch.bfloat16 else 0.0
        assert relative_error(gradient, exact[1]) < max(2e-5, 1.5 * own_error) + rounding, (case, own_error)
        assert (gradient[:, case.size :] == 0).all(), case
        if case.masked:
            assert (loss[~case.mask] == 0).all() and (gradient[~case.mask] == 0).all(), case
        if case.tail_mode == "renormalize":
            there = torch.zeros_like(gradient, dtype=torch.bool)
            for row, ids in zip(there, topk.ids, strict=True):
                row[ids[(ids >= 0) & (ids < case.size)]] = True
            assert (gradient[~there] == 0).all(), case
        if case.missing:
            assert loss[-1] == 0 and (gradient[-1] == 0).all(), case


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_loss_and_whole_gradient_equal_the_oracle(gloo_world, tp):
    assert_exact(gloo_world(tp), [Case(*point) for point in itertools.product(BETAS, TEMPERATURES, TAILS, DTYPES)])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_edges_of_k_of_the_vocabulary_and_of_the_numbers(gloo_world, tp):
    cases = [
        case
        for beta, tail in itertools.product([0.0, 0.5, 1.0], TAILS)
        for case in (
            Case(beta, tail_mode=tail, k=1),
            Case(beta, tail_mode=tail, k=99),
            Case(beta, tail_mode=tail, k=100),
            Case(beta, tail_mode=tail, teacher="one rank"),
            Case(beta, tail_mode=tail, teacher="ties", dtype=torch.bfloat16, masked=True),
            Case(beta, tail_mode=tail, missing=True, temperature=0.7),
            Case(beta, tail_mode=tail, width=9 * 4, vocab_size=9 * 4 - 5, masked=True),  # padding on the last shard
            Case(beta, tail_mode=tail, width=9 * 4, vocab_size=9, k=8, missing=True),  # all of some shards
            Case(beta, tail_mode=tail, width=4, k=3),
            Case(beta, tail_mode=tail, scale=1e4),
            Case(beta, tail_mode=tail, teacher="one-hot", k=3, temperature=0.5),
            Case(beta, tail_mode=tail, tokens=0),
        )
    ]
    assert_exact(gloo_world(tp), cases)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_divergence_of_the_table(gloo_world, tp):
    cases = [
        Case(beta, tail_mode=tail, divergence=name, temperature=0.7, missing=missing)
        for name, family in reference.FAMILIES.items()
        for beta in (*([0.0] if family.at_0 else []), 0.1, 0.5, 0.9, *([1.0] if family.at_1 else []))
        for tail, missing in itertools.product(TAILS, [False, True])
    ]
    assert_exact(gloo_world(tp), cases)


def shard_spec(width, *, tail_mode="renormalize", **spec):
    return TopKShardSpec(DivergenceSpec(**spec).on_shard(width), tail_mode)


def value_and_gradient(student, topk, upstream=None, **options):
    student = student.clone().requires_grad_()
    value = topk_divergence_of(student, topk, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), student.grad


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_all_tokens_are_the_full_divergence(beta, tail):
    s, t = (random_logits(2, 5, 13, seed=seed, dtype=torch.float64) for seed in (0, 1))
    upstream = random_logits(2, 5, seed=2, dtype=torch.float64)
    for topk in (
        vocab_parallel_topk(t, 11, vocab_size=11, temperature=0.7),
        TopK(torch.arange(13).expand(2, 5, 13), t, torch.zeros(2, 5, dtype=torch.float64), 0.7),  # tail: no one's mass
    ):
        options = {"beta": beta, "temperature": 0.7, "vocab_size": 11}
        for actual, expected in zip(
            value_and_gradient(s, topk, upstream, tail_mode=tail, **options),
            full_oracle(s, t, upstream, **options),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(beta, tail):
    s, t = (random_logits(3, 7, seed=seed, dtype=torch.float64) for seed in (0, 1))
    topk = vocab_parallel_topk(t, 3, vocab_size=6, temperature=0.7)
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(
        lambda s: topk_divergence_of(s, topk, beta=beta, temperature=0.7, vocab_size=6, mask=mask, tail_mode=tail),
        (s.requires_grad_(),),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_log_probs_equal_logits_at_temperature_1(beta, tail):
    s, t = (random_logits(4, 20, seed=seed, dtype=torch.float64) for seed in (0, 1))
    local = vocab_parallel_topk(t, 5)
    server = TopK.from_log_probs(local.ids, t.log_softmax(-1).gather(1, local.ids))
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = TopK.from_log_probs(server.ids[:, order], server.values[:, order])
    for topk in (server, shuffled):
        for actual, expected in zip(
            value_and_gradient(s, topk, beta=beta, tail_mode=tail),
            value_and_gradient(s, local, beta=beta, tail_mode=tail),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_renormalized_log_probs_at_another_temperature():
    s, t = (random_logits(4, 20, seed=seed, dtype=torch.float64) for seed in (0, 1))
    local = vocab_parallel_topk(t, 5, temperature=None)
    server = TopK.from_log_probs(local.ids, t.log_softmax(-1).gather(1, local.ids))
    torch.testing.assert_close(
        topk_divergence_of(s, server, beta=0.5, temperature=2.0),
        topk_divergence_of(s, local, beta=0.5, temperature=2.0),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_the_student_may_exclude_tokens(beta, tail):
    """-inf in the student's logits, at tokens of the top-k only where the divergence isn't infinite for it."""
    s, t = (random_logits(3, 12, seed=seed) for seed in (0, 1))
    topk = vocab_parallel_topk(t, 4)
    others = (t.argsort(descending=True) >= 0).scatter(1, topk.ids, False)
    s[0, others[0].nonzero()[:3, 0]] = -torch.inf
    if tail == "renormalize" or 0 < beta:
        s[1, others[1]] = -torch.inf  # the student's bucket is empty
    if 0 < beta:
        s[2, topk.ids[2, 1]] = -torch.inf
    value, gradient = value_and_gradient(s, topk, beta=beta, tail_mode=tail)
    far = s.double().clamp(min=-2000)
    expected = oracle(far, torch.ones(3), topk, 12, beta=beta, temperature=1.0, tail_mode=tail)
    assert relative_error(value, expected[0]) < 1e-5
    assert relative_error(gradient, expected[1]) < 1e-5
    assert (gradient[s == -torch.inf] == 0).all()


@pytest.mark.parametrize("beta", BETAS[1:-1])
def test_a_student_that_excludes_all_of_the_top_k_gets_a_finite_loss_and_no_nan(beta):
    topk = vocab_parallel_topk(random_logits(2, 6, seed=1), 3)
    s = random_logits(2, 6, seed=0).scatter(1, topk.ids, -torch.inf)
    for tail in TAILS:
        value, gradient = value_and_gradient(s, topk, beta=beta, tail_mode=tail)
        assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
def test_statistics(tail):
    s, t = (random_logits(6, 9, seed=seed, dtype=torch.float64) for seed in (0, 1))
    s[0, 4], t[0, 4] = 30.0, 30.0  # they agree
    s[1, 4], t[1, 4], t[1, 5] = 30.0, 20.0, 30.0  # they don't, even within the top-k
    topk = vocab_parallel_topk(t, 3, temperature=0.9)
    least = t[2].argmin()
    s[2, topk.ids[2, 0]], s[2, least] = 10.0, 30.0  # they agree within the top-k only
    mask = torch.arange(6) < 5
    sums = compute_topk_forward(s, topk, shard_spec(9, beta=0.3, temperature=0.9, tail_mode=tail), mask=mask)
    assert all(x[5] == 0 for x in sums[2:])
    s, t, topk, sums = s[:5], t[:5], topk[:5], type(sums)(sums.normalizers, None, *(x[:5] for x in sums[2:]))
    torch.testing.assert_close(sums.forward_kl, topk_divergence_of(s, topk, beta=0.0, temperature=0.9, tail_mode=tail))
    torch.testing.assert_close(sums.reverse_kl, topk_divergence_of(s, topk, beta=1.0, temperature=0.9, tail_mode=tail))
    for logits, entropy in ((s, sums.student_entropy), (t, sums.teacher_entropy)):
        chosen = (logits / 0.9).gather(1, topk.ids)
        rest = (logits / 0.9).scatter(1, topk.ids, -torch.inf).logsumexp(-1, keepdim=True)
        outcomes = chosen if tail == "renormalize" else torch.cat([chosen, rest], -1)
        torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=outcomes).entropy())
    assert sums.top1_agreement[:3].tolist() == [1.0, 0.0, 1.0 if tail == "renormalize" else 0.0]


def test_agreement_with_ties_and_without_a_top_k():
    s = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    topk = TopK(torch.tensor([[0, 1], [-1, -1]]), torch.tensor([[2.0, 2.0], [2.0, 2.0]]))
    sums = compute_topk_forward(s, topk, shard_spec(3, beta=0.5))
    assert sums.top1_agreement.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_in_place_equals_out_of_place_and_blocks_of_rows_change_nothing(beta, tail, monkeypatch):
    s, t = (random_logits(37, 21, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    topk = vocab_parallel_topk(t, 4)
    weights = random_logits(37, seed=2)
    weights[5] = 0

    def gradient(in_place):
        student = s.clone()
        out = student if in_place else torch.full_like(student, torch.nan)
        spec = shard_spec(21, beta=beta, tail_mode=tail)
        found = compute_topk_forward(student, topk, spec)
        write_topk_gradient(out, student, topk, found.gradient_rows(weights), spec)
        return *found[2:], out

    whole = gradient(in_place=False)
    assert (whole[-1][5] == 0).all()
    monkeypatch.setattr(topk_module, "CPU_BLOCK_ELEMENTS", 5 * 21)
    for in_place in (False, True):
        for actual, expected in zip(gradient(in_place), whole, strict=True):
            assert torch.equal(actual, expected)


# ---- identities


@st.composite
def problems(draw):
    """(student, teacher, k, beta, temperature) in fp64."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(2, 24))
    device = torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(draw(st.integers(0, 2**32)))
    student, teacher = (
        torch.randint(-reach, reach + 1, (rows, columns), generator=generator, device="cpu").double().to(device) / 64
        for reach in draw(st.tuples(*[st.sampled_from([1, 64, 640])] * 2))
    )
    beta = draw(st.one_of(st.sampled_from(BETAS), st.floats(0.01, 0.99)))
    return student, teacher, draw(st.integers(1, columns)), beta, draw(st.sampled_from([0.5, 0.9, 1.0, 2.0]))


quick = settings(max_examples=60, deadline=None)


@quick
@given(problems())
def test_the_bucket_is_a_lower_bound_that_grows_with_k(problem):
    student, teacher, k, beta, temperature = problem
    options = {"beta": beta, "temperature": temperature}
    full, _ = full_oracle(student, teacher, torch.ones(len(student)), **options)
    coarse, fine = (
        topk_divergence_of(
            student, vocab_parallel_topk(teacher, n, temperature=temperature), tail_mode="bucket", **options
        )
        for n in (max(k - 1, 1), k)
    )
    assert (coarse >= 0).all()
    assert (coarse <= fine * (1 + 1e-9) + 1e-12).all()
    assert (fine <= full * (1 + 1e-9) + 1e-12).all()


@quick
@given(problems(), st.sampled_from(TAILS))
def test_never_negative_zero_for_equal_distributions_and_gradients_that_sum_to_zero(problem, tail):
    student, teacher, k, beta, temperature = problem
    topk = vocab_parallel_topk(teacher.float(), k, temperature=temperature)
    options = {"beta": beta, "temperature": temperature, "tail_mode": tail}
    value, gradient = value_and_gradient(student.float(), topk, **options)
    assert (value >= 0).all()
    assert (gradient.sum(-1).abs() <= 1e-5 * ((student - teacher).abs().amax(-1) + 1) / temperature**2).all()
    value, gradient = value_and_gradient(teacher.float(), topk, **options)
    assert (value <= 1e-6).all() and (gradient.abs() <= 1e-5).all(), "but for the rounding of probabilities"


@quick
@given(problems(), st.sampled_from(TAILS), st.randoms(use_true_random=False))
def test_permuting_the_vocabulary_permutes_the_gradient(problem, tail, random):
    student, teacher, k, beta, temperature = problem
    order = torch.tensor(random.sample(range(student.shape[1]), student.shape[1]))
    topk = vocab_parallel_topk(teacher, k, temperature=temperature)
    moved = replace(topk, ids=order.argsort()[topk.ids])
    options = {"beta": beta, "temperature": temperature, "tail_mode": tail}
    value, gradient = value_and_gradient(student, topk, **options)
    permuted_value, permuted_gradient = value_and_gradient(student[:, order], moved, **options)
    torch.testing.assert_close(permuted_value, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], rtol=1e-9, atol=1e-12)


# ---- costs


def collectives_of_one_call(rank, world_size, tail):
    calls = []

    def counting(name, original):
        def call(*args, **kwargs):
            calls.append((name, args[1].numel() * args[1].element_size()))
            return original(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast", "reduce_scatter_tensor")
    originals = {name: getattr(dist, name) for name in names}
    student = random_logits(TOKENS, 50, seed=0, dtype=torch.bfloat16).requires_grad_()
    topk = vocab_parallel_topk(random_logits(TOKENS, 50, seed=rank), 6, group=dist.group.WORLD)
    try:
        for name, original in originals.items():
            setattr(dist, name, counting(name, original))
        topk_divergence_of(student, topk, beta=0.5, group=dist.group.WORLD, tail_mode=tail).sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls


@pytest.mark.parametrize(("tail", "log_sums"), [("renormalize", 2), ("bucket", 4)])
def test_two_collectives_of_a_few_numbers_a_token(gloo_world, tail, log_sums):
    for calls in gloo_world(2).run(collectives_of_one_call, tail):
        assert calls == [("all_gather_into_tensor", 4 * n * TOKENS) for n in (log_sums, 7)]


@pytest.mark.parametrize("tail", TAILS)
def test_backward_keeps_a_few_numbers_a_token_beside_the_inputs(tail):
    tokens = 50
    student = random_logits(tokens, 200, seed=0).requires_grad_()
    topk = vocab_parallel_topk(random_logits(tokens, 200, seed=1), 6)
    mask = torch.ones(tokens, dtype=torch.bool)
    inputs = {x.data_ptr() for x in (student, topk.ids, topk.values, topk.tail, mask)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        value = topk_divergence_of(student, topk, beta=0.5, mask=mask, tail_mode=tail)
    value.sum().backward()
    extra = [x for x in kept if x.data_ptr() not in inputs]
    assert [x.shape for x in extra] == [(tokens, 8), (tokens,)]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 1.5}, "beta = 1.5: must be from 0 to 1"),
        ({"temperature": 0.0}, "temperature = 0.0: must be from 0.01 to 1000"),
        ({"temperature": 1e-40}, "temperature = 1e-40: must be from 0.01 to 1000"),
        ({"temperature": 1e38}, "temperature = 1e.38: must be from 0.01 to 1000"),
        ({"temperature": torch.inf}, "temperature = inf: must be from 0.01 to 1000"),
        ({"temperature": torch.nan}, "temperature = nan: must be from 0.01 to 1000"),
        ({"tail_mode": "drop"}, "tail_mode = 'drop': must be one of renormalize, bucket"),
        ({"divergence": "distance"}, "divergence = 'distance': must be one of jsd, "),
        ({"vocab_size": 9}, "vocab_size = 9: must be from 1 to 8"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask = torch.bool \[3\]: must be torch.bool \[2\]"),
        ({"student_logits": torch.zeros(3, 8)}, r"topk = tokens \[2\]: must be \[3\], as student_logits"),
        ({"student_logits": torch.zeros(2, 8).long()}, r"student_logits = torch.int64 \[2, 8\]: must be floats"),
        (
            {"tail_mode": "bucket", "temperature": 2.0},
            r"tail_mode = 'bucket': the temperature is 2.0, .* is of temperature 1.0; .* at temperature 1 only",
        ),
        (
            {"tail_mode": "bucket", "topk": vocab_parallel_topk(torch.zeros(2, 8), 3, temperature=None)},
            "tail_mode = 'bucket': this TopK has no tail",
        ),
    ],
)
def test_wrong_arguments_are_errors(changes, message):
    topk = TopK.from_log_probs(torch.tensor([[1, 2], [3, 4]]), torch.full((2, 2), -1.0))
    arguments = {"student_logits": torch.zeros(2, 8), "topk": topk, "beta": 0.5, **changes}
    with pytest.raises(ValueError, match=message):
        topk_divergence_of(arguments.pop("student_logits"), arguments.pop("topk"), **arguments)
