"""The contract of all teachers. A teacher's tests derive from `TeacherContract` and add a fixture of results.

    def results_of(rank, world_size, layout):
        with mesh_of(layout) as mesh:
            return score_microbatches(MyTeacher(...), mesh)                 # of CHECKPOINT()'s weights

    class TestMyTeacher(TeacherContract):
        @pytest.fixture(scope="class", params=LAYOUTS)
        @classmethod
        def results(cls, request, gloo_world):
            return in_every_rank(gloo_world, request.param, results_of)

The teacher is `CHECKPOINT()` (qwen3, vocabulary 99), in fp32; so is the student, where there is one. A teacher that
reads other tokens than the samples' own has its own `log_probs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoints import tiny_checkpoint
from layouts import DENSE
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_gkd.data.sample import Sample, shift_labels

CHECKPOINT = functools.partial(tiny_checkpoint, "qwen3", seed=5, head_dim=32)  # the smallest that vLLM has on a CPU
LAYOUTS = ["micro batch 2", "TP2+SPxCP2", "TP2xPP2"]
"""Of `layouts.DENSE`: one process, and the least that has every kind of rank."""
TOLERANCE = 1e-4  # of log-probabilities


def sample(length: int, *trained: slice, seed: int) -> Sample:
    """Random tokens, of which `trained` are trained on."""
    counts = np.zeros(length, dtype=bool)
    for piece in trained:
        counts[piece] = True
    ids = np.random.default_rng(seed).integers(3, 99, length)
    return Sample(input_ids=ids, labels=shift_labels(ids, counts), source="dataset", row_id=seed)


SHORT = sample(7, slice(5, None), seed=5)
MICROBATCHES = {
    "one row": [sample(9, slice(4, None), seed=1)],
    "rows of unequal length": [sample(length, slice(length // 2, None), seed=length) for length in (12, 5, 17)],
    "labels with gaps": [sample(20, slice(3, 7), slice(10, 11), slice(15, 20), seed=2)],
    "a row without labels among others": [
        sample(8, slice(2, None), seed=3),
        sample(6, seed=4),
        SHORT,
    ],
    "no labels at all": [sample(4, seed=6)],
    "everything but the first token": [sample(11, slice(1, None), seed=7)],
    "the same row again": [SHORT, SHORT],
}


class LabelEntries(NamedTuple):
    """A signal for some labels, as logits up to a constant for each row."""

    numbers: Tensor  # int64 [n], of the whole microbatch's labels
    ids: Tensor  # int64 [n, k], -1 where missing
    values: Tensor  # fp32 [n, k]
    tail: Tensor | None  # fp32 [n]; see `ops.topk.TopK`
    temperature: float | None
    held_rows: int | None = None  # of hidden states: for how many this rank has memory


@dataclass(frozen=True)
class RankResults:
    """The signals of one rank: for each microbatch its entries, or None."""

    coordinates: tuple[int, int, int]  # rank in tp, pp, cp
    sizes: tuple[int, int, int]
    first: list[list[LabelEntries] | None]
    again: list[list[LabelEntries] | None]
    alone: list[list[LabelEntries] | None]  # each microbatch in a call of its own


@contextmanager
def mesh_of(layout: dict):
    from training_layouts import recipe_of

    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    try:
        yield initialize_mesh(Layout.from_section(recipe_of(layout).parallel), seed=1)
    finally:
        destroy_mesh()


def in_every_rank(gloo_world, name: str, results_of: Callable, *args) -> list[RankResults]:
    """What `results_of(rank, world_size, layout, *args)` returns in every rank of the layout of this name."""
    world_size, layout = DENSE[name]
    return gloo_world(world_size).run(results_of, layout, *args)


def microbatches_of(mesh) -> list:
    """`MICROBATCHES` as the loader cuts them for this rank; the first has a sequence of padding at its end."""
    from megatron_gkd.data.microbatch import collate, pad_to, shard_context_parallel

    multiple = mesh.layout.pad_multiple
    whole = [collate(samples, pad_multiple=multiple, pad_token_id=0) for samples in MICROBATCHES.values()]
    whole[0] = pad_to(whole[0], whole[0].total_length + 4 * multiple, pad_token_id=0)
    return [shard_context_parallel(one, mesh.cp.rank(), mesh.cp.size()) for one in whole]


def score_microbatches(teacher, mesh) -> RankResults:
    """Score the contract's microbatches in this rank. All ranks call it together."""
    microbatches = microbatches_of(mesh)

    def score(some):
        with teacher.resident():
            return [read_signal(signal, one, mesh) for signal, one in zip(teacher.score(some), some, strict=True)]

    groups = mesh.tp, mesh.pp, mesh.cp
    return RankResults(
        coordinates=tuple(group.rank() for group in groups),
        sizes=tuple(group.size() for group in groups),
        first=score(microbatches),
        again=score(microbatches),
        alone=[entries for one in microbatches for entries in score([one])],
    )


