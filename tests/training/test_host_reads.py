"""No step waits for the device in its loop over microbatches, but where Megatron-Core has to."""

from __future__ import annotations

import functools
import os
import warnings
from collections import Counter

import pytest
import torch
from checkpoints import tiny_checkpoint
from host_reads import host_reads
from layouts import CP2, EP2, PP2, SP, TP2
from rows import RandomRows
from training_layouts import build
from world import process_queue, start_process

# On a device none of these reads anything: Megatron moves what it finds on the CPU.
NOTHING = {
    "megatron/core/models/common/embeddings/rotary_pos_embedding.py, get_emb: to",
    "megatron/core/transformer/moe/router.py, gating: to",
}
# Once in a step, at its end.
ONCE = {
    "megatron/core/distributed/finalize_model_grads.py, finalize_model_grads: _local_scalar_dense",  # the token count
    "megatron_gkd/training/student.py, _totals: tolist",  # the metrics of the step
}
# For each microbatch; a new one needs a reason.
ATTENTION = {"megatron_gkd/runtime/transformer_engine/attention.py, _from_boundaries: tolist"}  # the fallback alone
CHUNKS = {"megatron_gkd/runtime/context_parallel.py, context_parallel_indices: tolist"}  # the same
SHAPES = {  # a stage has to know the length of what it receives
    "megatron/core/pipeline_parallel/p2p_communication.py, _communicate_shapes: tensor",
    "megatron/core/pipeline_parallel/p2p_communication.py, _communicate_shapes: tolist",
}
EXPERTS = {  # the number of tokens of each expert, by which buffers are allocated and split
    "megatron/core/transformer/moe/experts.py, forward: tolist",
    "megatron/core/transformer/moe/moe_utils.py, permute: masked_select",
    "megatron/core/transformer/moe/moe_utils.py, sort_chunks_by_idxs: tolist",
    "megatron/core/transformer/moe/token_dispatcher.py, _maybe_dtoh_and_synchronize: numpy",
}
TOP_K = {"gkd_logits_topk": 5, "gkd_topk_tail": "bucket"}
CASES = {
    "TP2+SP": ("qwen3", {"parallel": TP2 | SP}, ATTENTION),
    "top-k, LoRA": ("qwen3", {"parallel": TP2, "distill": TOP_K, "lora": {}}, ATTENTION),
    "PP2, self": (
        "qwen3",
        {"parallel": PP2, "teacher": {"teacher_kind": "self", "teacher_ema": 0.9, "teacher_model": None}},
        ATTENTION | SHAPES,
    ),
    "CP2": ("qwen3", {"parallel": CP2}, ATTENTION | CHUNKS),
    "EP2": ("qwen3_moe", {"parallel": EP2}, ATTENTION | EXPERTS),
}


@functools.cache
def models(student: str):
    return tiny_checkpoint(student, seed=2, num_hidden_layers=2), tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2)


def prepare(student, teacher, changes, count):
    """Return a function that takes a step without its update, and the microbatches of three, on the device."""
    from megatron_gkd.runtime import portability

    recipe = changes | {"train": {"global_batch_size": count}}
    _, student, teacher, loader = build(student, teacher, recipe, RandomRows(count=3 * count))
    steps = [[one.to(portability.device()) for one in microbatches] for microbatches in loader]

    def step(microbatches):
        with teacher.resident():
            signals = teacher.score(microbatches)
        student.compute_gradients(microbatches, signals)

    return step, steps


def count_reads(rank, world_size, student, teacher, changes, count, read_loss=False):
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.loss import Objective

    data_parallel = world_size if changes["parallel"] == EP2 else 1
    step, steps = prepare(student, teacher, changes, count * data_parallel)
    assert len(steps[0]) == count
    step(steps[0])  # what is computed once
    compute = Objective.compute
    if read_loss:
        Objective.compute = lambda *arguments: _read(compute(*arguments))
    try:
        with host_reads() as found:
            step(steps[1])
    finally:
        Objective.compute = compute
    destroy_mesh()
    return found


def _read(losses):
    losses.total.item()
    return losses


@pytest.mark.parametrize("case", CASES)
def test_only_megatron_waits_for_the_device_within_a_microbatch(case, gloo_world):
    student, changes, allowed = CASES[case]
    for two, four in zip(
        *(gloo_world(2).run(count_reads, *models(student), changes, count) for count in (2, 4)), strict=True
    ):
        assert set(four) <= NOTHING | ONCE | allowed
        assert {site: four[site] for site in ONCE} == {site: two[site] for site in ONCE}
        assert ATTENTION <= set(four)  # the test sees what happens


def test_a_loss_that_is_read_is_found(gloo_world):
    found = gloo_world(1).run(count_reads, *models("qwen3"), {"parallel": {}}, 2, read_loss=True)[0]
    assert found["training/test_host_reads.py, _read: _local_scalar_dense"] == 2


def _count_synchronizations(results, student, teacher):
    """Put for 2 and 4 microbatches the number of CUDA's synchronizations in a step, by place."""
    import torch.distributed as dist

    from megatron_gkd.runtime.mesh import destroy_mesh

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    for count in (2, 4):
        step, steps = prepare(student, teacher, {}, count)
        step(steps[0])
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step(steps[1])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
        results.put(Counter(f"{one.filename}:{one.lineno}" for one in found))
        destroy_mesh()
    dist.destroy_process_group()


@pytest.mark.gpu
def test_a_gpu_does_not_wait_within_a_microbatch():
    results = process_queue()
    process = start_process(_count_synchronizations, results, *map(str, models("qwen3")))
    two, four = (results.get(timeout=300) for _ in range(2))
    process.join()
    growing = {place for place in four if four[place] > two[place]}
    assert all("transformer_engine/attention.py" in place for place in growing), growing
