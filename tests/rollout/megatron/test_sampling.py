"""The next token: filters as in transformers, the right distribution, decided by seed and position alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from rollout.gathered_sampling import filter_scores, sample_gathered
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.megatron import sampling as module
from megatron_gkd.rollout.megatron.filters import apply_top_k, apply_top_p
from megatron_gkd.rollout.megatron.sampling import fold_to_int64, gumbel_noise, sample


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
VOCAB_SIZES = (99, 97, 40, 3, 1)
"""Ids that may be drawn: all, and so few that whole shards are excluded."""


def logits_with_ties() -> torch.Tensor:
    """Random rows, rows of few different values, rows of one value, and a row with tokens of probability zero."""
    logits = random_logits(ROWS, VOCAB_SIZE)
    logits[10:30] = logits[10:30].round()
    logits[30:35] = 0.0
    logits[35:, 1::3] = -math.inf
    return logits


def draw_with_shards(rank, world_size):
    """Draw with every setting and number of ids, from this rank's columns of a padded vocabulary."""
    width = -(-VOCAB_SIZE // world_size)
    logits = torch.nn.functional.pad(logits_with_ties(), (0, width * world_size - VOCAB_SIZE), value=50.0)
    columns = logits[:, rank * width : (rank + 1) * width]
    seeds, positions = torch.arange(ROWS), torch.arange(ROWS) % 7
    return [
        sample(columns, seeds, positions, sampling, VocabShard.from_group(width, dist.group.WORLD, vocab_size))
        for vocab_size in VOCAB_SIZES
        for sampling in SETTINGS
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sharded_draws_equal_those_from_the_gathered_vocabulary(world_size, gloo_world):
    logits = logits_with_ties()
    found = gloo_world(world_size).run(draw_with_shards)
    cases = list(itertools.product(VOCAB_SIZES, SETTINGS))
    for (vocab_size, sampling), *by_rank in zip(cases, *found, strict=True):
        expected_tokens, expected_log_probs = sample_gathered(
            logits[:, :vocab_size], torch.arange(ROWS), torch.arange(ROWS) % 7, sampling
        )
        for tokens, log_probs in by_rank:
            assert torch.equal(tokens, expected_tokens), (vocab_size, sampling)
            torch.testing.assert_close(log_probs, expected_log_probs, rtol=1e-12, atol=1e-12)
            assert torch.equal(log_probs, by_rank[0][1]), "the same bits on every rank"


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
    assert all(rows * width <= number <= rows * (width + 1) for number in elements)


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
    noise = gumbel_noise(torch.arange(50), zeros(50), 0, 2000).flatten()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.57722, abs=0.02)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_noise_of_a_shard_is_that_of_its_token_ids():
    whole = gumbel_noise(torch.arange(5), torch.arange(5), 0, 30)
    torch.testing.assert_close(
        gumbel_noise(torch.arange(5), torch.arange(5), 12, 9), whole[:, 12:21], rtol=1e-14, atol=0
    )


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
        noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 0, 5)[0]
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
