"""The next token: filters as in transformers, the right distribution, decided by seed and position alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rollout.gathered_sampling import filter_scores, sample_gathered
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.megatron import candidates
from megatron_gkd.rollout.megatron import sampling as module
from megatron_gkd.rollout.megatron.blocks import BLOCK_SIZE, BlockSums
from megatron_gkd.rollout.megatron.filters import apply_min_p, apply_top_k, apply_top_p, penalize_repetition
from megatron_gkd.rollout.megatron.noise import fold_to_int64, gumbel_noise
from megatron_gkd.rollout.megatron.sampling import sample


def random_logits(rows: int = 6, vocab_size: int = 99, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def sample_whole(logits, seeds, positions, sampling):
    return sample(logits, seeds, positions, sampling, VocabShard.from_group(logits.shape[1]))


def apply_filters(scores, top_k, top_p):
    shard = VocabShard.from_group(scores.shape[1])
    scores = apply_top_k(scores, top_k, shard) if top_k else scores
    return apply_top_p(scores, top_p, shard) if top_p < 1 else scores


@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.8, 0.3, 1e-6])
@pytest.mark.parametrize("top_k", [None, 0, 1, 7, 99, 500])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_filters_equal_those_of_transformers(temperature, top_k, top_p):
    logits = random_logits()
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(apply_filters(logits / temperature, top_k, top_p), expected)
    assert torch.equal(filter_scores(logits / temperature, top_k, top_p), expected), "the oracle"


def test_top_k_keeps_ties_with_the_kth_token():
    scores = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    assert apply_filters(scores, 2, 1.0).isfinite().tolist() == [[True, True, True, False, True]]


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 4), (0.5 + 1e-9, 5), (0.51, 5), (0.99, 8), (1e-9, 1), (1e-300, 1)])
def test_top_p_keeps_the_lower_ids_of_equal_scores(top_p, kept):
    scores = torch.zeros(2, 9, dtype=torch.float64)
    scores[:, 0], scores[1, 3] = -math.inf, -0.0  # -0 is equal to 0
    expected = [False] + [True] * kept + [False] * (8 - kept)
    assert apply_filters(scores, None, top_p).isfinite().tolist() == [expected, expected]


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_min_p_equals_that_of_transformers(min_p, top_p):
    """And top-p counts the tokens that it has left, as in vLLM."""
    logits = random_logits()
    expected = MinPLogitsWarper(min_p)(None, logits)
    assert 0 < expected.isfinite().sum() < logits.numel()
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    scores = apply_min_p(logits, min_p, VocabShard.from_group(logits.shape[1]))
    assert torch.equal(apply_filters(scores, None, top_p), expected)
    assert torch.equal(filter_scores(logits, None, top_p, min_p), expected), "the oracle"


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_the_repetition_penalty_equals_that_of_transformers(penalty):
    logits = random_logits()
    logits[:, 3] = 0.0
    ids = torch.randint(0, 99, (len(logits), 20), generator=torch.Generator().manual_seed(1))
    ids[:, :4] = torch.tensor([3, 5, 5, 5])
    is_seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert not torch.equal(expected, logits)
    assert torch.equal(penalize_repetition(logits, is_seen, penalty), expected)


ROWS, VOCAB_SIZE = 40, 99
SETTINGS = [
    Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in itertools.product((0.3, 1.0, 2.5), (None, 1, 7, 60, 98, 500), (1.0, 0.999, 0.6))
] + [Sampling(1, temperature=0), Sampling(1, temperature=0.7, top_p=1e-6)]
RESERVED = (*range(1, 56), 70, 98)
"""Among them all ids of the second of four shards."""
SETTINGS += [
    Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p, reserved_ids=RESERVED)
    for temperature, top_k, top_p in ((0, None, 1.0), (1.0, None, 1.0), (1.0, 7, 1.0), (1.0, 60, 0.6), (0.3, None, 0.9))
]
SETTINGS += [
    Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p, reserved_ids=ids, min_p=min_p)
    for temperature, top_k, top_p, ids, min_p in (
        (0, None, 1.0, (), 0.5),
        (1.0, None, 1.0, (), 0.05),
        (0.7, 7, 0.9, (), 1e-3),
        (1.0, None, 0.8, RESERVED, 0.3),
    )
]
SETTINGS += [replace(sampling, repetition_penalty=penalty) for penalty in (0.6, 1.7) for sampling in SETTINGS[-6:]]
VOCAB_SIZES = (99, 97, 40, 3, 1)
"""Ids that may be drawn: all, and so few that whole shards are excluded."""


def logits_with_ties() -> torch.Tensor:
    """Random rows, rows of few different values, rows of one value, and rows with tokens of probability zero."""
    logits = random_logits(ROWS, VOCAB_SIZE)
    logits[10:30] = logits[10:30].round()
    logits[30:35] = 0.0
    logits[35:, 1::3] = -math.inf
    return logits


IS_SEEN = torch.rand(ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(4)) < 0.3


def seen_with(sampling, is_seen):
    """`is_seen` where it is needed."""
    return None if sampling.repetition_penalty == 1 else is_seen


def draw_with_shards(rank, world_size):
    """Draw with every setting and number of ids, from this rank's columns of a padded vocabulary."""
    width = -(-VOCAB_SIZE // world_size)
    logits = torch.nn.functional.pad(logits_with_ties(), (0, width * world_size - VOCAB_SIZE), value=50.0)
    is_seen = torch.nn.functional.pad(IS_SEEN, (0, width * world_size - VOCAB_SIZE), value=True)
    columns, seen = (whole[:, rank * width : (rank + 1) * width] for whole in (logits, is_seen))
    seeds, positions = torch.arange(ROWS), torch.arange(ROWS) % 7
    shards = {size: VocabShard.from_group(width, dist.group.WORLD, size) for size in VOCAB_SIZES}
    return [
        sample(columns, seeds, positions, sampling, shards[vocab_size], seen_with(sampling, seen))
        for vocab_size in VOCAB_SIZES
        for sampling in SETTINGS
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sharded_draws_equal_those_from_the_gathered_vocabulary(world_size, gloo_world):
    logits = logits_with_ties()
    found = gloo_world(world_size).run(draw_with_shards)
    cases = list(itertools.product(VOCAB_SIZES, SETTINGS))
    for (vocab_size, sampling), *by_rank in zip(cases, *found, strict=True):
        is_seen = seen_with(sampling, IS_SEEN[:, :vocab_size])
        expected_tokens, expected_log_probs = sample_gathered(
            logits[:, :vocab_size], torch.arange(ROWS), torch.arange(ROWS) % 7, sampling, is_seen
        )
        for tokens, log_probs in by_rank:
            assert torch.equal(tokens, expected_tokens), (vocab_size, sampling)
            torch.testing.assert_close(log_probs, expected_log_probs, rtol=1e-12, atol=1e-12)
            assert torch.equal(log_probs, by_rank[0][1]), "the same bits on every rank"


WIDE = 1500
"""Ids of several blocks; shards of half of them begin within one."""
UNPENALIZED = [sampling for sampling in SETTINGS if sampling.repetition_penalty == 1]


def wide_logits() -> torch.Tensor:
    logits = random_logits(ROWS, WIDE)
    logits[20:] = logits[20:].round()
    return logits


def draw_from_wide_rows(rank, world_size, counts):
    """Draw from this rank's columns with so many candidates; and how many rows needed the whole vocabulary."""
    width, filter_whole = WIDE // world_size, module._filter_whole
    columns, shard = wide_logits()[:, rank * width :][:, :width], VocabShard.from_group(width, dist.group.WORLD)
    whole = []

    def count_rows(scores, *arguments):
        whole.append(len(scores))
        return filter_whole(scores, *arguments)

    with mock.patch.object(module, "_filter_whole", count_rows), mock.patch.object(candidates, "COUNTS", counts):
        found = [sample(columns, torch.arange(ROWS), zeros(ROWS), one, shard)[0] for one in UNPENALIZED]
    return found, sum(whole)


@pytest.mark.parametrize("world_size", [1, 2])
def test_few_candidates_draw_what_the_whole_vocabulary_draws(world_size, gloo_world):
    expected = [sample_gathered(wide_logits(), torch.arange(ROWS), zeros(ROWS), one)[0] for one in UNPENALIZED]
    for counts in ((WIDE,), (8, 64)):
        for found, whole in gloo_world(world_size).run(draw_from_wide_rows, counts):
            assert all(torch.equal(tokens, other) for tokens, other in zip(found, expected, strict=True)), counts
            assert (whole == 0) if counts == (WIDE,) else 0 < whole < ROWS * len(UNPENALIZED) / 2


def test_a_rank_of_padding_does_not_hide_low_scores_of_the_others():
    """The scores of a low temperature are far below 0."""
    width = 2 * BLOCK_SIZE
    first, second = VocabShard(None, width, 0, width, width), VocabShard(None, width, width, 0, width)
    scores = random_logits(3, width) - 2000
    own, padding = BlockSums.from_scores(scores, first), BlockSums.from_scores(torch.full((3, 1), -math.inf), second)
    both = [torch.cat([one.largest_n[:, None], one.sums_nb], -1) for one in (own, padding)]
    weights = own.gather(mock.Mock(width=width, gather=lambda _: torch.stack(both)))
    masses = scores.softmax(-1).view(3, 2, BLOCK_SIZE).sum(-1)
    torch.testing.assert_close(weights[:, :2] / weights.sum(-1, keepdim=True), masses)


def test_logits_that_are_not_numbers_raise_no_error():
    """The loss reports them; the draw must not end the run on one rank."""
    tokens, _ = sample_whole(torch.full((2, 9), math.nan), zeros(2), zeros(2), Sampling(1, top_k=3, top_p=0.9))
    assert ((tokens >= 0) & (tokens < 9)).all()


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def measure_largest_tensor(rank, world_size, rows, width, sampling):
    columns = random_logits(rows, width, seed=rank)
    with LargestTensor() as largest:
        sample(columns, torch.arange(rows), zeros(rows), sampling, VocabShard.from_group(width, dist.group.WORLD))
    return largest.elements


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}]
)
def test_no_rank_holds_a_row_of_the_whole_vocabulary(settings, gloo_world):
    rows, width = 8, 2048
    elements = gloo_world(2).run(measure_largest_tensor, rows, width, Sampling(1, **settings))
    assert all(rows * width <= number <= rows * (width + 2 * BLOCK_SIZE) for number in elements)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}])