def read_signal(signal, microbatch, mesh, vocab_size: int = 99) -> list[LabelEntries] | None:
    """Return any signal in one form, an element for each of its parts; `vocab_size`: of hidden states' heads."""
    from megatron_gkd.data.label_indices import local_label_indices
    from megatron_gkd.teachers.base import Hidden, Parts

    if signal is None:
        return None
    numbers = local_label_indices(microbatch, mesh.cp.rank(), mesh.cp.size())
    parts = [(part.rows, part.signal) for part in signal.parts] if isinstance(signal, Parts) else [(..., signal)]
    entries = []
    for rows, part in parts:
        if isinstance(part, Hidden):
            states = part.states.gather()
            logits = part.head.compute_logits(states)
            shards = [torch.empty_like(logits) for _ in range(mesh.tp.size())]
            dist.all_gather(shards, logits, group=mesh.tp)
            values = torch.cat(shards, 1)[:, :vocab_size]
            ids, shard = torch.arange(vocab_size).expand_as(values), part.states.shard
            held_rows = shard.untyped_storage().nbytes() // (shard.element_size() * shard.shape[1])
            entries.append(LabelEntries(numbers[rows], ids, values, None, None, held_rows))
        else:
            entries.append(LabelEntries(numbers[rows], part.ids, part.values, part.tail, part.temperature))
    return entries


@functools.cache
def transformers_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def transformers_log_probs(path, input_ids, positions) -> Tensor:
    """fp64 [n, V], after the tokens up to each of the `positions`."""
    logits = transformers_model(path)(torch.as_tensor(input_ids)[None]).logits[0, torch.as_tensor(positions)]
    return logits.double().log_softmax(-1)


