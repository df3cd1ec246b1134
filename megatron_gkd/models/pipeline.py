"""Run Megatron's pipeline schedules over lists of microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.runtime.current_phase import note_progress
from megatron_gkd.runtime.mesh import Mesh

from megatron.core.pipeline_parallel import get_forward_backward_func

M = TypeVar("M", bound=Microbatch)

Forward = Callable[[nn.Module, M], Tensor]
Loss = Callable[[Tensor, int], tuple[Tensor, Tensor, Any]]
"""Of the last stage's output for the microbatch of this index: (sum of losses, number of tokens, record)."""
Step = Callable[[Iterator[int], nn.Module], tuple[Tensor, Callable]]


@dataclass(frozen=True)
class Pipeline:
    """The chunks of a model on this rank and the mesh over which they run.

    Attributes:
        chunks: one, or one for each virtual pipeline stage.
        mesh: the process groups.
    """

    chunks: Sequence[nn.Module]
    mesh: Mesh

    def forward_backward(
        self,
        microbatches: Sequence[M],
        forward: Forward[M],
        loss: Loss,
        *,
        backward: bool = True,
        force_all_reduce: bool = False,
    ) -> list[Any]:
        """Run 1F1B, or the interleaved schedule if there are virtual stages.

        Args:
            microbatches: as many in every replica.
            forward: computes a chunk's output.
            loss: called on the last pipeline stage.
            backward: whether to compute gradients.
            force_all_reduce: leave whole gradients on every rank, even under the distributed optimizer.

        Returns:
            The records of `loss` on the last pipeline stage, an empty list elsewhere.
        """

        def step(indices: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Callable]:
            index = next(indices)
            note_progress()
            return forward(chunk, microbatches[index]), partial(_call_with_index, loss, index)

        return self._run(microbatches, step, forward_only=not backward, force_all_reduce=force_all_reduce)

    def forward_only(
        self, microbatches: Sequence[M], forward: Forward[M], collect: Callable[[Tensor, M], Any]
    ) -> list[Any]:
        """Run forward passes alone.

        Returns:
            For each microbatch, `collect(output, microbatch)` on the last pipeline stage, None elsewhere.
        """

        def step(indices: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Callable]:
            index = next(indices)
            note_progress()

            def call_collect(output: Tensor, non_loss_data: bool = True) -> Any:
                return collect(output, microbatches[index])

            return forward(chunk, microbatches[index]), call_collect

        collected = self._run(microbatches, step, forward_only=True, collect_non_loss_data=True)
        return collected or [None] * len(microbatches)

    def _run(self, microbatches: Sequence[Microbatch], step: Step, **options: Any) -> list[Any]:
        chunks = list(self.chunks)
        is_interleaved = len(chunks) > 1
        schedule = get_forward_backward_func(
            pp_size=self.mesh.pp.size(), vp_size=len(chunks) if is_interleaved else None
        )
        indices = [iter(range(len(microbatches))) for _ in chunks]
        return schedule(
            forward_step_func=step,
            data_iterator=indices if is_interleaved else indices[0],
            model=chunks if is_interleaved else chunks[0],
            num_microbatches=len(microbatches),
            # The length of every microbatch if interleaved; otherwise shapes are sent with the tensors.
            seq_length=microbatches[0].total_length,
            micro_batch_size=1,
            **options,
        )


def _call_with_index(loss: Loss, index: int, output: Tensor) -> tuple[Tensor, Tensor, Any]:
    return loss(output, index)
