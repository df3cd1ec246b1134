"""A run's curves as one picture, from its metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from megatron_gkd.errors import UserError

_PANELS = {  # record key -> title
    "loss": "Loss per response token",
    "divergence": "Divergence from the teacher",
    "top1_agreement": "Top-1 agreement with the teacher",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens per second",
}
_COLUMNS = 3


def read_metrics(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the records of training steps and those of validations from a metrics.jsonl."""
    with Path(path).open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    validation = [record for record in records if record.get("split") == "validation"]
    return [record for record in records if record.get("split") != "validation"], validation


def plot_curves(metrics_path: str | Path, png_path: str | Path) -> Path:
    """Draw loss, divergence, agreement, gradient norm, learning rate and tokens per second over the steps.

    Training is a line, validation a line with dots; what is not recorded is left out.

    Raises:
        UserError: nothing is recorded.
    """
    splits = dict(zip(("training", "validation"), read_metrics(metrics_path), strict=True))
    panels = [key for key in _PANELS if any(_points(records, key)[0] for records in splits.values())]
    if not panels:
        raise UserError(f"{metrics_path}: has no numbers to draw")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for number, key in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw(axes, key, splits)
    figure.savefig(png_path)
    return Path(png_path)


def _draw(axes: Any, key: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    styles: dict[str, dict[str, Any]] = {
        "training": {"color": "#4878a8", "linewidth": 1.2},
        "validation": {"color": "#d1701f", "marker": "o"},
    }
    drawn = []
    for split, records in splits.items():
        steps, values = _points(records, key)
        if steps:
            axes.plot(steps, values, label=split, markersize=4, **styles[split])
            drawn.append(split)
    axes.set_title(_PANELS[key], fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False)


def _points(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps at which `key` is recorded, and its values."""
    kept = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in kept], [value for _, value in kept]
