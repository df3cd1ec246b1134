"""The passes: blocks of rows are only a way to walk, and the gradient may overwrite the logits."""

import pytest
import torch
from ops.oracle import BETAS, random_logits

from megatron_gkd.ops import statistics
from megatron_gkd.ops.statistics import DivergenceSpec, Weights, measure, write_gradient
from megatron_gkd.ops.vocabulary import VocabShard

TOKENS, WIDTH = 37, 21


def all_passes(beta, in_place=False):
    """Everything that the passes return for one block of tokens, as a flat list."""
    s, t = (random_logits(TOKENS, WIDTH, seed=seed) for seed in (0, 1))
    labels = torch.arange(TOKENS) % WIDTH
    spec = DivergenceSpec.of(beta, 0.9, VocabShard.of(WIDTH))
    normalizers, sums = measure(s, t, labels, spec)
    weights = Weights(random_logits(TOKENS, seed=2), random_logits(TOKENS, seed=3), labels)
    out = s if in_place else torch.empty_like(s)
    write_gradient(out, s, t, normalizers, sums.slope, weights, spec)
    return [normalizers.cross_entropy, normalizers.top1_agreement, *vars(sums).values(), out]


@pytest.mark.parametrize("beta", BETAS)
def test_blocks_of_rows_change_nothing(beta, monkeypatch):
    whole = all_passes(beta)
    monkeypatch.setattr(statistics, "BLOCK_MIN_ROWS", 1)
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 5 * WIDTH)  # 37 tokens: seven blocks of 5 and one of 2
    for blockwise, expected in zip(all_passes(beta), whole, strict=True):
        assert torch.equal(blockwise, expected)


@pytest.mark.parametrize("beta", BETAS)
def test_in_place_equals_out_of_place(beta):
    assert torch.equal(all_passes(beta, in_place=True)[-1], all_passes(beta)[-1])


def test_ties_for_the_most_likely_token_go_to_the_lower_id():
    spec = DivergenceSpec.of(0.5, 1.0, VocabShard.of(4))
    student, teacher = (
        torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 2),
        torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]]),
    )
    normalizers, _ = measure(student, teacher, None, spec)
    assert normalizers.top1_agreement.tolist() == [1.0, 0.0]


def test_a_shard_knows_its_columns():
    shard = VocabShard(group=None, first=8, valid=3)
    here, column = shard.owned(torch.tensor([7, 8, 10, 11, -100]))
    assert here.tolist() == [False, True, True, False, False]
    assert column.tolist() == [0, 0, 2, 0, 0]
