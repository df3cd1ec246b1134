"""Hidden states of a Megatron model at the student's labels, from the sequences that the teacher reads.

Where a row has a `teacher_prompt`, or images of which the teacher makes other tokens, the teacher's sequence has
another length, so that its tokens are at other positions of the microbatch and on other context-parallel ranks than the
student's. The labels are the same in both, one to one: their indices determine the rank whose student needs a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.microbatch import Microbatch, concatenate
from megatron_gkd.models.host_rows import HostRows, Rows, copy_stream
from megatron_gkd.models.label_rows import label_rows
from megatron_gkd.models.megatron_model import MegatronModel, hidden_states
from megatron_gkd.models.pipeline import Pipeline
from megatron_gkd.models.sharded_rows import ShardedRows
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Hidden
from megatron_gkd.teachers.model_inputs import ModelInputs, TeacherMicrobatch


@dataclass(frozen=True)
class ScoringOptions:
    """How a model computes the states of a step.

    Attributes:
        on_host: keep them in page-locked host memory until the loss needs them.
        micro_batch_tokens: join whole microbatches up to that many tokens for a forward pass; None: do not join. A
            model with virtual pipeline stages does not: its schedule needs as many microbatches as the student's.
    """

    on_host: bool = False
    micro_batch_tokens: int | None = None


def compute_hidden(
    model: MegatronModel,
    microbatches: Sequence[Microbatch],
    head: OutputHead | None,
    inputs: ModelInputs,
    options: ScoringOptions | None = None,
) -> list[Hidden | None]:
    """Return a model's signals: one for each microbatch on the last pipeline stage, None elsewhere.

    All ranks call it together.

    Args:
        model: computes the hidden states.
        microbatches: of this rank.
        head: see `Hidden`; None before the last stage.
        inputs: what the model reads of the microbatches.
        options: how the states are computed; None: the defaults.

    Raises:
        UserError: in all ranks; an image can't be read.
    """
    states = compute_label_states(model.chunks, microbatches, model.mesh, inputs, options)
    return [None if rows is None or head is None else Hidden(rows, head) for rows in states]


@torch.no_grad()
def compute_label_states(
    chunks: list[nn.Module],
    microbatches: Sequence[Microbatch],
    mesh: Mesh,
    inputs: ModelInputs,
    options: ScoringOptions | None = None,
) -> Sequence[Rows | None]:
    """Run Megatron's forward-only pipeline over all microbatches. All ranks call it together.

    Returns:
        On the last stage [N, H] for each microbatch, a row for every label that this context-parallel rank has of it,
        sharded over the tensor-parallel ranks; None elsewhere.
    """
    options = options or ScoringOptions()
    read = inputs.build(microbatches, mesh, equal_lengths=len(chunks) > 1)
    groups = [[index] for index in range(len(read))]
    if options.micro_batch_tokens is not None and len(chunks) == 1:
        groups = group_microbatches([one.microbatch for one in read], options.micro_batch_tokens)
    joined = [concatenate([read[index].microbatch for index in group]) for group in groups]
    group_of = {id(one): group for one, group in zip(joined, groups, strict=True)}
    stream = copy_stream() if options.on_host else None

    def collect(output: Tensor, microbatch: Microbatch) -> list[Rows]:
        group = group_of[id(microbatch)]
        parts = _split_states(output, [read[index] for index in group], mesh)
        return [finish(rows, index) for rows, index in zip(parts, group, strict=True)]

    def finish(states: Tensor, index: int) -> Rows:
        if not read[index].has_students_labels:
            states = _exchange_states(states, read[index].microbatch, microbatches[index], mesh)
        rows = ShardedRows.from_replicated(states, mesh.tp)
        return rows if stream is None else HostRows(rows, stream)

    collected = Pipeline(chunks, mesh).forward_only(joined, hidden_states, collect)
    return [rows for part, group in zip(collected, groups, strict=True) for rows in part or [None] * len(group)]


def group_microbatches(microbatches: Sequence[Microbatch], most_tokens: int) -> list[list[int]]:
    """Return consecutive microbatches that are joined, by their indices. All ranks of the world must call it.

    Replicas have microbatches of other lengths, and wait for each other where they share experts: all have the same
    groups, by the longest of each. One that is longer by itself stays alone.
    """
    lengths = torch.stack([one.cu_seqlens[-1] for one in microbatches]).long()
    dist.all_reduce(lengths, op=dist.ReduceOp.MAX)
    groups: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(lengths.tolist()):
        if not groups or tokens + length > most_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += length
    return groups


def _split_states(output: Tensor, parts: Sequence[TeacherMicrobatch], mesh: Mesh) -> list[Tensor]:
    """Return the states at the labels of each of several microbatches, of which `output` has the tokens in order."""
    positions, start = [], 0
    for one in parts:
        positions.append(one.microbatch.label_positions + start)
        start += one.microbatch.input_ids.shape[1]
    states = label_rows(output, torch.cat(positions), mesh)
    if len(parts) == 1:
        return [states]
    # Copies, so that those of finished microbatches take no memory.
    return [rows.clone() for rows in states.split([len(one) for one in positions])]


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
