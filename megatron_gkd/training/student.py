"""The model in training: DDP-wrapped chunks with their optimizer, and the work of one step over a global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_gkd.config.schema import MemorySection, ParallelSection, TrainSection
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.models.megatron_model import MegatronModel, hidden_states
from megatron_gkd.models.pipeline import Pipeline
from megatron_gkd.teachers.base import TeacherSignal
from megatron_gkd.training.loss import SUMS, MicrobatchMetrics, Objective
from megatron_gkd.training.optimizer import base_learning_rate, build_optimizer, build_scheduler, step_if_finite

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads


class Student:
    """The model in training.

    Args:
        model: the model to train.
        objective: its loss.
        parallel: the recipe's section.
        train: the recipe's section.
        train_iters: number of steps of the learning-rate schedule.
        memory: the recipe's section; None: its defaults.

    Attributes:
        token_divergence: of the newest global batch, on the last pipeline stage: for each microbatch [N], one value for
            each of its labels on this rank.
    """

    def __init__(
        self,
        model: MegatronModel,
        objective: Objective,
        parallel: ParallelSection,
        train: TrainSection,
        train_iters: int,
        memory: MemorySection | None = None,
    ) -> None:
        memory = memory or MemorySection()
        self.model, self.objective, self.mesh = model, objective, model.mesh
        self.overlaps_param_gather = parallel.overlap_param_gather
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=memory.main_grads_dtype == "fp32",
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        self.chunks = [
            DistributedDataParallel(model.config, ddp_config, chunk.train(), disable_bucketing=index > 0)
            for index, chunk in enumerate(model.chunks)
        ]
        dtype = model.config.params_dtype
        self.optimizer = build_optimizer(
            self.chunks, train, memory, dtype=dtype, distributed=parallel.distributed_optimizer
        )
        self.scheduler = build_scheduler(self.optimizer, train, train_iters)
        self._connect_schedule(parallel)
        self.token_divergence: list[torch.Tensor] = []

    def _connect_schedule(self, parallel: ParallelSection) -> None:
        """Set what Megatron's schedules read from the model's configuration."""
        config = self.model.config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update; see `base_learning_rate`."""
        return base_learning_rate(self.optimizer)

    def compute_gradients(
        self,
        microbatches: Sequence[Microbatch],
        signals: Sequence[TeacherSignal | None],
        *,
        force_all_reduce: bool = False,
    ) -> dict[str, float]:
        """Run forward and backward over a global batch, and reduce the gradients. All ranks must call it.

        Args:
            microbatches: this rank's part of the global batch.
            signals: the teacher's signal for each microbatch; None without a teacher or on earlier stages.
            force_all_reduce: leave whole gradients on every rank, even with the distributed optimizer.

        Returns:
            The totals of `SUMS` over the global batch, the same on all ranks.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._totals(microbatches, signals, backward=True, force_all_reduce=force_all_reduce)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], signals: Sequence[TeacherSignal | None]) -> dict[str, float]:
        """Return the totals of `SUMS` over a global batch, in eval mode. All ranks must call it."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            return self._totals(microbatches, signals, backward=False)
        finally:
            for chunk in self.chunks:
                chunk.train()

    def update(self) -> float:
        """Clip the gradient, and step the optimizer and the learning rate. All ranks must call it.

        Returns:
            The gradient norm before clipping; NaN if it is not finite, in which case the parameters are not changed.
        """
        grad_norm = step_if_finite(self.optimizer)
        self.scheduler.step(1)
        return grad_norm

    def skip_update(self) -> None:
        """Step the learning rate alone: its schedule counts all steps."""
        self.scheduler.step(1)

    def gather_parameters(self) -> None:
        """Complete an overlapped parameter gather, before the weights are read."""
        if self.overlaps_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _totals(
        self,
        microbatches: Sequence[Microbatch],
        signals: Sequence[TeacherSignal | None],
        *,
        backward: bool,
        force_all_reduce: bool = False,
    ) -> dict[str, float]:
        head = self.model.head

        def loss(hidden: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor, MicrobatchMetrics]:
            if head is None:
                raise ValueError("only the last pipeline stage, which has the head, computes a loss")
            return self.objective(hidden, head, microbatches[index], signals[index])

        records = Pipeline(self.chunks, self.mesh).forward_backward(
            microbatches, hidden_states, loss, backward=backward, force_all_reduce=force_all_reduce
        )
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=microbatches[0].labels.device)
        for record in records:
            sums += record.sums
        self.token_divergence = [record.divergence for record in records]
        sums = self.mesh.sum_from_last_stage(sums)
        return dict(zip(SUMS, sums.tolist(), strict=True))
