"""The report at the start of a run, in a few aligned lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_gkd.reporting.numbers import format_count

Line = tuple[str, str]  # a name and its text; the name is empty where the line continues the one above

_NO_TEACHER: Line = ("teacher", "none: cross-entropy on the rows")


@dataclass(frozen=True)
class ModelLine:
    """A model of the run.

    Attributes:
        role: `student`, `teacher`, or the recipe's key of one of several teachers.
        name: the model's name in the recipe.
        architecture: its model_type; None for a model that is not loaded here.
        parameters: number of all parameters in its checkpoint; None for a model that is not loaded here.
        trainable: number of trained parameters; None for a teacher.
        location: where a teacher is: `in device memory`.
    """

    role: str
    name: str
    architecture: str | None = None
    parameters: int | None = None
    trainable: int | None = None
    location: str = ""

    def text(self) -> str:
        """Return the line without the role."""
        known = [self.architecture] if self.architecture else []
        if self.parameters is not None:
            known.append(f"{format_count(self.parameters)} parameters")
        if self.trainable is not None:
            count = "all" if self.trainable == self.parameters else format_count(self.trainable)
            known.append(f"{count} trainable")
        if self.location:
            known.append(self.location)
        return ": ".join(part for part in (self.name, ", ".join(known)) if part)


@dataclass(frozen=True)
class RowsLine:
    """The rows of a split.

    Attributes:
        split: `training` or `validation`.
        summary: number of rows used, and of those left out for each reason.
        tokens: number of tokens in the used rows, prompts included; None where that is not known.
        forms: how many rows of each source are written in which form.
        example: a row as the model reads it.
        remark: what is unusual in the rows, for a warning.
    """

    split: str
    summary: str
    tokens: int | None
    forms: Sequence[str] = ()
    example: Sequence[str] = ()
    remark: str | None = None

    def text(self) -> str:
        """Return the line."""
        tokens = "" if self.tokens is None else f"{format_count(self.tokens)} tokens; "
        return f"{self.split}: {tokens}{self.summary}"


@dataclass(frozen=True)
class StartReport:
    """The facts about a run before its first step.

    Attributes:
        versions: versions of this package and of those that decide what it computes, by package.
        device: name of the main rank's device.
        processes: ranks of the world.
        nodes: number of machines; None where the launcher does not provide it.
        layout: how processes and rows are divided (`config.layout`), by name.
        precision: types of weights, gradients and optimizer state.
        kernels: implementation of the divergence.
        attention: implementation of the attention.
        fusions: Megatron-Core's fused kernels, and the implementation of Adam.
        student: the model that is trained.
        teachers: in the recipe's order; empty for plain cross-entropy.
        rollouts: how the student samples; None where it does not sample.
        completions: their lengths, and what ends them; None where there are none.
        rows: the splits that are read.
        train_iters: steps of the whole run.
        epochs: passes over the training rows in as many steps; None where that is not known.
        first_step: the next step.
        origin: origin of the weights where that is not the student's model: `resumed from PATH`.
        checkpoints: their interval and folder; None where there are none.
        output_dir: folder of all other files.
    """

    versions: Mapping[str, str]
    device: str
    processes: int
    nodes: int | None
    layout: Mapping[str, str]
    precision: str
    kernels: str
    attention: str
    student: ModelLine
    teachers: Sequence[ModelLine]
    rows: Sequence[RowsLine]
    train_iters: int
    epochs: float | None
    output_dir: str
    fusions: str = ""
    first_step: int = 1
    origin: str | None = None
    rollouts: str | None = None
    completions: str | None = None
    checkpoints: str | None = None

    def lines(self) -> list[Line]:
        """Return the report, a pair of name and text for each line."""
        (package, version), *others = self.versions.items()
        return [
            (package, f"{version} ({', '.join(' '.join(other) for other in others)})"),
            ("device", f"{self.device}, {self._processes()}"),
            *self.layout.items(),
            ("precision", self.precision),
            ("kernels", self.kernels),
            ("attention", self.attention),
            *([("fusions", self.fusions)] if self.fusions else []),
            *((model.role, model.text()) for model in (self.student, *self.teachers)),
            *([] if self.teachers else [_NO_TEACHER]),
            *([("rollouts", self.rollouts)] if self.rollouts else []),
            *([("completions", self.completions)] if self.completions else []),
            *group_lines("rows", (rows.text() for rows in self.rows)),
            *group_lines("forms", (form for rows in self.rows for form in rows.forms)),
            *group_lines("first row", (line for rows in self.rows for line in rows.example)),
            ("steps", self._steps()),
            ("checkpoints", self.checkpoints or "none (output.save_interval = null)"),
            ("output", self.output_dir),
        ]

    def _processes(self) -> str:
        nodes = "" if self.nodes is None else f" on {_plural(self.nodes, 'node')}"
        return _plural(self.processes, "process") + nodes

    def _steps(self) -> str:
        first = f"starting at step {self.first_step}" if self.first_step <= self.train_iters else "all of them done"
        origin = f", {self.origin}" if self.origin else ""
        epochs = "" if self.epochs is None else f" ({self.epochs:.3g} epochs)"
        return f"{self.train_iters}{epochs}, {first}{origin}"


def format_lines(lines: Sequence[Line]) -> str:
    """Return the lines as text, the names in a column of their own."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in lines)


def group_lines(name: str, texts: Iterable[str]) -> list[Line]:
    """Return a line for each text, the first with the name."""
    return [("" if index else name, text) for index, text in enumerate(texts)]


def _plural(count: int, noun: str) -> str:
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"
