"""The costs of one step on one rank, as they are measured on modules without memory.

Bytes are of this rank, and of the device where nothing else is said. FLOPs are those of matrix products and attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["teacher", "student", "update", "weight_sync"]
Link = Literal["tp", "pp", "cp", "ep", "etp", "dp", "expert_dp"]
Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]


@dataclass(frozen=True)
class MeasureOptions:
    """What a plan assumes beside the recipe.

    Attributes:
        microbatch_tokens: tokens of a microbatch over all context-parallel ranks; None: `train.micro_batch_size` rows
            of `data.max_length`, one with packing.
        label_fraction: share of the tokens that are trained on.
        expert_imbalance: how many times the mean number of tokens the busiest expert-parallel rank gets.
        transformer_engine: whether the run has Transformer Engine; without it the PyTorch fallback computes.
    """

    microbatch_tokens: int | None = None
    label_fraction: float = 1.0
    expert_imbalance: float = 1.5
    transformer_engine: bool = True


@dataclass(frozen=True)
class Traffic:
    """Equal collective operations, or messages between ranks, of one rank in one step.

    Attributes:
        phase: the part of the step.
        link: the process group; `etp` for expert tensor parallelism, also where it is joined with `ep`.
        group_size: number of ranks in it.
        operation: the kind of operation.
        num_bytes: bytes of one operation, whole: the output of a gather, the input of a scatter or an all-to-all,
            either side of an all-reduce, the message of a send.
        count: number of operations in a step.
    """

    phase: Phase
    link: Link
    group_size: int
    operation: Operation
    num_bytes: int
    count: int


@dataclass(frozen=True)
class ForwardCosts:
    """The costs of a model's microbatches on one rank.

    Attributes:
        kept: bytes that the forward pass of one microbatch leaves for its backward pass, over all of this rank's model
            chunks; 0 for a teacher.
        transient: most bytes beside what is kept, during the forward or backward pass of one microbatch.
        in_flight: microbatches that are kept at the same time, from the pipeline's schedule; those of an interleaved
            schedule count by the share of the chunks that are kept.
        loss: most bytes of the loss of one microbatch beside what is kept: 0 before the last stage.
        peak: most bytes of all activations of a step at the same time, from a run of the pipeline's schedule: what is
            kept, transient and of the loss, and the tensors between stages. No smaller than `kept` times `in_flight`.
        forward_flops: of one microbatch.
        backward_flops: of one microbatch, with what is recomputed.
        loss_flops: of the head and the loss of one microbatch, forward and backward: 0 before the last stage.
        microbatches: number in a step.
        microbatch_tokens: tokens of each, over all context-parallel ranks.
    """

    kept: int
    transient: int
    in_flight: float
    loss: int
    peak: int
    forward_flops: float
    backward_flops: float
    loss_flops: float
    microbatches: int
    microbatch_tokens: int


@dataclass(frozen=True)
class ModelCosts:
    """What a model holds on one rank.

    Attributes:
        parameters: number of parameters of this rank's shards.
        trainable: how many of them are trained.
        layers: number of decoder layers.
        weights: bytes of the parameters on the device while the model computes; 0 for a teacher that computes with
            the student's own.
        weights_resident: how many of them stay there in other phases: of an offloaded teacher its head alone.
        weights_host: bytes of weights in page-locked host memory: those of an offloaded teacher, and the copies of
            self-distillation.
        gradients: bytes of the gradients' buffers; 0 for a teacher.
        optimizer: bytes of the optimizer's state on the device.
        optimizer_host: bytes of the optimizer's state in host memory.
        update: most bytes beside all others while the optimizer updates the weights.
        forward: the costs of its microbatches.
    """

    parameters: int
    trainable: int
    layers: int
    weights: int
    weights_resident: int
    weights_host: int
    gradients: int
    optimizer: int
    optimizer_host: int
    update: int
    forward: ForwardCosts


@dataclass(frozen=True)
class RankCosts:
    """The costs of one step on one rank, which stands for all ranks of its pipeline stage.

    Attributes:
        rank: of the world.
        stage: its pipeline stage.
        num_ranks: ranks of the stage.
        student: the model in training.
        teachers: the local and self-teachers, by their keys in the recipe.
        teacher_states: bytes of the teachers' hidden states of a step, where they wait for the student.
        traffic: all communication of a step.
        notes: what is not counted, in whole sentences.
    """

    rank: int
    stage: int
    num_ranks: int
    student: ModelCosts
    teachers: dict[str, ModelCosts] = field(default_factory=dict)
    teacher_states: int = 0
    traffic: tuple[Traffic, ...] = ()
    notes: tuple[str, ...] = ()
