"""The divergence over tensor-parallel ranks: the gradient of the WHOLE vocabulary, gathered over the ranks, against the
unsharded fp64 oracle. A loss alone would not show the terms that a wrong reduction drops."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ops.oracle import (
    BETAS,
    MIDDLES,
    POINTS,
    TEMPERATURES,
    divergence_of,
    oracle,
    pad_columns,
    random_logits,
    relative_error,
    rounding,
    shard,
    statistics_of,
    tolerance,
)

from megatron_gkd.ops import passes
from megatron_gkd.ops.normalizers import Combined
from megatron_gkd.ops.params import DivergenceRows, Logits
from megatron_gkd.ops.reference import divergence_at
from megatron_gkd.ops.spec import ShardSpec
from megatron_gkd.ops.vocabulary import VocabShard

TOKENS = 7
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    beta: float
    divergence: str = "jsd"
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    width: int = 101 * 4  # over all ranks, padding included
    vocab_size: int | None = None
    tokens: int = TOKENS
    masked: bool = False
    scale: float = 3.0

    @property
    def options(self):
        mask = torch.arange(self.tokens) % 3 != 1 if self.masked else None
        return {
            "beta": self.beta,
            "divergence": self.divergence,
            "temperature": self.temperature,
            "vocab_size": self.vocab_size,
            "mask": mask,
        }

    def inputs(self):
        """(student, teacher, upstream) of the whole vocabulary; columns past vocab_size hold ordinary numbers."""
        size = self.vocab_size or self.width
        s, t = (
            pad_columns(
                random_logits(self.tokens, size, seed=seed, scale=self.scale, dtype=self.dtype), self.width - size
            )
            for seed in (0, 1)
        )
        return s, t, random_logits(self.tokens, seed=2, scale=1.0)


def naive_divergence(student, teacher, *, beta, divergence, temperature, group, vocab_size, mask):
    """What autograd makes of a log-softmax with a plain all_reduce: the loss, but a gradient without other shards."""

    def log_softmax(logits):
        z = logits.float() / temperature
        maximum = z.detach().amax(-1, keepdim=True)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        total = (z - maximum).exp().sum(-1, keepdim=True)
        dist.all_reduce(total.data, group=group)
        return z - maximum - total.log()

    a, b = log_softmax(student), log_softmax(teacher)
    m = (beta * b.exp() + (1 - beta) * a.exp()).log()
    value = (beta * b.exp() * (b - m) + (1 - beta) * a.exp() * (a - m)).sum(-1)
    dist.all_reduce(value.data, group=group)
    return value


def run_cases(rank, world_size, operation, cases):
    """For each case this rank's loss and the gradient of its shard."""
    results = []
    for case in cases:
        s, t, upstream = case.inputs()
        mine = shard(s, rank, world_size).requires_grad_()
        value = operation(mine, shard(t, rank, world_size), group=dist.group.WORLD, **case.options)
        value.backward(upstream)
        results.append((value, mine.grad))
    return results


def errors(world, cases, operation=divergence_of):
    """Each case with the errors of (loss, gradient) over the whole vocabulary, and the fp32 reference's own.

    Asserts what holds exactly: the same loss on all ranks, zeros where masked and in the padding.
    """
    found = []
    for case, *by_rank in zip(cases, *world.run(run_cases, operation, cases), strict=True):
        losses, gradients = zip(*by_rank, strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses), case
        gradient = torch.cat(gradients, -1)
        expected_loss, expected_gradient = oracle(*case.inputs(), **case.options)
        if case.masked:
            mask = case.options["mask"]
            assert (losses[0][~mask] == 0).all() and (gradient[~mask] == 0).all(), case
        if case.vocab_size:
            assert (gradient[:, case.vocab_size :] == 0).all(), case
        own = oracle(*case.inputs(), dtype=torch.float32, **case.options)
        scale = 0.05 * case.inputs()[2].norm().item() / case.temperature
        found.append(
            (
                case,
                [relative_error(losses[0], expected_loss), relative_error(gradient, expected_gradient, scale)],
                [relative_error(own[0], expected_loss), relative_error(own[1], expected_gradient, scale)],
            )
        )
    return found


def assert_exact(found):
    for case, (loss_error, gradient_error), (own_loss_error, own_gradient_error) in found:
        assert loss_error < tolerance(case.dtype, own_loss_error), (case, loss_error)
        allowed = tolerance(case.dtype, own_gradient_error) + rounding(case.dtype)
        assert gradient_error < allowed, (case, gradient_error, own_gradient_error)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_loss_and_whole_gradient_equal_the_oracle(gloo_world, tp):
    cases = [
        Case(beta, divergence, temperature, dtype)
        for (divergence, beta), temperature, dtype in itertools.product(POINTS, TEMPERATURES, DTYPES)
    ]
    assert_exact(errors(gloo_world(tp), cases))


@pytest.mark.parametrize("tp", [2, 4])
def test_masks_padding_odd_widths_and_large_logits(gloo_world, tp):
    cases = [
        case
        for divergence, beta in [*(("jsd", beta) for beta in BETAS), *MIDDLES]
        for case in (
            Case(beta, divergence, masked=True),
            Case(beta, divergence, width=13 * tp, vocab_size=13 * tp - 5),  # padding on the last shard
            Case(beta, divergence, width=9 * tp, vocab_size=9 * tp - 9, masked=True),  # all of the last shard
            Case(beta, divergence, width=3 * tp, vocab_size=1),  # all shards but one column
            Case(beta, divergence, width=tp),
            Case(beta, divergence, scale=1e4),
        )
    ]
    assert_exact(errors(gloo_world(tp), cases))


