"""A run of ``loss.py`` as one picture: a panel for each case, a bar for each contestant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import OURS
from benchmarks.report import copy_rate, headline, milliseconds, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
OURS_COLOR, PEER_COLOR, FLOOR_COLOR = "#d1701f", "#4878a8", "#555555"


def draw(run: dict, path: Path) -> None:
    """Draw the times of forward and backward as bars.

    The line is the time of a copy which moves as many bytes as streaming passes must.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [*run["divergence"], *run.get("head", [])]
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 2.4 * rows + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(headline(run), fontsize=11)
    grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, case in zip(grid, panels, strict=False):
        _panel(axes, case)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path)


def _panel(axes: Axes, case: dict) -> None:
    times = {name: seconds(case, name) for name in case["contestants"]}
    shown = {name: 1e3 * value for name, value in times.items() if value is not None}
    names = list(shown)[::-1]  # the first on top
    colors = [OURS_COLOR if name == OURS else PEER_COLOR for name in names]
    bars = axes.barh(names, [shown[name] for name in names], color=colors)
    axes.bar_label(bars, labels=[milliseconds(times[name]) for name in names], padding=3, fontsize=8)
    axes.set_xlim(0, 1.15 * max(shown.values()))
    if "total_bytes" in case:
        floor = 1e3 * case["total_bytes"] / copy_rate(case)
        axes.axvline(floor, color=FLOOR_COLOR, linestyle="--", linewidth=1, label=f"copy of as many bytes: {floor:.3g}")
        axes.legend(fontsize=7, loc="upper right")
    axes.set_title(case["case"], fontsize=9)
    axes.set_xlabel("ms, forward and backward", fontsize=8)
    axes.tick_params(labelsize=8)
