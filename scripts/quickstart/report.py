"""Show the results of an experiment as tables and as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from megatron_gkd.reporting.curves import read_metrics
from quickstart.evaluate import Scores

TEACHER_COLOR = "#555555"


def results_table(results: Mapping[str, Sequence[Scores]], problems: int) -> Table:
    """Return a table with one row for each model; `results` has a model's scores over the seeds."""
    seeds = max(len(scores) for scores in results.values())
    table = Table(
        title=f"{problems} test problems" + (f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else "")
    )
    for name, justify in (("model", "left"), ("right answers", "right"), ("divergence to the teacher", "right")):
        table.add_column(name, justify=justify)
    for model, scores in results.items():
        table.add_row(model, *_cells(scores))
    return table


def markdown_table(results: Mapping[str, Sequence[Scores]]) -> str:
    lines = ["| model | right answers | divergence to the teacher |", "|---|---:|---:|"]
    lines += [f"| {model} | {' | '.join(_cells(scores))} |" for model, scores in results.items()]
    return "\n".join(lines) + "\n"


def _cells(scores: Sequence[Scores]) -> tuple[str, str]:
    accuracies = [100 * score.accuracy for score in scores]
    return _mean_and_spread(accuracies, "{:.1f}") + " %", _mean_and_spread([s.divergence for s in scores], "{:.4f}")


def _mean_and_spread(values: Sequence[float], form: str) -> str:
    spread = " ± " + form.format(stdev(values)) if len(values) > 1 else ""
    return form.format(mean(values)) + spread


def draw(
    runs: Mapping[str, Path], results: Mapping[str, Sequence[Scores]], colors: Mapping[str, str], path: Path
) -> None:
    """Draw the cross-entropy of each run over its steps, and the results on the test split as bars.

    Every run logs its cross-entropy, whatever it minimizes, in the steps that have rows of the dataset. `colors` has
    every model but the teacher.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    training, validation, accuracy, divergence = figure.subplots(2, 2).flat
    colors = {"teacher": TEACHER_COLOR, **colors}
    for name, run in runs.items():
        for axes, records in zip((training, validation), read_metrics(run / "metrics.jsonl"), strict=True):
            points = [(record["step"], record["sft_loss"]) for record in records if record["sft_loss"] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, color=colors[name], linewidth=1)
    for axes, split in ((training, "Training"), (validation, "Validation")):
        axes.set(title=f"{split} cross-entropy", xlabel="step", ylabel="nats a response token", ylim=(0, 1.2))
        axes.legend(frameon=False)
    _bars(
        accuracy,
        "Right answers, test split (%)",
        {k: [100 * s.accuracy for s in v] for k, v in results.items()},
        colors,
    )
    distances = {k: [s.divergence for s in v] for k, v in results.items()}
    _bars(divergence, "Divergence to the teacher, test split (nats a response token)", distances, colors, "%.4f")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="y")
    figure.savefig(path)


def _bars(
    axes: Any, title: str, values: Mapping[str, Sequence[float]], colors: Mapping[str, str], form: str = "%.1f"
) -> None:
    bars = axes.bar(list(values), [mean(v) for v in values.values()], color=[colors[name] for name in values])
    axes.bar_label(bars, fmt=form, padding=2)
    axes.margins(y=0.12)
    axes.set(title=title)
    if len(values) > 3:
        axes.set_xticks(range(len(values)), list(values), rotation=25, ha="right")