def test_draws_follow_the_distribution(settings):
    sampling, draws = Sampling(1, **settings), 20000
    logits = random_logits(rows=1, vocab_size=12)
    tokens, _ = sample_whole(logits.expand(draws, -1), torch.arange(draws), zeros(draws), sampling)
    scores = filter_scores(logits[0:1] / sampling.temperature, sampling.top_k, sampling.top_p)
    expected = scores.softmax(-1)[0]
    counts = tokens.bincount(minlength=12)
    assert (counts[expected == 0] == 0).all()
    deviation = (counts / draws - expected).abs()
    assert (deviation <= 4 * (expected * (1 - expected) / draws).sqrt()).all()  # four standard deviations


def test_draws_of_consecutive_positions_are_independent():
    """One seed, many positions: pairs of consecutive draws are distributed like independent ones."""
    draws = 20000
    logits = torch.zeros(draws, 4)
    tokens, _ = sample_whole(logits, zeros(draws) + 5, torch.arange(draws), Sampling(1))
    pairs = (4 * tokens[1:] + tokens[:-1]).bincount(minlength=16) / (draws - 1)
    assert (pairs - 1 / 16).abs().max() < 4 * math.sqrt(1 / 16 / draws)


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(torch.arange(50), zeros(50), torch.arange(2000)).flatten()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.57722, abs=0.02)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_noise_of_some_ids_is_that_of_all():
    seeds, ids = torch.arange(5), torch.randint(0, 30, (5, 9), generator=torch.Generator().manual_seed(3))
    whole = gumbel_noise(seeds, seeds, torch.arange(30))
    torch.testing.assert_close(gumbel_noise(seeds, seeds, ids), whole.gather(1, ids), rtol=1e-14, atol=0)


