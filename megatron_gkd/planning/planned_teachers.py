"""Measure the teachers on one rank, and make the signals that the student's loss gets of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.checkpoint_format.cache_manifest import Manifest
from megatron_gkd.config.schema import OneTeacher
from megatron_gkd.errors import UserError
from megatron_gkd.models.label_rows import label_rows
from megatron_gkd.models.megatron_model import MegatronModel, in_eval_mode
from megatron_gkd.models.sharded_rows import ShardedRows
from megatron_gkd.models.vocabulary import reshard_head
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.topk import TopK
from megatron_gkd.planning.costs import ModelCosts, Traffic
from megatron_gkd.planning.microbatch import PlannedMicrobatch
from megatron_gkd.planning.model_memory import count_bytes, model_tensors, parameters_of
from megatron_gkd.planning.planned_student import PlannedStudent, count_layers, forward_costs, new_microbatch
from megatron_gkd.planning.schedule import run_schedule
from megatron_gkd.planning.trace import Passes
from megatron_gkd.planning.trace_cache import TraceCache
from megatron_gkd.planning.transfers import Links, by_link, traffic_of
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Hidden
from megatron_gkd.training.build import load_model
from megatron_gkd.training.model_options import has_fp8_of_student, teacher_options


@dataclass(frozen=True)
class PlannedTeacher:
    """What a teacher costs on one rank.

    Attributes:
        costs: of its model; None where it is none of this run's.
        traffic: of its forward passes.
        signal: for one microbatch of the student; None before the last stage.
        num_labels: of the signal.
    """

    costs: ModelCosts | None
    traffic: tuple[Traffic, ...]
    signal: Hidden | TopK | None
    num_labels: int

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the signal."""
        return [] if self.signal is None else tensors_of_signal(self.signal)

    @property
    def states(self) -> int:
        """Bytes of the signal of a microbatch that are not the teacher's weights."""
        return count_bytes(self.tensors[:1] if isinstance(self.signal, Hidden) else self.tensors)

    def of_labels(self, count: int) -> Hidden | TopK:
        """Return the signal of fewer labels."""
        if isinstance(self.signal, Hidden):
            states = self.signal.states
            return replace(self.signal, states=_empty_states(states.shard, count, states.group))
        if self.signal is None:
            raise ValueError("the teacher has no signal on this stage")
        return self.signal[:count]


def tensors_of_signal(signal: Hidden | TopK) -> list[Tensor]:
    """Return the tensors of a signal, its states first."""
    if isinstance(signal, TopK):
        return [signal.ids, signal.values, *([] if signal.tail is None else [signal.tail])]
    return [signal.states.shard, *_tensors_of(signal.head)]


