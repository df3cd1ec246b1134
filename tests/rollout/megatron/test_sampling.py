"""The next token: filters as transformers has them, the right distribution, decided by seed and position alone."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.megatron import sampling as module
from megatron_gkd.rollout.megatron.sampling import as_int64, filtered, gumbel_noise, sample


def random_logits(rows: int = 6, vocab_size: int = 99, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


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
    assert torch.equal(filtered(logits / temperature, top_k, top_p), expected)


def test_ties_with_the_kth_token_stay():
    scores = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]])
    assert filtered(scores, 2, 1.0).isfinite().tolist() == [[True, True, True, False, True]]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}])
def test_draws_follow_the_distribution(settings):
    sampling, draws = Sampling(1, **settings), 20000
    logits = random_logits(rows=1, vocab_size=12)
    tokens, _ = sample(logits.expand(draws, -1), torch.arange(draws), zeros(draws), sampling)
    scores = filtered(logits[0:1] / sampling.temperature, sampling.top_k, sampling.top_p)
    expected = scores.softmax(-1)[0]
    counts = tokens.bincount(minlength=12)
    assert (counts[expected == 0] == 0).all()
    deviation = (counts / draws - expected).abs()
    assert (deviation <= 4 * (expected * (1 - expected) / draws).sqrt()).all()  # four standard deviations


def test_draws_of_positions_are_independent_too():
    """One seed, many positions: the pairs of neighbours are spread like independent draws."""
    draws = 20000
    logits = torch.zeros(draws, 4)
    tokens, _ = sample(logits, zeros(draws) + 5, torch.arange(draws), Sampling(1))
    pairs = (4 * tokens[1:] + tokens[:-1]).bincount(minlength=16) / (draws - 1)
    assert (pairs - 1 / 16).abs().max() < 4 * math.sqrt(1 / 16 / draws)


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(torch.arange(50), zeros(50), 2000).flatten()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.57722, abs=0.02)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_noise_is_the_published_generators():
    """SplitMix64 as written down, in Python's integers."""
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF  # the generator's first number from the state 0
    for seed, position in ((0, 0), (123, 4), (as_int64(2**63 + 9), 1000)):
        key = mix((mix((seed + golden) & mask) + (position + 1) * golden) & mask)
        expected = [mix((key + (token + 1) * golden) & mask) for token in range(5)]
        noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 5)[0]
        for value, bits in zip(noise.tolist(), expected, strict=True):
            assert value == pytest.approx(-math.log(-math.log(((bits >> 12) + 0.5) / 2**52)), rel=1e-12)


def test_a_draw_depends_on_its_seed_and_position_and_on_no_other_row(monkeypatch):
    logits, seeds, positions = random_logits(8), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), torch.arange(8)
    together = sample(logits, seeds, positions, Sampling(1))[0]
    order = torch.randperm(8)
    assert torch.equal(sample(logits[order], seeds[order], positions[order], Sampling(1))[0], together[order])
    alone = [sample(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1], Sampling(1))[0] for i in range(8)]
    assert torch.equal(torch.cat(alone), together)
    monkeypatch.setattr(module, "_MOST_ELEMENTS", 300)  # blocks of three rows
    assert torch.equal(sample(logits, seeds, positions, Sampling(1))[0], together)


def test_rounding_of_the_logits_hardly_changes_a_draw():
    draws = 5000
    logits = random_logits(1).expand(draws, -1)
    rounded = logits + 1e-6 * random_logits(draws, seed=1)
    first, second = (sample(x, torch.arange(draws), zeros(draws), Sampling(1))[0] for x in (logits, rounded))
    assert (first != second).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_most_likely_and_log_probs_are_the_models(dtype):
    logits = random_logits().to(dtype)
    log_probs = logits.double().log_softmax(-1)
    for sampling in (Sampling(1, temperature=0), Sampling(1, temperature=0.5, top_k=3, top_p=0.9)):
        tokens, found = sample(logits, torch.arange(6), zeros(6), sampling)
        torch.testing.assert_close(found, log_probs.gather(1, tokens[:, None])[:, 0])
        if sampling.temperature == 0:
            assert torch.equal(tokens, logits.argmax(-1))


def test_any_integer_is_a_seed():
    assert [as_int64(seed) for seed in (0, -1, 2**63 - 1, 2**63, 2**64 + 5)] == [0, -1, 2**63 - 1, -(2**63), 5]
