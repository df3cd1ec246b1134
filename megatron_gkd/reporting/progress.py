"""The progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from megatron_gkd.reporting.start_report import Line, format_lines

_FORMATS = {
    "loss": "loss {:.4f}",
    "divergence": "divergence {:.4f}",
    "sft_loss": "sft_loss {:.4f}",
    "top1_agreement": "top1_agreement {:.3f}",
    "grad_norm": "grad_norm {:.3g}",
    "lr": "lr {:.1e}",
    "tokens_per_second": "{:.0f} tok/s",
}
_ON_THE_BAR = ("loss", "tokens_per_second")
_LINE = 120  # characters of a table where there is no terminal


class Progress:
    """Show the progress over a number of optimizer steps, or of what `unit` names. A context manager.

    On a terminal (stderr, else stdout) it is a bar with the latest loss, rate and time left. Elsewhere it is a line on
    stdout each `log_interval` steps, and for the last one.

    Args:
        total: number of steps.
        enabled: false on ranks that show nothing.
        description: what is in progress.
        log_interval: steps between two lines.
        unit: what is counted, in the singular.
    """

    def __init__(
        self, total: int, enabled: bool, description: str = "training", log_interval: int = 1, unit: str = "step"
    ) -> None:
        self._unit = unit
        self._total, self._log_interval, self._description = total, log_interval, description
        self._enabled = enabled
        self._begin: tuple[float, int] | None = None
        self._bar: Bar | None = None
        terminal = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
        if enabled and terminal is not None:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[latest]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=Console(file=terminal),
                expand=True,
            )
            self._task = self._bar.add_task(description, total=total, latest="")

    def __enter__(self) -> Progress:
        self._begin = (time.monotonic(), 0)
        if self._bar is not None:
            self._bar.start()
        else:
            self.message(f"{self._description}: {self._total} {self._unit}s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Show that `step` is done. `record` is its line of metrics."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, latest=describe({k: record.get(k) for k in _ON_THE_BAR}))
        elif self._enabled and (step % self._log_interval == 0 or step == self._total):
            print(f"{self._unit} {step}/{self._total} {describe(record)} eta {self._eta(step)}", flush=True)
        if self._begin is None or self._begin[1] == 0:  # the first step, with its start-up, would spoil the estimate
            self._begin = (time.monotonic(), step)

    def message(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._enabled:
            print(text, flush=True)

    def show(self, table: Table) -> None:
        """Print a table, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(table)
        elif self._enabled:
            Console(file=sys.stdout, width=_LINE).print(table)

    def show_lines(self, lines: Sequence[Line]) -> None:
        """Print names and texts in two columns."""
        if self._bar is None:
            self.message(format_lines(lines))
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in lines:
            table.add_row(name, Text(text))
        self._bar.console.print(table)

    def _eta(self, step: int) -> str:
        """Return the time left as mm:ss or h:mm:ss, at the mean rate so far."""
        begin, done = self._begin or (time.monotonic(), 0)
        if step <= done:
            return "--:--"
        seconds = round((time.monotonic() - begin) / (step - done) * (self._total - step))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes:02}:{seconds % 60:02}"


def describe(record: Mapping[str, Any]) -> str:
    """Return the main numbers of a record on one line: `loss 1.2340 grad_norm 0.9 lr 1.0e-04 1234 tok/s`."""
    return " ".join(form.format(record[name]) for name, form in _FORMATS.items() if record.get(name) is not None)