def _empty_states(like: Tensor, count: int, group: dist.ProcessGroup) -> ShardedRows:
    """Return states of so many labels, with the width and the dtype of `like`."""
    return ShardedRows(like.new_empty(-(-count // group.size()), like.shape[1]), count, group)


@dataclass(frozen=True)
class _Weights:
    """Where a teacher's weights are; see `ModelCosts`."""

    used: int
    resident: int
    host: int


@dataclass(frozen=True)
class TeacherPlanner:
    """Measures the teachers of one rank.

    Attributes:
        student: of the rank.
        mesh: of the rank.
        links: of the process groups.
        cache: traces of other ranks.
    """

    student: PlannedStudent
    mesh: Mesh
    links: Links
    cache: TraceCache = field(repr=False)

    def measure(self, place: str, teacher: OneTeacher) -> PlannedTeacher | None:
        """Return the costs of the teacher at a key of the recipe; None where there is none.

        Raises:
            UserError: it can't be built with this layout.
        """
        match teacher.source:
            case "local" if self._is_base_of_student(place, teacher):
                return self._measure_self(place, teacher)
            case "local":
                return self._measure_local(place, teacher)
            case "self":
                return self._measure_self(place, teacher)
            case "server" | "cache":
                return self._top_k(place, teacher)
        return None

    def _is_base_of_student(self, place: str, teacher: OneTeacher) -> bool:
        models = self.student.models
        is_same = models.teachers[place].has_weights_of(models.student)
        return models.recipe.lora is not None and is_same and has_fp8_of_student(teacher, models.recipe)

    def _measure_local(self, place: str, teacher: OneTeacher) -> PlannedTeacher:
        models = self.student.models
        options = teacher_options(models.recipe, place, teacher)
        model = load_model(f"the teacher {teacher.teacher_model}", models.teachers[place], self.mesh, options)
        for chunk in model.chunks:
            chunk.eval().requires_grad_(False)
        rows = -(-models.student.vocab_size // self.mesh.tp.size())
        head = None if model.head is None else reshard_head(model.head, rows, self.mesh.tp)
        own = model_tensors(model)
        weights, copied = count_bytes(own), 0 if head is None else count_bytes(_tensors_of(head), beside=own)
        stays = 0
        if head is not None and not copied:
            stays = count_bytes(_tensors_of(head))
        place_of_weights = _Weights(weights + copied, weights + copied, 0)
        if teacher.offload_teacher_model:
            place_of_weights = _Weights(weights + copied, stays + copied, weights - stays)
        return self._measure(place, teacher, model, head, place_of_weights)

    def _measure_self(self, place: str, teacher: OneTeacher) -> PlannedTeacher:
        """Measure a teacher that computes with the student's modules."""
        model = self.student.student.model
        head = None if model.head is None else model.head.detach()
        trained = [parameter for parameter in parameters_of(model) if parameter.requires_grad]
        keeps_copies = teacher.teacher_ema is not None or (
            teacher.source == "self" and teacher.teacher_model is not None
        )
        weights = _Weights(0, 0, 0)
        if keeps_copies and not (model.adapters is not None and teacher.teacher_ema is None):
            own = sum(parameter.nbytes for parameter in trained)
            averages = sum(4 * parameter.numel() for parameter in trained)
            head = None if head is None else head.clone()
            copied = 0 if head is None else count_bytes(_tensors_of(head))
            weights = _Weights(copied, copied, own + (own if teacher.teacher_ema is None else averages))
        with in_eval_mode(model.chunks):
            return self._measure(place, teacher, model, head, weights)

    def _measure(
        self, place: str, teacher: OneTeacher, model: MegatronModel, head: OutputHead | None, weights: _Weights
    ) -> PlannedTeacher:
        models = self.student.models
        size, count = models.teacher_size(teacher)
        microbatch = new_microbatch(model, size)

        def collect(hidden: Tensor) -> Tensor:
            return ShardedRows.from_replicated(
                label_rows(hidden, microbatch.label_positions, self.mesh), self.mesh.tp
            ).shard

        passes = Passes(microbatch, None if head is None else collect, False, self.links)
        traces = self.cache.trace(place, model, passes)
        step = run_schedule(model, traces, microbatch, count, backward=False)
        parameters = [] if model is self.student.student.model else parameters_of(model)
        costs = ModelCosts(
            parameters=sum(one.numel() for one in parameters),
            trainable=0,
            layers=count_layers(model),
            weights=weights.used,
            weights_resident=weights.resident,
            weights_host=weights.host,
            gradients=0,
            optimizer=0,
            optimizer_host=0,
            update=0,
            forward=replace(forward_costs(traces, step, count, size.tokens), kept=0, in_flight=1.0, loss=0),
        )
        traffic = [one for trace in traces for one in traffic_of("teacher", trace.collectives, count)]
        traffic += traffic_of("teacher", by_link(step.messages, self.links))
        signal = None if head is None else Hidden(_empty_states(head.weight, self._labels(), self.mesh.tp), head)
        return PlannedTeacher(costs, tuple(traffic), signal, self._labels())

    def _top_k(self, place: str, teacher: OneTeacher) -> PlannedTeacher:
        """Return the signal of a teacher that is elsewhere: the most likely tokens, and the mass of the others."""
        if not self.mesh.is_last_stage:
            return PlannedTeacher(None, (), None, 0)
        rows, device = self._labels(), portability.device()
        ids = torch.empty(rows, self._num_tokens(place, teacher), dtype=torch.int64, device=device)
        values = torch.empty(ids.shape, dtype=torch.float32, device=device)
        tail = torch.empty(rows, dtype=torch.float32, device=device)
        signal = TopK(ids, values, tail, self.student.models.recipe.distill.temperature)
        return PlannedTeacher(None, (), signal, rows)

    def _num_tokens(self, place: str, teacher: OneTeacher) -> int:
        """Return the number of tokens of each distribution: of a cache, all that it has where the recipe names none."""
        k = self.student.models.recipe.distill.gkd_logits_topk
        if k is not None or teacher.teacher_cache is None:
            return k or 1
        try:
            return Manifest.read(teacher.teacher_cache).k
        except ValueError as problem:
            raise UserError(
                f"distill.gkd_logits_topk = null: must be set to plan with {place}.teacher_cache = "
                f"{teacher.teacher_cache}, which can't be read: {problem}"
            ) from problem

    def _labels(self) -> int:
        """Return the number of labels of one of the student's microbatches on this rank."""
        size = self.student.models.student_size()
        return PlannedMicrobatch.from_size(size, self.mesh.layout).local_labels


def _tensors_of(head: OutputHead) -> Iterator[Tensor]:
    yield head.weight.detach()
    if head.bias is not None:
        yield head.bias.detach()
