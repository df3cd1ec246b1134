"""Hidden states of a Megatron model at the student's labels, from what the *teacher* reads.

Where a row has a `teacher_prompt` the teacher's sequence has another length, so that its tokens lie elsewhere in the
microbatch and on other context-parallel ranks than the student's. Labels are the same in both, one to one: by their
numbers states find their way to the rank whose student needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.microbatch import Microbatch, collate, pad_to, shard_context_parallel
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.models.label_rows import label_rows
from megatron_gkd.models.megatron_model import hidden_states
from megatron_gkd.models.pipeline import forward_only
from megatron_gkd.models.sharded_rows import ShardedRows
from megatron_gkd.runtime.mesh import Mesh


@torch.no_grad()
def states_at_labels(
    chunks: list[nn.Module], microbatches: Sequence[Microbatch], mesh: Mesh
) -> list[ShardedRows | None]:
    """Megatron's forward-only pipeline over all microbatches. All ranks call it together.

    Returns:
        On the last stage [N, H] for each microbatch, a row for every label that this context-parallel rank has of it,
        distributed over the tensor-parallel ranks; None elsewhere.
    """
    readings = _readings(microbatches, mesh, equal_lengths=len(chunks) > 1)
    read_by_student = {id(reading): one for reading, one in zip(readings, microbatches, strict=True)}

    def rows(output: Tensor, reading: Microbatch) -> ShardedRows:
        states, microbatch = label_rows(output, reading.label_positions, mesh), read_by_student[id(reading)]
        if reading is not microbatch:
            states = _moved(states, reading, microbatch, mesh)
        return ShardedRows.from_replicated(states, mesh.tp)

    return forward_only(chunks, readings, hidden_states, rows, mesh)


def _readings(microbatches: Sequence[Microbatch], mesh: Mesh, *, equal_lengths: bool) -> list[Microbatch]:
    """What the teacher reads, cut for this rank; where that is what the student reads, the student's microbatch.

    `equal_lengths`: all of one length, as the interleaved schedule wants them.
    """
    differs = [any(teacher_view(sample) is not sample for sample in one.samples) for one in microbatches]
    if equal_lengths and (any(differs) or len({one.total_length for one in microbatches}) > 1):
        differs = [True] * len(microbatches)
    wholes = {
        index: collate([teacher_view(sample) for sample in one.samples], pad_multiple=mesh.layout.pad_multiple)
        for index, one in enumerate(microbatches)
        if differs[index]
    }
    if equal_lengths and wholes:
        longest = max(whole.total_length for whole in wholes.values())
        wholes = {index: pad_to(whole, longest) for index, whole in wholes.items()}
    readings = list(microbatches)
    for index, whole in wholes.items():
        part = shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size())
        readings[index] = part.to(microbatches[index].input_ids.device)
    return readings


def _moved(states: Tensor, reading: Microbatch, microbatch: Microbatch, mesh: Mesh) -> Tensor:
    """[N', H] of the labels that this rank has of `reading` -> [N, H] of those that it has of `microbatch`."""
    rank, size = mesh.cp.rank(), mesh.cp.size()
    if size == 1:
        return states  # the same labels in the same order
    numbers = [local_label_indices(reading, other, size).to(states.device) for other in range(size)]
    padded = states.new_zeros(max(map(len, numbers)), states.shape[1])  # gloo gathers equal shapes only
    padded[: len(states)] = states
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=mesh.cp)
    whole = states.new_empty(reading.num_labels, states.shape[1])
    for theirs, part in zip(numbers, gathered, strict=True):
        whole[theirs] = part[: len(theirs)]
    return whole[local_label_indices(microbatch, rank, size).to(states.device)]