class TeacherContract:
    ROUNDING = 0.0
    """By which values may differ from one call to the next."""

    @pytest.fixture(scope="class", params=LAYOUTS)
    @classmethod
    def results(cls, request, gloo_world) -> list[RankResults]:
        """Of every rank."""
        raise NotImplementedError("a teacher's tests give their own")

    @classmethod
    def log_probs(cls, sample: Sample) -> Tensor:
        """Return the expected distributions at the sample's n labels: fp64 [n, V]."""
        return transformers_log_probs(CHECKPOINT(), sample.input_ids, sample.label_positions)

    def test_there_is_a_signal_for_every_microbatch_on_the_last_stage_and_nowhere_else(self, results):
        for rank in results:
            _, stage, _ = rank.coordinates
            last = stage == rank.sizes[1] - 1
            for scored in (rank.first, rank.again, rank.alone):
                assert [entries is not None for entries in scored] == [last] * len(MICROBATCHES)

    @pytest.mark.parametrize("name", MICROBATCHES)
    def test_every_label_has_one_row_on_one_context_parallel_rank(self, results, name):
        """And on all tensor-parallel ranks of it."""
        count = sum(one.num_labels for one in MICROBATCHES[name])
        for tensor_rank in range(results[0].sizes[0]):
            numbers = [
                entries.numbers
                for rank, parts in last_stages(results, name)
                if rank[0] == tensor_rank
                for entries in parts
            ]
            assert torch.cat(numbers).sort().values.tolist() == list(range(count))

    @pytest.mark.parametrize("name", MICROBATCHES)
    def test_distributions_are_those_of_transformers(self, results, name):
        expected = torch.cat([self.log_probs(one) for one in MICROBATCHES[name]])
        for _, parts in last_stages(results, name):
            for entries in parts:
                assert_close(entries, expected[entries.numbers])

    def test_the_same_microbatches_have_the_same_signals(self, results):
        for rank in results:
            assert_alike(rank.first, rank.again, self.ROUNDING)

    def test_a_signal_does_not_depend_on_the_other_microbatches(self, results):
        for rank in results:
            assert_alike(rank.first, rank.alone, 1e-5)

    @pytest.mark.parametrize("name", MICROBATCHES)
    def test_tensor_parallel_ranks_share_the_memory_of_hidden_states(self, results, name):
        for _, parts in last_stages(results, name):
            for entries in parts:
                assert entries.held_rows in (None, -(-len(entries.numbers) // results[0].sizes[0]))

    def test_tensor_parallel_ranks_have_the_same(self, results):
        by_place: dict[tuple[int, int], list] = {}
        for rank in results:
            first = by_place.setdefault(rank.coordinates[1:], rank.first)
            assert_alike(first, rank.first, 0.0)


def last_stages(results: list[RankResults], name: str) -> Iterator[tuple[tuple[int, int, int], list[LabelEntries]]]:
    """What the ranks of the last stage have, in one data-parallel replica."""
    index = list(MICROBATCHES).index(name)
    for rank in results:
        if rank.first[index] is not None:
            yield rank.coordinates, rank.first[index]


def assert_alike(a: list[list[LabelEntries] | None], b: list[list[LabelEntries] | None], rounding: float) -> None:
    """The same tokens, in whatever order, with values that differ by `rounding` at most."""

    def by_token(entries: LabelEntries) -> tuple[Tensor, Tensor, Tensor | None]:
        dense = torch.full((len(entries.ids), 99), torch.nan)
        return entries.numbers, dense.scatter(1, entries.ids, entries.values), entries.tail

    a, b = ([None if parts is None else list(map(by_token, parts)) for parts in results] for results in (a, b))
    torch.testing.assert_close(a, b, atol=rounding, rtol=0, equal_nan=True)


def assert_close(entries: LabelEntries, expected: Tensor) -> None:
    """`expected` is fp64 [n, V], log-probabilities. The entries are its most likely tokens, with their ratios."""
    if len(entries.numbers) == 0:
        return
    assert (
        entries.ids.shape == entries.values.shape
        and (entries.ids >= 0).all()
        and (entries.ids < expected.shape[1]).all()
    )
    assert (entries.ids.sort(-1).values.diff(dim=-1) > 0).all(), "no id twice"
    values, k = entries.values.double(), entries.ids.shape[1]
    found = expected.gather(1, entries.ids)
    best = expected.topk(k).values  # of equal or almost equal tokens either may be an entry
    torch.testing.assert_close(found.sort(-1, descending=True).values, best, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(values.log_softmax(-1), found.log_softmax(-1), atol=TOLERANCE, rtol=0)
    if entries.tail is not None and k < expected.shape[1]:
        tempered = (expected / entries.temperature).scatter(1, entries.ids, -torch.inf).logsumexp(-1)
        shift = (values.logsumexp(-1) - found.logsumexp(-1)) / entries.temperature  # the row's constant
        rest = entries.tail.double() - shift
        torch.testing.assert_close(rest, tempered, atol=TOLERANCE, rtol=0)
