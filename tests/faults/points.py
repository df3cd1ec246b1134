"""Where a run can be killed, and the choice of such points by a seed. Needs neither torch nor Megatron."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Moment = Literal["before", "inside", "after", "half record", "half text", "half removed", "time"]
_PACKAGE = "megatron_gkd."


@dataclass(frozen=True)
class Point:
    """A place in the program.

    Attributes:
        kind: of work that is interrupted.
        name: of the place, within the kind; see `find`.
        target: the function, as `module:name` or `module:Class.name`.
        moment: before its call, inside it, after it; or with only a part of what it writes or removes.
        only: text in its first argument, in calls that count.
        most_calls: the call is drawn from the first so many in the chosen step or later.
        seconds: that the function takes, where a launch has not called it before: see `Kill.share`.
        in_main: only rank 0 comes here.
        needs: a word in `Configuration.has`, without which a run never comes here.
        phase: "resume" comes before the first step of a launch that goes on from a checkpoint, "end" after the last.
    """

    kind: str
    name: str
    target: str = ""
    moment: Moment = "before"
    only: str = ""
    most_calls: int = 1
    seconds: float = 0.02
    in_main: bool = False
    needs: str = ""
    phase: Literal["resume", "steps", "end", "any"] = "steps"


def _point(kind: str, name: str, target: str, moment: Moment = "before", **more) -> Point:
    is_foreign = target.startswith(("shutil:", "pathlib:", "megatron.core."))
    return Point(kind, name, target if is_foreign else _PACKAGE + target, moment, **more)


_TRAINER, _STUDENT = "training.trainer:Trainer", "training.student:Student"
_SAVING = "training.checkpointing."
_FOLDER = _SAVING + "folder"
_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"

POINTS = (
    _point("step", "in the forward and backward passes", f"{_STUDENT}.compute_gradients", "inside"),
    _point("step", "before the update", f"{_STUDENT}.update"),
    _point("step", "in the update", f"{_STUDENT}.update", "inside"),
    _point("step", "after the update, before its record", f"{_TRAINER}.write"),
    _point("step", "while the teacher scores", f"{_TRAINER}.score", "inside"),
    _point("saving", "before the snapshot", f"{_SAVING}saver:Saver.save"),
    _point("saving", "in the snapshot", f"{_SAVING}saver:Saver.save", "inside"),
    _point("saving", "half of run.json written", "pathlib:Path.write_text", "half text", only="run.json", in_main=True),
    _point("saving", "in the writer's thread", f"{_WRITER}.write_preloaded_data", "inside"),
    _point("saving", "a share written, without its digest", f"{_WRITER}.write_preloaded_data", "after"),
    _point("saving", "all shares written, no metadata", f"{_SAVING}saver:Saver._publish"),
    _point("publishing", "in the exchange of digests", f"{_SAVING}saver:Saver._publish", "inside"),
    _point("publishing", "before the manifest", f"{_FOLDER}:CheckpointFolder.publish", in_main=True),
    _point(
        "publishing", "half of the manifest written", "pathlib:Path.write_text", "half text", only="manifest.json",
        in_main=True,
    ),
    _point("publishing", "between manifest and rename", f"{_FOLDER}:publish", only="unfinished", in_main=True),
    _point("publishing", "the link last made, not put in its place", "pathlib:Path.replace", only="last.new",
           in_main=True),
    _point("publishing", "renamed, older ones not deleted", f"{_FOLDER}:CheckpointFolder.remove_old", in_main=True),
    _point("publishing", "an older one half deleted", "shutil:rmtree", "half removed", only="checkpoints/step-",
           in_main=True),
    _point("publishing", "just published", f"{_FOLDER}:CheckpointFolder.publish", "after", in_main=True),
    _point("records", "half of a record in metrics.jsonl", "reporting.metrics_log:MetricsLog.write", "half record",
           in_main=True),
    _point("records", "metrics.jsonl written, not completions.jsonl", "reporting.metrics_log:MetricsLog.write", "after",
           in_main=True),
    _point("records", "half of the records in completions.jsonl", "reporting.completions_log:CompletionsLog.write",
           "half record", in_main=True, needs="completions"),
    _point("records", "before the rows of a bad step", "training.bad_steps:BadSteps.record", needs="bad steps"),
    _point("rollout", "in a forward pass", "rollout.megatron.engine:MegatronEngine._forward", "inside", most_calls=6,
           needs="embedded engine"),
    _point("rollout", "before the completions' exchange", "training.completion_sampler:CompletionSampler.gather",
           most_calls=3, needs="rollouts"),
    _point("rollout", "while servers sample", "rollout.vllm.server:VllmServerEngine._complete", "inside",
           needs="servers"),
    _point("rollout", "in the writing of weights", "rollout.vllm.weight_folder:WeightFolder.write", "inside",
           in_main=True, needs="servers"),
    _point("rollout", "weights written, not loaded", "rollout.vllm.weight_folder:WeightFolder.write", "after",
           in_main=True, needs="servers"),
    _point("rollout", "a server paused", "rollout.vllm.client:StudentServer.pause", "after", in_main=True,
           needs="servers"),
    _point("rollout", "a server resumed, without its label", "rollout.vllm.client:StudentServer.set_label",
           in_main=True, needs="servers"),
    _point("rollout", "while a save waits for samples", "training.on_policy:Rollouts.progress", "inside",
           needs="rollouts"),
    _point("validation", "before it", f"{_TRAINER}.validate", needs="validation"),
    _point("validation", "in a batch", f"{_STUDENT}.evaluate", "inside", most_calls=2, needs="validation"),
    _point("validation", "after its record", f"{_TRAINER}.validate", "after", needs="validation"),
    _point("resume", "before leftovers are removed", f"{_FOLDER}:CheckpointFolder.remove_leftovers", in_main=True,
           phase="resume"),
    _point("resume", "in the verification", f"{_SAVING}loader:find_damage", "inside", phase="resume"),
    _point("resume", "student not built", "training.assemble:build_student", phase="resume"),
    _point("resume", "before the load", "training.assemble:load", phase="resume"),
    _point("resume", "weights loaded, moments not", f"{_OPTIMIZER}.load_state_dict", phase="resume"),
    _point("resume", "in the load", "training.assemble:load", "inside", seconds=0.1, phase="resume"),
    _point("resume", "before the records are cut", "training.run:open_reporter", phase="resume"),
    _point("resume", "metrics.jsonl not replaced by its cut copy", "pathlib:Path.replace",
           only="metrics.jsonl.unfinished", in_main=True, phase="resume"),
    _point("resume", "records cut, nothing trained", f"{_TRAINER}.restore", phase="resume"),
    _point("resume", "before the first step", f"{_TRAINER}.run", phase="resume"),
    _point("end", "before the last checkpoint is published", f"{_SAVING}run_checkpoints:RunCheckpoints.finish",
           phase="end"),
    _point("end", "before the final export", f"{_TRAINER}.export", phase="end"),
    _point("end", "in the final export", "training.trainer:export_checkpoint", "inside", seconds=0.3, phase="end"),
    Point("any time", "after a random time", moment="time", phase="any"),
)  # fmt: skip

WEIGHTS = {
    "step": 3.0,
    "saving": 3.0,
    "publishing": 3.0,
    "records": 2.0,
    "rollout": 3.0,
    "validation": 1.5,
    "resume": 3.0,
    "end": 5.0,
    "any time": 2.0,
}
"""How often each kind is drawn, where a run has it; ends only behind nine tenths of the run."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL in one launch.

    Attributes:
        rank: comes to the point.
        is_everyone: all processes of the launch are killed with it; else the launcher ends the others.
        target: the step that the run is to come to, from 1.
        call: the number of the call that counts, from 1.
        share: of the function's duration, or of what it writes, before the kill; for "time" of the launch's.
    """

    point: Point
    rank: int
    is_everyone: bool
    target: int
    call: int
    share: float

    @property
    def step(self) -> int:
        """The first step in which the point counts; 0 for points outside of steps."""
        return self.target if self.point.phase == "steps" else 0

    def describe(self) -> str:
        victims = "all ranks" if self.is_everyone else f"rank {self.rank}"
        when = f", step {self.step} or later" if self.step else ""
        return f"{self.point.kind}: {self.point.name}{when} ({victims})"


def find(name: str) -> Point:
    """Return the only point of this name, or of this kind and name with a colon between."""
    found = [point for point in POINTS if name in (point.name, f"{point.kind}: {point.name}")]
    if len(found) != 1:
        raise KeyError(f"{name!r}: {len(found)} points have this name")
    return found[0]


def draw(generator: random.Random, count: int, *, steps: int, processes: int, has: Collection[str]) -> list[Kill]:
    """Choose `count` kills of one run, in rising order of their steps. Kinds that it has already become less likely.

    Args:
        steps: of the run.
        has: what the run does; see `Point.needs`.
    """
    kills: list[Kill] = []
    for target in sorted(generator.randint(1, steps) for _ in range(count)):
        usable = [point for point in POINTS if not point.needs or point.needs in has]
        # A run needs a checkpoint to go on from, and an end is the last that can be killed.
        usable = [point for point in usable if point.phase != "resume" or target > steps / 4]
        usable = [point for point in usable if point.phase != "end" or target > 0.9 * steps]
        point = _weighted(generator, usable, Counter(kill.point.kind for kill in kills))
        rank = 0 if point.in_main else generator.randrange(processes)
        call = generator.randint(1, point.most_calls)
        kills.append(Kill(point, rank, generator.random() < 0.5, target, call, generator.random()))
    return kills


def _weighted(generator: random.Random, points: list[Point], drawn: Counter[str]) -> Point:
    kinds = sorted({point.kind for point in points})
    (kind,) = generator.choices(kinds, [WEIGHTS[kind] / (1 + 2 * drawn[kind]) for kind in kinds])
    return generator.choice([point for point in points if point.kind == kind])
