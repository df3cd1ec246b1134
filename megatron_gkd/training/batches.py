"""The microbatches of each step: rows of the dataset, or rows that the student has just sampled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_gkd.data.loader import StepLoader
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import FROM_DATASET
from megatron_gkd.data.streams.streamed_rows import StreamedRows
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.agreement import run_on_all
from megatron_gkd.runtime.current_phase import in_phase
from megatron_gkd.teachers.base import ScoresAhead, TeacherSource
from megatron_gkd.training.metrics import describe_rollouts
from megatron_gkd.training.on_policy import Rollouts
from megatron_gkd.training.rollout_report import RolloutReport
from megatron_gkd.training.student import Student

Batch = list[Microbatch] | None
"""The microbatches of a step; None where the student samples them."""


class AgreedBatches:
    """Batches of which a failure on one rank is raised on all ranks, which would wait for it in the step.

    Images are decoded on some ranks alone, and the processes that prepare batches may be killed on any.

    Args:
        loader: of this rank; all ranks have as many steps, and iterate together.
    """

    def __init__(self, loader: StepLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        for _ in range(len(self._loader)):
            yield run_on_all(lambda: next(batches))


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    Attributes:
        batches: the microbatches of one step after the other; None for a step that `rollouts` makes.
        validation: the microbatches of the validation rows; None without validation.
        rollouts: makes the steps in which the student samples; None where it never does.
        stream: where the rows are read while training; None where they are tokenized.
    """

    batches: Iterable[Batch]
    validation: Iterable[Batch] | None = None
    rollouts: Rollouts | None = None
    stream: StreamedRows | None = None


@dataclass(frozen=True)
class StepBatch:
    """The microbatches of one step, on the device.

    Attributes:
        report: how the student sampled them; None where all rows are the dataset's.
        sync_seconds: time that the rollout engine took to get the student's weights.
        probed_mismatch_kl: `mismatch_kl` of a few rows sampled from the newest weights, where it was measured.
    """

    microbatches: list[Microbatch]
    report: RolloutReport | None = None
    sync_seconds: float = 0.0
    probed_mismatch_kl: float | None = None

    def describe(self, totals: dict[str, float]) -> dict[str, Any]:
        """Return the part of the step's record about the source of its rows. `totals`: see `loss.SUMS`."""
        if self.report is None:
            return {"source": FROM_DATASET}
        return describe_rollouts(self.report, totals, self.sync_seconds)


def announce_ahead(batches: Iterable[Batch], teacher: TeacherSource | None) -> Iterator[Batch]:
    """Yield the batches unchanged, each once the teacher has the rows of the next one, if it can score ahead.

    So a step's rows are scored while the student trains on those before, or samples. Rows that it samples (None) are
    not known yet.
    """
    if teacher is None or not isinstance(teacher, ScoresAhead):
        yield from batches
        return

    def announced() -> Iterator[Batch]:
        for batch in batches:
            teacher.begin(sample for microbatch in batch or () for sample in microbatch.samples)
            yield batch

    for batch, _ in itertools.pairwise(itertools.chain(announced(), [None])):
        yield batch


def prepare_batch(step: int, microbatches: Batch, rollouts: Rollouts | None, student: Student) -> StepBatch:
    """Return the batch of `step`, and start to sample the next one where that is done ahead. All ranks must call it.

    Args:
        step: number of the step.
        microbatches: the dataset's for this step; None where the student samples.
        rollouts: of the run.
        student: as it is before the step.
    """
    if rollouts is None:
        if microbatches is None:
            raise ValueError(f"step {step} has no microbatches, and the run has no rollouts")
        return StepBatch(_to_device(microbatches))
    report, sync_seconds, probed = None, 0.0, None
    if microbatches is None:
        if not rollouts.has_begun(step):
            sync_seconds += _sync_weights(rollouts, student, step)
        with in_phase("rollout"):
            microbatches, report = rollouts.microbatches(step)
    if rollouts.is_early(step + 1):
        sync_seconds += _sync_weights(rollouts, student, step)
        with in_phase("rollout"):
            probed = rollouts.probe_mismatch(student, step + 1)
            rollouts.begin(step + 1)
    return StepBatch(_to_device(microbatches), report, sync_seconds, probed)


def _sync_weights(rollouts: Rollouts, student: Student, step: int) -> float:
    with in_phase("weight_sync"):
        return rollouts.load_weights(student, version=step - 1)  # the updates before this step


def _to_device(microbatches: Iterable[Microbatch]) -> list[Microbatch]:
    return [microbatch.to(portability.device()) for microbatch in microbatches]