def test_the_check_fails_for_autograd_through_all_reduce(gloo_world):
    found = errors(gloo_world(2), [Case(0.5), Case(0.9)], operation=naive_divergence)
    for _, (loss_error, gradient_error), _ in found:
        assert loss_error < 1e-5  # so that a test of the loss alone would have passed
        assert gradient_error > 0.1
    with pytest.raises(AssertionError):
        assert_exact(found)


def test_zero_tokens(gloo_world):
    for loss, gradient in gloo_world(2).run(run_cases, divergence_of, [Case(0.5, tokens=0)])[0]:
        assert loss.shape == (0,) and gradient.shape == (0, 202)


def collectives_of_one_call(rank, world_size, options):
    """Names of the collectives in forward and backward, and the bytes a token that each rank gives to them."""
    calls, sent = [], []

    def counting(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            sent.append(args[1].numel() * args[1].element_size() / TOKENS)
            return original(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast", "reduce_scatter_tensor")
    originals = {name: getattr(dist, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(dist, name, counting(name, original))
        s, t = (random_logits(TOKENS, 50, seed=seed).requires_grad_() for seed in (0, 1))
        divergence_of(s, t, group=dist.group.WORLD, **options).sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls, sent


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta": 0.0}, [40]),
        ({"beta": 1.0}, [40]),
        ({"beta": 0.5}, [16, 8]),
        *(({"beta": beta, "divergence": name}, [16, 8]) for name, beta in MIDDLES),
    ],
)
def test_one_or_two_collectives_of_a_few_bytes_a_token(gloo_world, options, expected):
    for calls, sent in gloo_world(2).run(collectives_of_one_call, options):
        assert calls == ["all_gather_into_tensor"] * len(expected)
        assert sent == expected


def statistics_of_ranks(rank, world_size):
    s, t = (random_logits(TOKENS, 48, seed=seed) for seed in (0, 1))
    s[0], t[0] = 0, 0  # all tie
    s[1, [13, 30]] = t[1, 30] = 50  # the student's two maxima are on different ranks
    options = {"beta": 0.5, "temperature": 0.7}
    whole = statistics_of(s, t, **options)
    parts = (shard(x, rank, world_size) for x in (s, t))
    return whole, statistics_of(*parts, group=dist.group.WORLD, **options)


@pytest.mark.parametrize("tp", [2, 4])
def test_statistics_do_not_depend_on_the_sharding(gloo_world, tp):
    results = gloo_world(tp).run(statistics_of_ranks)
    for whole, sharded in results:
        assert all(torch.equal(x, y) for x, y in zip(sharded, results[0][1], strict=True))
        for expected, actual in zip(whole, sharded, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert sharded.top1_agreement[:2].tolist() == [1.0, 0.0]


def sharded_in_one_process(student, teacher, upstream, spec_of, shards):
    """(loss, gradient) by the passes, one rank after another: for devices of which there is only one."""
    specs = [spec_of(rank) for rank in range(shards)]
    parts = [
        Logits(*(shard(x, rank, shards)[:, : spec.shard.valid] for x in (student, teacher)))
        for rank, spec in enumerate(specs)
    ]
    moments = not specs[0].needs_sums
    statistics = [passes.statistics(part, spec, moments=moments) for spec, part in zip(specs, parts, strict=True)]
    combined = Combined(torch.stack(statistics), specs[0])
    normalizers = combined.normalizers().packed()
    if moments:
        found = combined.token_statistics()
        kl = found.reverse_kl if specs[0].beta else found.forward_kl
        value, slope_sum = kl, kl if specs[0].beta else torch.zeros_like(kl)
    else:
        sums = [passes.sums(part, normalizers, spec) for spec, part in zip(specs, parts, strict=True)]
        value, slope_sum = (x.contiguous() for x in torch.stack(sums).sum(0).unbind(-1))
    width = student.shape[1] // shards
    gradients = []
    for spec, part in zip(specs, parts, strict=True):
        gradients.append(torch.full((len(student), width), torch.nan, dtype=student.dtype))
        passes.gradient(gradients[-1], part, DivergenceRows(normalizers, slope_sum, upstream), None, spec)
    return value, torch.cat(gradients, -1)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize(("divergence", "beta"), [*(("jsd", beta) for beta in BETAS), *MIDDLES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "vocab_size"), [(404, 404), (404, 399), (36, 20), (4, 1)])
def test_shards_taken_one_after_another(shards, divergence, beta, dtype, width, vocab_size):
    case = Case(beta, divergence, dtype=dtype, width=width, vocab_size=vocab_size)
    student, teacher, upstream = case.inputs()

    def spec_of(rank):
        each = width // shards
        valid = min(max(vocab_size - rank * each, 0), each)
        vocab_shard = VocabShard(None, each, rank * each, valid, vocab_size)
        return ShardSpec(divergence_at(beta, divergence), beta, 1.0, vocab_shard)

    found = sharded_in_one_process(student, teacher, upstream.float(), spec_of, shards)
    exact = oracle(student, teacher, upstream, **case.options)
    own = oracle(student, teacher, upstream, dtype=torch.float32, **case.options)
    scale = 0.05 * upstream.norm().item()
    # With one id, the forms for 16 bits add the rounding of a probability of 1: 1e-7.
    scale_of_loss = 1e-6 if dtype == torch.float32 else 0.05
    assert (found[1][:, vocab_size:] == 0).all()
    own_error = relative_error(own[0], exact[0], scale_of_loss)
    assert relative_error(found[0], exact[0], scale_of_loss) < tolerance(dtype, own_error)
    own_error = relative_error(own[1], exact[1], scale)
    assert relative_error(found[1], exact[1], scale) < tolerance(dtype, own_error) + rounding(dtype)
