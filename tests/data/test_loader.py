import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batching import ONE_RANK

from megatron_gkd.data.loader import StepLoader, validation_batches
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.sample import Sample, shift_labels
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.context_parallel import context_parallel_indices
from megatron_gkd.runtime.signals import STOP_SIGNALS

PAD = 0
ROWS = 11
CONFIG = replace(ONE_RANK, pad_multiple=4, pad_token_id=PAD)


class Rows:
    """Row i holds the token i + 1, a different number of times for each row; all but the first two are trained on."""

    lengths = np.array([3 + 5 * i % 17 for i in range(ROWS)])
    num_labels = lengths - 2

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        input_ids = np.full(self.lengths[row], row + 1)
        return Sample(input_ids, shift_labels(input_ids, np.arange(len(input_ids)) >= 2), "dataset", row)


def loader(steps=range(1, 4), num_workers=0, skip=None, **layout):
    order = SampleOrder([ROWS], [1.0], 7, shuffle=True)
    return StepLoader(Rows(), order, replace(CONFIG, **layout), steps, num_workers=num_workers, skip=skip)


def tokens_of_step(step, dp_size=1, cp_size=1, **options):
    """Sorted (token, label, position) of all tokens of a step that are not padding, over all ranks."""
    found = []
    for dp_rank in range(dp_size):
        for cp_rank in range(cp_size):
            ranks = dict(dp_rank=dp_rank, dp_size=dp_size, cp_rank=cp_rank, cp_size=cp_size)
            for microbatch in loader(**ranks, **options).step(step):
                columns = (microbatch.input_ids, microbatch.labels, microbatch.position_ids)
                rows = torch.stack(columns, dim=-1)[~microbatch.padding_mask]
                found += [tuple(row) for row in rows.tolist()]
    return sorted(found)


@pytest.mark.parametrize(
    "layout",
    [
        dict(micro_batch_size=2),
        dict(dp_size=2),
        dict(dp_size=4, micro_batch_size=2),
        dict(cp_size=2),
        dict(packing=True),
        dict(packing=True, dp_size=2, cp_size=2, microbatch_multiple=2),
        dict(pad_multiple=1),
    ],
)
def test_a_step_trains_on_the_same_tokens_in_every_layout(layout):
    for step in range(1, 4):
        assert tokens_of_step(step, **layout) == tokens_of_step(step)


@pytest.mark.parametrize("packing", [False, True])
def test_labels_of_all_ranks_add_up_to_those_of_the_rows(packing):
    ranks = [loader(dp_size=2, dp_rank=rank, packing=packing) for rank in range(2)]
    order = SampleOrder([ROWS], [1.0], 7, shuffle=True)
    for step in range(1, 4):
        total = sum(microbatch.num_labels for rank in ranks for microbatch in rank.step(step))
        assert total == sum(Rows.num_labels[row] for row in order.rows_of_step(step, 8))


def test_packing_counts_padding_and_makes_fewer_microbatches():
    packed = loader(packing=True).step(1)
    assert len(packed) < 8
    assert all(microbatch.input_ids.shape[1] <= 32 for microbatch in packed)
    assert sum(microbatch.num_rows for microbatch in packed) == 8


def test_context_parallel_ranks_share_microbatches():
    whole = loader().step(1)
    for rank in range(2):
        for share, microbatch in zip(loader(cp_rank=rank, cp_size=2).step(1), whole, strict=True):
            indices = context_parallel_indices(microbatch.cu_seqlens, rank, 2)
            assert torch.equal(share.input_ids, microbatch.input_ids[:, indices])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_gives_the_steps_in_order_and_leaves_the_random_state_alone(num_workers):
    state = torch.get_rng_state()
    steps = list(loader(steps=range(2, 6), num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(steps) == 4
    for index, microbatches in enumerate(steps, start=2):
        expected = loader().step(index)
        assert [m.input_ids.tolist() for m in microbatches] == [m.input_ids.tolist() for m in expected]


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_workers_go_on_where_a_signal_reaches_all_processes_of_a_job(signum):
    others = set(multiprocessing.active_children())  # of other tests
    steps = iter(loader(steps=range(1, 9), num_workers=1))
    first = next(steps)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signum)
    assert first is not None and len(list(steps)) == 7


FEW_DESCRIPTORS = """
import resource
import test_loader
import torch

resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
for microbatches in test_loader.loader(range(1, 5), num_workers=2, global_batch_size=64):
    assert len(microbatches) == 64
    assert all(torch.is_tensor(microbatch.to("cpu").input_ids) for microbatch in microbatches)
"""


def test_workers_need_few_file_descriptors_however_many_microbatches_a_step_has():
    """128 descriptors are 1 for each 2 microbatches that 2 workers hold ready (2 steps each)."""
    finished = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("cp_size", [1, 2])
def test_equal_lengths_are_those_of_the_longest_and_change_no_token(cp_size):
    options = {"cp_size": cp_size, "pad_multiple": 4}
    lengths = {microbatch.total_length for microbatch in loader(**options, equal_lengths=True).step(2)}
    assert lengths == {max(microbatch.total_length for microbatch in loader(**options).step(2))}
    assert tokens_of_step(2, **options, equal_lengths=True) == tokens_of_step(2, **options)


def test_length_is_the_number_of_steps():
    assert len(loader(range(1, 6))) == 5


class TestValidation:
    def batches(self, num_steps=None, **layout):
        return validation_batches(Rows(), replace(CONFIG, **layout), num_steps)

    @pytest.mark.parametrize("packing", [False, True])
    def test_every_row_counts_once_and_every_rank_has_equal_work(self, packing):
        ranks = [self.batches(dp_size=2, dp_rank=rank, packing=packing) for rank in range(2)]
        assert [len(rank) for rank in ranks] == [2, 2]
        steps = [[list(step) for step in rank] for rank in ranks]
        for step in range(2):
            assert len(steps[0][step]) == len(steps[1][step])
        microbatches = [microbatch for rank in steps for step in rank for microbatch in step]
        labels = torch.cat([microbatch.labels[microbatch.labels != -100] for microbatch in microbatches])
        counts = torch.bincount(labels, minlength=ROWS + 1)[1:]
        assert counts.tolist() == Rows.num_labels.tolist()

    def test_the_number_of_steps_can_be_limited(self):
        assert len(self.batches(num_steps=1)) == 1
        assert len(self.batches(num_steps=9)) == 2


def test_skipped_steps_are_none():
    batches = list(loader(skip=lambda step: step == 2))
    assert [batch is None for batch in batches] == [False, True, False]


def test_a_prompt_alone_in_a_step_of_the_dataset_is_an_error():
    class Prompts(Rows):
        num_labels = np.zeros(ROWS, dtype=np.int64)

    order = SampleOrder([ROWS], [1.0], seed=0, shuffle=False)
    with pytest.raises(UserError, match="step 1: row 0 of the dataset has no response"):
        StepLoader(Prompts(), order, CONFIG, range(1, 4)).step(1)
    with pytest.raises(UserError) as error:
        next(iter(StepLoader(Prompts(), order, CONFIG, range(1, 4), num_workers=1)))
    assert "\n" not in str(error.value), "a worker's traceback"
