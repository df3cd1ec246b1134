"""Hidden states of a Megatron model at the student's labels, from the sequences that the teacher reads.

Where a row has a `teacher_prompt`, or images of which the teacher makes other tokens, the teacher's sequence has
another length, so that its tokens are at other positions of the microbatch and on other context-parallel ranks than the
student's. The labels are the same in both, one to one: their indices determine the rank whose student needs a state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.models.label_rows import label_rows
from megatron_gkd.models.megatron_model import MegatronModel, hidden_states
from megatron_gkd.models.pipeline import Pipeline
from megatron_gkd.models.sharded_rows import ShardedRows
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Hidden
from megatron_gkd.teachers.model_inputs import ModelInputs


def compute_hidden(
    model: MegatronModel, microbatches: Sequence[Microbatch], head: OutputHead | None, inputs: ModelInputs
) -> list[Hidden | None]:
    """Return a model's signals: one for each microbatch on the last pipeline stage, None elsewhere.

    All ranks call it together.

    Args:
        model: computes the hidden states.
        microbatches: of this rank.
        head: see `Hidden`; None before the last stage.
        inputs: what the model reads of the microbatches.

    Raises:
        UserError: in all ranks; an image can't be read.
    """
    states = compute_label_states(model.chunks, microbatches, model.mesh, inputs)
    return [None if rows is None or head is None else Hidden(rows, head) for rows in states]


@torch.no_grad()
def compute_label_states(
    chunks: list[nn.Module], microbatches: Sequence[Microbatch], mesh: Mesh, inputs: ModelInputs
) -> list[ShardedRows | None]:
    """Run Megatron's forward-only pipeline over all microbatches. All ranks call it together.

    Returns:
        On the last stage [N, H] for each microbatch, a row for every label that this context-parallel rank has of it,
        sharded over the tensor-parallel ranks; None elsewhere.
    """
    read = inputs.build(microbatches, mesh, equal_lengths=len(chunks) > 1)
    # Of the teacher's microbatches: a microbatch of the student whose labels are elsewhere.
    moved = {
        id(one.microbatch): students
        for one, students in zip(read, microbatches, strict=True)
        if not one.has_students_labels
    }

    def collect(output: Tensor, microbatch: Microbatch) -> ShardedRows:
        states = label_rows(output, microbatch.label_positions, mesh)
        if id(microbatch) in moved:
            states = _exchange_states(states, microbatch, moved[id(microbatch)], mesh)
        return ShardedRows.from_replicated(states, mesh.tp)

    return Pipeline(chunks, mesh).forward_only([one.microbatch for one in read], hidden_states, collect)


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