def test_noise_equals_the_published_generator():
    """The oracle is SplitMix64 in Python's integers."""
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF  # the generator's first number from the state 0
    for seed, position in ((0, 0), (123, 4), (fold_to_int64(2**63 + 9), 1000)):
        key = mix((mix((seed + golden) & mask) + (position + 1) * golden) & mask)
        expected = [mix((key + (token + 1) * golden) & mask) for token in range(5)]
        noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), torch.arange(5))[0]
        for value, bits in zip(noise.tolist(), expected, strict=True):
            assert value == pytest.approx(-math.log(-math.log(((bits >> 12) + 0.5) / 2**52)), rel=1e-12)


def test_a_draw_depends_on_its_seed_and_position_and_on_no_other_row(monkeypatch):
    logits, seeds, positions = random_logits(8), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), torch.arange(8)
    batch = sample_whole(logits, seeds, positions, Sampling(1))[0]
    order = torch.randperm(8)
    assert torch.equal(sample_whole(logits[order], seeds[order], positions[order], Sampling(1))[0], batch[order])
    single = [sample_whole(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1], Sampling(1))[0] for i in range(8)]
    assert torch.equal(torch.cat(single), batch)
    monkeypatch.setattr(module, "_MAX_BLOCK_ELEMENTS", 300)  # blocks of three rows
    assert torch.equal(sample_whole(logits, seeds, positions, Sampling(1))[0], batch)


def test_rounding_of_the_logits_hardly_changes_a_draw():
    draws = 5000
    logits = random_logits(1).expand(draws, -1)
    rounded = logits + 1e-6 * random_logits(draws, seed=1)
    first, second = (sample_whole(x, torch.arange(draws), zeros(draws), Sampling(1))[0] for x in (logits, rounded))
    assert (first != second).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_most_likely_and_log_probs_are_the_models(dtype):
    logits = random_logits().to(dtype)
    log_probs = logits.double().log_softmax(-1)
    for sampling in (Sampling(1, temperature=0), Sampling(1, temperature=0.5, top_k=3, top_p=0.9)):
        tokens, sampled_log_probs = sample_whole(logits, torch.arange(6), zeros(6), sampling)
        torch.testing.assert_close(sampled_log_probs, log_probs.gather(1, tokens[:, None])[:, 0])
        if sampling.temperature == 0:
            assert torch.equal(tokens, logits.argmax(-1))


def test_seeds_are_folded_into_int64():
    assert [fold_to_int64(seed) for seed in (0, -1, 2**63 - 1, 2**63, 2**64 + 5)] == [0, -1, 2**63 - 1, -(2**63), 5]
