"""A run of ``loss.py`` as one picture: a panel for each case, a bar for each contestant."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import OURS
from benchmarks.report import copy_rate, headline, seconds

COLUMNS = 3
OURS_COLOR, PEER_COLOR, FLOOR_COLOR = "#d1701f", "#4878a8", "#555555"


def draw(run: dict, path: Path) -> None:
    """Bars are forward and backward on a logarithmic scale; the line is the time of a copy that moves as many bytes as
    streaming passes must."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [*run["divergence"], *run.get("head", [])]
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 2.4 * rows + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(headline(run), fontsize=11)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, case in zip(grid, panels, strict=False):
        _panel(axes, case)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path)


def _panel(axes, case: dict) -> None:
    times = {name: seconds(case, name) for name in case["contestants"]}
    shown = {name: 1e3 * value for name, value in times.items() if value is not None}
    names = list(shown)[::-1]  # the first on top
    colors = [OURS_COLOR if name == OURS else PEER_COLOR for name in names]
    bars = axes.barh(names, [shown[name] for name in names], color=colors)
    axes.bar_label(bars, fmt=" %.3g", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(shown.values()) / 3, max(shown.values()) * 3)
    if "total_bytes" in case:
        axes.axvline(1e3 * case["total_bytes"] / copy_rate(case), color=FLOOR_COLOR, linestyle="--", linewidth=1)
    axes.set_title(case["case"], fontsize=9)
    axes.set_xlabel("ms, forward and backward", fontsize=8)
    axes.tick_params(labelsize=8)
