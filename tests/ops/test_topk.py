"""The choice of the teacher's top-k: the same ids on any number of ranks, ties to the lower id, an exact tail."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.oracle import pad_columns, random_logits, shard

from megatron_gkd.ops import topk as topk_module
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_choice import vocab_parallel_topk

TOKENS = 7


@dataclass(frozen=True)
class Case:
    k: int
    dtype: torch.dtype = torch.float32
    kind: str = "random"
    width: int = 24 * 4  # over all ranks, padding included
    vocab_size: int | None = None
    temperature: float = 1.0
    tokens: int = TOKENS

    @property
    def logits(self):
        """The whole vocabulary; padding holds ordinary numbers."""
        size = self.vocab_size or self.width
        logits = random_logits(self.tokens, size, seed=3, dtype=self.dtype)
        if self.kind == "ties":
            logits = logits.sign() * (logits.abs() > 2)  # -1, -0, 0 and 1
        elif self.kind == "equal":
            logits = torch.ones_like(logits)
        elif self.kind == "one rank":  # the last of any world has the largest, if there is no padding
            logits = logits + torch.arange(size) // (size * 3 // 4) * 100
        elif self.kind == "excluded":  # fewer than k are left in some rows
            logits = logits.masked_fill(torch.arange(size) % 5 != torch.arange(self.tokens)[:, None] % 5, -torch.inf)
        elif self.kind == "large":
            logits = logits * 1e4
        return pad_columns(logits.to(self.dtype), self.width - size, seed=4)


def oracle(case):
    """(ids, values, tail), unsharded, in fp64."""
    logits = case.logits[:, : case.vocab_size].double()
    values, ids = logits.sort(stable=True, dim=-1, descending=True)
    shift = values[:, :1].nan_to_num(neginf=0)  # of a row without any mass
    rest = logits.scatter(1, ids[:, : case.k], -torch.inf)
    return ids[:, : case.k], (values - shift)[:, : case.k], ((rest - shift) / case.temperature).logsumexp(-1)


def choose(rank, world_size, cases):
    return [
        vars(
            vocab_parallel_topk(
                shard(case.logits, rank, world_size),
                case.k,
                group=dist.group.WORLD,
                vocab_size=case.vocab_size,
                temperature=case.temperature,
            )
        )
        for case in cases
    ]


def assert_chosen(world, cases):
    for case, *by_rank in zip(cases, *world.run(choose, cases), strict=True):
        topk = TopK(**by_rank[0])
        for other in by_rank[1:]:
            for name in ("ids", "values", "tail"):
                assert torch.equal(other[name], by_rank[0][name]), (case, name)
        ids, values, tail = oracle(case)
        assert torch.equal(topk.ids, ids), case
        assert torch.equal(topk.values, values.to(topk.values.dtype)), case
        assert topk.values.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(topk.tail.double(), tail, rtol=1e-5, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}")
        assert topk.temperature == case.temperature


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ids_values_and_tail_equal_those_of_the_whole_vocabulary(gloo_world, tp):
    kinds = ["random", "ties", "equal", "one rank", "excluded"]
    cases = [Case(k, dtype, kind) for k, dtype, kind in itertools.product([1, 5, 24, 95, 96], DTYPES, kinds)]
    cases += [Case(5, temperature=temperature, kind=kind) for temperature in (0.5, 2.0) for kind in kinds]
    cases += [Case(5, kind="large", temperature=temperature) for temperature in (0.5, 1.0)]
    assert_chosen(gloo_world(tp), cases)


@pytest.mark.parametrize("tp", [2, 4])
def test_padding_shards_smaller_than_k_and_no_tokens(gloo_world, tp):
    cases = [
        case
        for kind in ("random", "ties", "excluded")
        for case in (
            Case(10, kind=kind, width=13 * tp, vocab_size=13 * tp - 5),  # padding on the last shard
            Case(9, kind=kind, width=9 * tp, vocab_size=9 * tp - 9),  # all of the last shard
            Case(9 * tp - 9, kind=kind, width=9 * tp, vocab_size=9 * tp - 9),  # and k = V
            Case(1, kind=kind, width=3 * tp, vocab_size=1),
            Case(tp, kind=kind, width=tp),
            Case(3 * tp - 1, kind=kind, width=3 * tp),  # shards smaller than k
            Case(2, kind=kind, tokens=0),
        )
    ]
    assert_chosen(gloo_world(tp), cases)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.data())
def test_any_values_with_ties(width, data):
    k = data.draw(st.integers(1, width))
    rows = data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=width, max_size=width), min_size=1, max_size=4))
    topk = vocab_parallel_topk(torch.tensor(rows, dtype=torch.bfloat16), k)
    for row, ids in zip(rows, topk.ids.tolist(), strict=True):
        assert ids == sorted(range(width), key=lambda j: (-row[j], j))[:k]


def test_blocks_of_rows_change_nothing(monkeypatch):
    logits = random_logits(37, 50, seed=0, dtype=torch.bfloat16)
    whole = vocab_parallel_topk(logits, 6)
    monkeypatch.setattr(topk_module, "CPU_BLOCK_ELEMENTS", 50 * 5)
    blockwise = vocab_parallel_topk(logits, 6)
    for name in ("ids", "values", "tail"):
        assert torch.equal(getattr(blockwise, name), getattr(whole, name))


def test_leading_dimensions_and_no_tail():
    logits = random_logits(2, 3, 11, seed=0)
    topk, flat = (vocab_parallel_topk(x, 4, temperature=None) for x in (logits, logits.view(6, 11)))
    assert topk.ids.shape == topk.values.shape == (2, 3, 4)
    assert topk.tail is None and topk.temperature is None
    assert torch.equal(topk.ids.view(6, 4), flat.ids)
    assert torch.equal(topk.flatten()[2:4].values, flat.values[2:4])
    assert vocab_parallel_topk(logits, 4).tail.shape == (2, 3)


def test_the_tail_is_computed_as_a_log_sum_exp():
    logits = torch.tensor([[0.0, -300.0, -301.0, -80.0]])  # 1 - sum is 0 in any type
    tail = vocab_parallel_topk(logits, 2).tail
    assert tail.item() == pytest.approx(-300 + torch.tensor([0.0, -1.0]).logsumexp(0).item())
    assert vocab_parallel_topk(logits, 4).tail.item() == -torch.inf


def test_a_row_of_minus_infinity_and_one_of_nan():
    logits = torch.full((2, 5), -torch.inf)
    logits[1] = torch.nan
    topk = vocab_parallel_topk(logits, 2)
    assert topk.ids[0].tolist() == [0, 1] and (topk.values[0] == -torch.inf).all() and topk.tail[0] == -torch.inf
    assert ((topk.ids >= 0) & (topk.ids < 5)).all(), "garbage, but of the vocabulary"


def test_log_probs_give_the_same_top_k_at_temperature_1():
    logits = random_logits(9, 30, seed=0, dtype=torch.float64)
    local = vocab_parallel_topk(logits, 5)
    log_probs = logits.log_softmax(-1)
    server = TopK.from_log_probs(local.ids, log_probs.gather(1, local.ids))
    shift = log_probs.amax(-1)
    torch.testing.assert_close(server.values - shift[:, None], local.values)
    torch.testing.assert_close(server.tail - shift, local.tail, rtol=1e-8, atol=1e-8)
    assert server.temperature == 1.0


def test_the_tail_of_log_probs_near_1_and_of_missing_entries():
    ids = torch.tensor([[3, 1], [3, -1], [-1, -1], [3, 1]])
    nearly_one = -1e-4
    log_probs = torch.tensor([[nearly_one, -30.0], [-0.5, 0.0], [0.0, 7.0], [0.0, -20.0]])
    topk = TopK.from_log_probs(ids, log_probs)
    assert topk.values.dtype == topk.tail.dtype == torch.float32
    assert topk.values[1, 1] == topk.values[2, 0] == topk.values[2, 1] == -torch.inf
    expected = [(-torch.expm1(torch.tensor(nearly_one))).log(), torch.tensor(-0.5).exp().neg().log1p()]
    torch.testing.assert_close(topk.tail[:2], torch.stack(expected))
    assert topk.tail[2] == 0, "nothing is known: all mass is in the tail"
    assert topk.tail[3].item() == pytest.approx(-23 * torch.tensor(2.0).log().item()), "rounding hides smaller masses"


def calls_of_collectives(rank, world_size, dtype, temperature):
    calls = []
    original = dist.all_gather_into_tensor

    def counting(output, local, *args, **kwargs):
        calls.append(local.numel() * local.element_size())
        return original(output, local, *args, **kwargs)

    dist.all_gather_into_tensor = counting
    try:
        logits = random_logits(TOKENS, 50, seed=rank, dtype=dtype)
        vocab_parallel_topk(logits, 6, group=dist.group.WORLD, temperature=temperature)
    finally:
        dist.all_gather_into_tensor = original
    return calls


@pytest.mark.parametrize(
    ("dtype", "temperature", "bytes_per_token"),
    [
        (torch.bfloat16, 1.0, 6 * 8 + 8),
        (torch.bfloat16, None, 6 * 8),
        (torch.float32, 0.5, 6 * 8 + 8),
        (torch.float64, 1.0, 6 * 16 + 16),
    ],
)
def test_one_collective_of_8_bytes_a_candidate(gloo_world, dtype, temperature, bytes_per_token):
    for calls in gloo_world(2).run(calls_of_collectives, dtype, temperature):
        assert calls == [TOKENS * bytes_per_token]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k = 0: must be from 1 to 8"),
        ({"k": 9}, r"k = 9: must be from 1 to 8"),
        ({"k": 8, "vocab_size": 7}, r"k = 8: must be from 1 to 7"),
        ({"k": 1, "vocab_size": 9}, r"vocab_size = 9: must be from 1 to 8"),
        ({"k": 1, "temperature": 0.0}, r"temperature = 0.0: must be from 0.01 to 1000"),
        ({"k": 1, "temperature": 1e-40}, r"temperature = 1e-40: must be from 0.01 to 1000"),
        ({"k": 1, "temperature": float("inf")}, r"temperature = inf: must be from 0.01 to 1000"),
        ({"k": 1, "logits": torch.zeros(2, 8, dtype=torch.int64)}, r"logits = torch.int64 \[2, 8\]: must be floats"),
        ({"k": 1, "logits": torch.tensor(1.0)}, r"logits = torch.float32 \[\]: must be floats"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    arguments = {"logits": torch.zeros(2, 8), **arguments}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_topk(arguments.pop("logits"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": torch.zeros(2, 3)}, r"ids = torch.float32 \[2, 3\]: must be torch.int64"),
        ({"ids": torch.zeros(2, 0, dtype=torch.int64)}, r"ids = torch.int64 \[2, 0\]: must be \[..., k\] with k >= 1"),
        ({"values": torch.zeros(2, 4)}, r"values = torch.float32 \[2, 4\]: must be .* \[2, 3\]"),
        ({"values": torch.zeros(2, 3).bfloat16()}, r"values = torch.bfloat16 \[2, 3\]: must be torch.float32"),
        ({"tail": torch.zeros(2)}, r"tail, temperature: only one of them is given"),
        ({"tail": torch.zeros(3), "temperature": 1.0}, r"tail = torch.float32 \[3\]: must be torch.float32 \[2\]"),
    ],
)
def test_fields_of_a_topk_must_agree(fields, message):
    with pytest.raises(ValueError, match=message):
        TopK(**{"ids": torch.zeros(2, 3, dtype=torch.int64), "values": torch.zeros(2, 3), **fields})


def test_logits_are_not_taken_for_log_probs():
    with pytest.raises(ValueError, match=r"log_probs: their probabilities add up to 2 in a row; must be at most 1"):
        TopK.from_log_probs(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[-1.0, -1.0], [0.0, 0.0]]))
