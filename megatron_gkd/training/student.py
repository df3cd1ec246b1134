"""The model in training: DDP-wrapped chunks, their optimizer, and one step over a global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.models.megatron_model import MegatronModel, hidden_states
from megatron_gkd.models.pipeline import forward_backward
from megatron_gkd.teachers.base import TeacherSignal
from megatron_gkd.training.loss import SUMS, Objective
from megatron_gkd.training.optimizer import build_optimizer, build_scheduler, step_if_finite


class Student:
    """`parallel` and `train` are the recipe's sections."""

    def __init__(self, model: MegatronModel, objective: Objective, parallel, train, train_iters: int) -> None:
        self.model, self.objective, self.mesh = model, objective, model.mesh
        self.overlaps_param_gather = parallel.overlap_param_gather
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        self.chunks = [
            DistributedDataParallel(model.config, ddp_config, chunk.train(), disable_bucketing=index > 0)
            for index, chunk in enumerate(model.chunks)
        ]
        dtype = model.config.params_dtype
        self.optimizer = build_optimizer(self.chunks, train, dtype=dtype, distributed=parallel.distributed_optimizer)
        self.scheduler = build_scheduler(self.optimizer, train, train_iters)
        self._connect_schedule(parallel)
        self.token_divergence: list[torch.Tensor] = []
        """Of the newest global batch, on the last pipeline stage: [N] a microbatch, one for each of its labels here."""

    def _connect_schedule(self, parallel) -> None:
        """What Megatron's schedules read from the model's configuration."""
        config = self.model.config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @property
    def learning_rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def compute_gradients(
        self,
        microbatches: Sequence[Microbatch],
        signals: Sequence[TeacherSignal | None],
        *,
        force_all_reduce: bool = False,
    ) -> dict[str, float]:
        """Forward and backward over a global batch, down to reduced gradients. Returns the totals of `SUMS`."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._totals(microbatches, signals, backward=True, force_all_reduce=force_all_reduce)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], signals: Sequence[TeacherSignal | None]) -> dict[str, float]:
        """The totals of `SUMS` over a global batch, in eval mode, without gradients."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            return self._totals(microbatches, signals, backward=False)
        finally:
            for chunk in self.chunks:
                chunk.train()

    def update(self) -> float:
        """Clip, step the optimizer and the learning rate. All ranks must call it.

        Returns:
            The gradient's norm before clipping; NaN if it is not finite, in which case the parameters are not changed.
        """
        grad_norm = step_if_finite(self.optimizer)
        self.scheduler.step(1)
        return grad_norm

    def skip_update(self) -> None:
        """Step the learning rate alone: its schedule counts steps, whatever becomes of them."""
        self.scheduler.step(1)

    def gather_parameters(self) -> None:
        """Complete what an overlapped parameter gather has left open, before the weights are read."""
        if self.overlaps_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _totals(self, microbatches, signals, **options) -> dict[str, float]:
        head = self.model.head_weight

        def loss(hidden, index):
            return self.objective(hidden, head, microbatches[index], signals[index])

        records = forward_backward(self.chunks, microbatches, hidden_states, loss, self.mesh, **options)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=microbatches[0].labels.device)
        for record in records:
            sums += record.sums
        self.token_divergence = [record.divergence for record in records]
        sums = self.mesh.sum_from_last_stage(sums)
        return dict(zip(SUMS, sums.tolist(), strict=True))
