"""The ranks' numbers of each token combined: by the kernels as in plain torch, in few launches."""

import pytest
import torch
from ops.launches import count_launches
from ops.oracle import random_logits, relative_error

from megatron_gkd.ops import passes, reference, torch_combine
from megatron_gkd.ops.combine import combine_statistics, combine_sums, student_token_statistics, token_statistics
from megatron_gkd.ops.divergence import vocab_parallel_divergence
from megatron_gkd.ops.params import ChunkTargets, Logits, TokenResults
from megatron_gkd.ops.spec import DivergenceSpec, ShardSpec, TopKSpec
from megatron_gkd.ops.vocabulary import VocabShard

needs_kernels = pytest.mark.skipif(passes.implementation() == "torch", reason="plain torch is what is tested")
TOKENS, WIDTH, VOCAB_SIZE, RANKS = 9, 16, 37, 4  # the last of the shards holds only padding
TEMPERATURE = 0.9


def specs(beta):
    """The specification of each rank, without a group."""
    divergence = DivergenceSpec(beta, TEMPERATURE).on_shard(WIDTH).divergence
    return [
        ShardSpec(divergence, beta, TEMPERATURE, VocabShard(None, WIDTH, first, valid, VOCAB_SIZE))
        for first, valid in zip(range(0, RANKS * WIDTH, WIDTH), (16, 16, 5, 0), strict=True)
    ]


def inputs(dtype):
    student, teacher = (random_logits(TOKENS, VOCAB_SIZE, seed=seed, dtype=dtype) for seed in (0, 1))
    student[0], teacher[0] = 0, 0  # all tie
    student[1, 16:32] = -torch.inf  # a shard without a finite logit
    teacher[1, 20:] = -torch.inf
    labels = torch.tensor([0, 36, -100, 15, 16, 31, 32, 5, VOCAB_SIZE])  # the last one is no token
    weights = random_logits(TOKENS, seed=2).abs()
    weights[4] = 0
    return student, teacher, labels, weights, random_logits(TOKENS, seed=3).abs()


def results_of(beta, dtype, module, *, labels=True, teacher=True, moments=True, mask=None, rank=1):
    """What `module` writes and returns on one rank, as a dictionary."""
    student, teacher_logits, ids, weights, label_weights = inputs(dtype)
    targets = ChunkTargets(weights, ids if labels else None, label_weights if labels else None, factor=3.0)
    local = []
    for spec in specs(beta):
        columns = slice(spec.shard.first, spec.shard.first + spec.shard.valid)
        own = Logits(student[:, columns], teacher_logits[:, columns], mask)
        if teacher:
            local.append(module.token_statistics(own, targets.labels, spec, moments=moments))
        else:
            local.append(module.student_token_statistics(own.student, targets.labels, spec))
    results = TokenResults(torch.full((TOKENS, 7), torch.nan), torch.full((TOKENS,), torch.nan))
    found = module.combine_statistics(
        torch.stack(local), specs(beta)[rank], targets, results, has_teacher=teacher, moments=moments, mask=mask
    )
    return found, results, targets


class Kernels:
    """The functions of ``combine``, which choose the kernels, with the results of those in plain torch."""

    token_statistics = staticmethod(token_statistics)
    student_token_statistics = staticmethod(student_token_statistics)

    @staticmethod
    def combine_statistics(*args, **kwargs):
        normalizers, slope_sum, weight, labels = combine_statistics(*args, **kwargs)
        return normalizers, slope_sum, weight, *(labels or (None, None, None))


CASES = [
    {},
    {"labels": False},
    {"mask": torch.arange(TOKENS) % 3 > 0},
    {"teacher": False},
    {"teacher": False, "labels": False, "rank": 3},
]


@needs_kernels
@pytest.mark.parametrize("case", [*CASES, {"moments": False, "labels": False}])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_equal_plain_torch(beta, dtype, case):
    if not case.get("moments", True) and beta != 0.5:
        case = {"labels": False}  # the KL divergences are moments
    (actual, *written), (expected, *written_in_torch) = (
        results_of(beta, dtype, module, **case) for module in (Kernels, torch_combine)
    )
    assert [x is None for x in actual] == [x is None for x in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5, equal_nan=True)
    for mine, theirs in zip(written[0], written_in_torch[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize("module", [Kernels, torch_combine], ids=["kernels", "torch"])
def test_metrics_and_losses_against_fp64(module):
    student, teacher, labels, weights, label_weights = inputs(torch.float32)
    _, results, _ = results_of(0.0, torch.float32, module)
    token = results.per_token
    finite = slice(2, 8)
    exact = [x[finite].double() for x in (student, teacher)]
    divergence = reference.divergence(*exact, beta=0.0, temperature=TEMPERATURE)
    assert relative_error(token.divergence[finite], divergence) < 1e-5
    assert relative_error(token.student_entropy[finite], reference.entropy(exact[0], temperature=TEMPERATURE)) < 1e-5
    assert relative_error(token.teacher_entropy[finite], reference.entropy(exact[1], temperature=TEMPERATURE)) < 1e-5
    cross_entropy = reference.cross_entropy(exact[0], labels[finite])
    assert relative_error(token.cross_entropy[finite], cross_entropy) < 1e-5
    assert token.cross_entropy[-1].isinf() and token.top1_agreement[0] == 1
    losses = weights[finite] * divergence + torch.where(
        labels[finite] == -100, 0, label_weights[finite] * cross_entropy
    )
    assert relative_error(results.losses[finite], losses) < 1e-5


@needs_kernels
def test_sums_are_added_in_the_order_of_the_ranks_and_no_divergence_is_negative():
    gathered = random_logits(RANKS, TOKENS, 2, seed=4)
    gathered[0, 4] = torch.inf  # the token has weight 0
    found = []
    for function in (combine_sums, torch_combine.combine_sums):
        _, results, targets = results_of(0.5, torch.float32, Kernels)
        found.append((function(gathered, targets, results), *results))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    exact = gathered.double().sum(0).float()
    assert torch.equal(found[0][0], exact[:, 1]) and torch.equal(found[0][1][:, 0], exact[:, 0].clamp(min=0))
    assert found[0][2].isfinite()[:-1].all()  # the last label is no token


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_no_tokens(beta, dtype):
    student = torch.zeros(0, 7, dtype=dtype).requires_grad_()
    value = vocab_parallel_divergence(student, torch.zeros(0, 7, dtype=dtype), DivergenceSpec(beta))
    value.sum().backward()
    assert value.shape == (0,) and student.grad.shape == (0, 7)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta", "teacher", "most"), [(0.5, True, 10), (0.0, True, 8), (0.5, False, 7)])
def test_a_chunk_is_a_few_launches(beta, teacher, most, dtype):
    one, four, of_chunk = count_launches(dtype, beta, TopKSpec(), teacher=teacher)
    assert of_chunk <= most, four
    assert len(one) - most <= 4, one  # those outside the chunks
