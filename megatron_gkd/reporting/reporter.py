"""All that a training run reports: metrics, completions, progress, and the curves at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_gkd.config.schema import OutputSection
from megatron_gkd.reporting.completions_log import CompletionsLog, console_table, markdown_table
from megatron_gkd.reporting.curves import plot_curves
from megatron_gkd.reporting.logging import LOGGER
from megatron_gkd.reporting.metrics_log import MetricsLog
from megatron_gkd.reporting.progress import Progress
from megatron_gkd.reporting.start_report import StartReport
from megatron_gkd.runtime import portability


class Reporter:
    """Show nothing and write no records: the reporter of every rank other than the main one. A context manager."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, report: StartReport) -> None:
        """Show what the run starts with."""

    def step(self, record: dict[str, Any]) -> None:
        """Record a training step and show its progress."""

    def validation(self, record: dict[str, Any]) -> None:
        """Record a validation."""
        shown = ", ".join(f"{name} {record[name]:.4f}" for name in ("loss", "divergence") if record[name] is not None)
        LOGGER.info(f"step {record['step']}: validation {shown}")

    def completions(self, records: Sequence[dict[str, Any]]) -> None:
        """Record the completions of one step; show some of them."""

    def end(self, lines: Sequence[str]) -> None:
        """Show where the results of the finished run are, with its curves."""

    def plot(self) -> None:
        """Draw the curves of the run as one PNG, in its output folder."""


class MainReporter(Reporter):
    """Write metrics.jsonl, TensorBoard events and completions.jsonl, and show progress on the console.

    Args:
        output: the recipe's section.
        train_iters: steps of the whole run.
        last_step: the newest step of a run that is resumed; None for a new run.
    """

    def __init__(self, output: OutputSection, train_iters: int, last_step: int | None = None) -> None:
        self._output, self._folder = output, Path(output.output_dir)
        self._metrics = MetricsLog(self._folder, tensorboard=output.tensorboard, last_step=last_step)
        self._completions = CompletionsLog(self._folder, last_step) if output.log_completions else None
        self._progress = Progress(train_iters, enabled=True, log_interval=output.log_interval)

    def __enter__(self) -> Reporter:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        self._metrics.close()
        if self._completions is not None:
            self._completions.close()

    def start(self, report: StartReport) -> None:
        """Show what the run starts with."""
        self._progress.show_lines(report.lines())

    def step(self, record: dict[str, Any]) -> None:
        """Write a training step's record, with its rate and memory, and show its progress."""
        record = {
            **record,
            "tokens_per_second": record["num_tokens"] / record["step_time_s"],
            "peak_memory_bytes": portability.peak_memory_bytes(),
        }
        self._metrics.write(record)
        self._progress.update(record["step"], record)

    def validation(self, record: dict[str, Any]) -> None:
        """Write a validation's record and log its loss."""
        self._metrics.write({"split": "validation", **record})
        super().validation(record)

    def completions(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the completions of one step; show the first ones on the console and in TensorBoard."""
        if self._completions is None or not records:
            return
        self._completions.write(records)
        shown = records[: self._output.completions_to_print]
        if shown:
            self._metrics.write_text("completions", markdown_table(shown), shown[0]["step"])
            self._progress.show(console_table(shown))

    def end(self, lines: Sequence[str]) -> None:
        """Show where the results of the finished run are, with its curves."""
        curves = self._draw()
        self._progress.message("\n".join([*lines, f"metrics    {self._metrics.path}", f"curves     {curves}"]))

    def plot(self) -> None:
        """Draw the curves of the run as one PNG, in its output folder."""
        self._draw()

    def _draw(self) -> Path:
        return plot_curves(self._metrics.path, self._folder / "curves.png")


def open_reporter(output: OutputSection, train_iters: int, *, is_main: bool, last_step: int | None = None) -> Reporter:
    """Return the reporter of this rank; see `MainReporter` for the arguments."""
    return MainReporter(output, train_iters, last_step) if is_main else Reporter()
