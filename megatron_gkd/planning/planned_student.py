"""Measure the model in training on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.models.vision.parts import language_model
from megatron_gkd.planning.costs import ForwardCosts, ModelCosts, Traffic
from megatron_gkd.planning.microbatch import MicrobatchSize, PlannedMicrobatch
from megatron_gkd.planning.model_memory import (
    count_bytes,
    gradient_buffers,
    model_tensors,
    optimizer_tensors,
    parameters_of,
)
from megatron_gkd.planning.recipe_models import RecipeModels
from megatron_gkd.planning.schedule import StepCosts, run_schedule
from megatron_gkd.planning.trace import Finish, Passes, Trace
from megatron_gkd.planning.trace_cache import TraceCache
from megatron_gkd.planning.transfers import Links, by_link, traffic_of
from megatron_gkd.planning.update import trace_update
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import TeacherSignal
from megatron_gkd.training.build import build_student
from megatron_gkd.training.student import Student


@dataclass(frozen=True)
class PlannedStudent:
    """The student of one rank.

    Attributes:
        models: the recipe's.
        student: the student.
        links: of the process groups.
        cache: traces of other ranks.
    """

    models: RecipeModels
    student: Student
    links: Links
    cache: TraceCache = field(repr=False)

    @classmethod
    def build(cls, models: RecipeModels, mesh: Mesh, links: Links, cache: TraceCache) -> PlannedStudent:
        """Build the student as a run does.

        Raises:
            UserError: it can't be built with this layout.
        """
        student = build_student(models.recipe, mesh, models.student, models.vocab_size, train_iters=1)
        for chunk in student.chunks:
            if chunk.ddp_config.overlap_param_gather:  # otherwise the traces would gather parameters
                chunk.disable_forward_pre_hook(param_sync=False)
        return cls(models, student, links, cache)

    def measure(self, signal: TeacherSignal | None, resident: Sequence[Tensor]) -> tuple[ModelCosts, list[Traffic]]:
        """Return the student's costs, and the traffic of its passes and its update.

        Args:
            signal: a teacher's for one microbatch; None without a teacher and before the last stage.
            resident: the tensors of the signal.
        """
        model, student = self.student.model, self.student
        microbatch = new_microbatch(model, self.models.student_size())
        passes = Passes(microbatch, self._finish(microbatch, signal), True, self.links, resident)
        traces = self.cache.trace("student", model, passes, [chunk.no_sync for chunk in student.chunks])
        step = run_schedule(model, traces, microbatch, self.models.microbatches, backward=True)
        update = trace_update(student)
        traffic = [
            *traffic_of_passes(traces, self.models.microbatches),
            *traffic_of("student", by_link(step.messages, self.links)),
            *traffic_of("student", by_link(update.reduction, self.links)),
            *traffic_of("update", by_link(update.update, self.links)),
        ]
        return self._costs(traces, step, update.transient), traffic

    def _finish(self, microbatch: PlannedMicrobatch, signal: TeacherSignal | None) -> Finish | None:
        head = self.student.model.head
        if head is None:
            return None

        def finish(hidden: Tensor) -> Tensor:
            total, _, _ = self.student.objective(hidden, head, microbatch, signal)
            return total

        return finish

    def _costs(self, traces: list[Trace], step: StepCosts, update: int) -> ModelCosts:
        model, student = self.student.model, self.student
        parameters, own = parameters_of(model), model_tensors(model)
        gradients = gradient_buffers(student)
        on_device, on_host = optimizer_tensors(student)
        weights = count_bytes(own)
        return ModelCosts(
            parameters=sum(one.numel() for one in parameters),
            trainable=sum(one.numel() for one in parameters if one.requires_grad),
            layers=count_layers(model),
            weights=weights,
            weights_resident=weights,
            weights_host=0,
            gradients=count_bytes(gradients),
            optimizer=count_bytes(on_device, beside=[*own, *gradients]),
            optimizer_host=count_bytes(on_host, beside=own),
            update=update,
            forward=forward_costs(traces, step, self.models.microbatches, self.models.student_size().tokens),
        )


def new_microbatch(model: MegatronModel, size: MicrobatchSize) -> PlannedMicrobatch:
    """Return a microbatch that a model can read."""
    config: Any = model.config
    axes = 3 if config.position_embedding_type == "mrope" else 1
    return PlannedMicrobatch.from_size(size, model.mesh.layout, axes if model.checkpoint.has_images else 0)


def forward_costs(traces: list[Trace], step: StepCosts, count: int, tokens: int) -> ForwardCosts:
    """Return the costs of a step's microbatches.

    Args:
        traces: of each chunk.
        step: of all microbatches.
        count: number of microbatches.
        tokens: of each.
    """
    return ForwardCosts(
        kept=sum(one.kept for one in traces),
        transient=max(max(one.forward_transient, one.backward_transient) for one in traces),
        in_flight=step.in_flight,
        loss=max(one.loss for one in traces),
        peak=step.peak,
        forward_flops=sum(one.forward_flops for one in traces),
        backward_flops=sum(one.backward_flops for one in traces),
        loss_flops=sum(one.loss_flops for one in traces),
        microbatches=count,
        microbatch_tokens=tokens,
    )


def count_layers(model: MegatronModel) -> int:
    """Return the number of decoder layers of all chunks."""
    return sum(len(language_model(chunk).decoder.layers) for chunk in model.chunks)


def traffic_of_passes(traces: list[Trace], count: int) -> list[Traffic]:
    """Return the traffic of the student's passes over so many microbatches."""
    return [one for trace in traces for one in traffic_of("student", trace.collectives, count)]
