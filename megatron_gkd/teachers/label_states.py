"""Hidden states of a Megatron model at the student's labels, from the sequences that the teacher reads.

Where a row has a `teacher_prompt` the teacher's sequence has another length, so that its tokens are at other positions
of the microbatch and on other context-parallel ranks than the student's. The labels are the same in both, one to one:
their indices determine the rank whose student needs a state.
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
from megatron_gkd.models.megatron_model import MegatronModel, hidden_states
from megatron_gkd.models.pipeline import Pipeline
from megatron_gkd.models.sharded_rows import ShardedRows
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Hidden


def compute_hidden(
    model: MegatronModel, microbatches: Sequence[Microbatch], head_weight: Tensor | None
) -> list[Hidden | None]:
    """Return a model's signals: one for each microbatch on the last pipeline stage, None elsewhere.

    All ranks call it together.

    Args:
        model: computes the hidden states.
        microbatches: of this rank.
        head_weight: see `Hidden`; None before the last stage.
    """
    states = compute_label_states(model.chunks, microbatches, model.mesh)
    return [None if rows is None or head_weight is None else Hidden(rows, head_weight) for rows in states]


@torch.no_grad()
def compute_label_states(
    chunks: list[nn.Module], microbatches: Sequence[Microbatch], mesh: Mesh
) -> list[ShardedRows | None]:
    """Run Megatron's forward-only pipeline over all microbatches. All ranks call it together.

    Returns:
        On the last stage [N, H] for each microbatch, a row for every label that this context-parallel rank has of it,
        sharded over the tensor-parallel ranks; None elsewhere.
    """
    teacher_microbatches = _build_teacher_microbatches(microbatches, mesh, equal_lengths=len(chunks) > 1)
    student_microbatches = {id(read): one for read, one in zip(teacher_microbatches, microbatches, strict=True)}

    def collect(output: Tensor, read: Microbatch) -> ShardedRows:
        states, microbatch = label_rows(output, read.label_positions, mesh), student_microbatches[id(read)]
        if read is not microbatch:
            states = _exchange_states(states, read, microbatch, mesh)
        return ShardedRows.from_replicated(states, mesh.tp)

    return Pipeline(chunks, mesh).forward_only(teacher_microbatches, hidden_states, collect)


def _build_teacher_microbatches(
    microbatches: Sequence[Microbatch], mesh: Mesh, *, equal_lengths: bool
) -> list[Microbatch]:
    """Build the microbatches that the teacher reads on this rank; the student's own where they are the same.

    Args:
        microbatches: the student's.
        mesh: the groups of this rank.
        equal_lengths: pad all to the longest, as the interleaved schedule needs it.
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
    result = list(microbatches)
    for index, whole in wholes.items():
        part = shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size())
        result[index] = part.to(microbatches[index].input_ids.device)
    return result


def _exchange_states(states: Tensor, read: Microbatch, microbatch: Microbatch, mesh: Mesh) -> Tensor:
    """Move states from the labels that this rank has of the teacher's microbatch to those of the student's.

    Args:
        states: [N', H], of this rank's labels of `read`.
        read: the teacher's microbatch.
        microbatch: the student's.
        mesh: the groups of this rank.

    Returns:
        [N, H], of this rank's labels of `microbatch`.
    """
    rank, size = mesh.cp.rank(), mesh.cp.size()
    if size == 1:
        return states  # the same labels in the same order
    indices = [local_label_indices(read, other, size).to(states.device) for other in range(size)]
    padded = states.new_zeros(max(map(len, indices)), states.shape[1])  # gloo gathers equal shapes only
    padded[: len(states)] = states
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=mesh.cp)
    whole = states.new_empty(read.num_labels, states.shape[1])
    for indices_of_rank, part in zip(indices, gathered, strict=True):
        whole[indices_of_rank] = part[: len(indices_of_rank)]
    return whole[local_label_indices(microbatch, rank, size).to(states.device)]
