"""Trace what follows on a step's microbatches: the reduction of the gradients, and the optimizer's update."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from megatron_gkd.planning.model_memory import gradient_buffers, model_tensors, optimizer_tensors
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.meta_device.optimizers import allocate_like_kernels
from megatron_gkd.runtime.meta_device.values import ReadingOnes
from megatron_gkd.runtime.meter import Collective, Meter
from megatron_gkd.training.loss import SUMS
from megatron_gkd.training.optimizer import step_if_finite
from megatron_gkd.training.optimizer_state import adams
from megatron_gkd.training.student import Student

from megatron.core.distributed import finalize_model_grads


@dataclass(frozen=True)
class UpdateTrace:
    """What an update costs.

    Attributes:
        transient: most bytes beside the model, its gradients and the optimizer's state.
        reduction: collectives that reduce the gradients.
        update: collectives of the gradient's norm, and those that gather the parameters.
    """

    transient: int
    reduction: Counter[Collective] = field(repr=False)
    update: Counter[Collective] = field(repr=False)


def trace_update(student: Student) -> UpdateTrace:
    """Reduce gradients and update the parameters, after the chunks were traced. The optimizer then has its state."""
    device = portability.device().type
    reducing = Meter(device)
    with reducing:
        for chunk in student.chunks:
            if chunk.ddp_config.overlap_grad_reduce:
                chunk.start_grad_sync()
        # The number of tokens alone has a value, which the gradients are divided by.
        finalize_model_grads(student.chunks, torch.ones((), dtype=torch.int32, device="cpu"))
        student.mesh.sum_from_last_stage(torch.empty(len(SUMS), dtype=torch.float64, device=device))
    with ReadingOnes():
        step_if_finite(student.optimizer)  # makes the state
        for adam in adams(student.optimizer):
            for one in (*getattr(adam, "cpu_optimizers", ()), getattr(adam, "gpu_optimizer", adam)):
                if one is not None:
                    allocate_like_kernels(one)
        updating = Meter(device)
        updating.track(model_tensors(student.model), gradient_buffers(student), optimizer_tensors(student))
        before = updating.live
        updating.reset_peak()
        with updating:
            step_if_finite(student.optimizer)
            student.gather_parameters()
    return UpdateTrace(updating.peak - before, reducing.collectives, updating.collectives)
