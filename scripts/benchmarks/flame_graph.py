"""Draw a flame graph, the root on top, as SVG text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape

Stack = tuple[str, ...]
WIDTH, HEIGHT, MARGIN, CHARACTER = 1200, 17, 10, 6.6
LEAST_SHARE = 0.0015  # of the whole; what is narrower is left out


@dataclass
class Frame:
    """A rectangle: its name, the value of itself and of all below it, and its children."""

    name: str
    own: float = 0.0
    children: dict[str, Frame] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.own + sum(child.total for child in self.children.values())

    @property
    def depth(self) -> int:
        return 1 + max((child.depth for child in self.children.values()), default=0)


def tree(values: Mapping[Stack, float]) -> Frame:
    """Return the root over all paths, which begin with one name."""
    root = Frame(next(iter(values))[0])
    for stack, value in values.items():
        frame = root
        for name in stack[1:]:
            frame = frame.children.setdefault(name, Frame(name))
        frame.own += value
    return root


def draw(values: Mapping[Stack, float], title: str, color: Callable[[Stack], str], legend: Mapping[str, str]) -> str:
    """Return the picture.

    Args:
        values: of each path by itself, in seconds.
        title: of the picture.
        color: of a path's rectangle.
        legend: color by meaning.
    """
    root = tree(values)
    rectangles = list(_rectangles(root, root.total, (root.name,), MARGIN, color))
    rows = 1 + max(row for row, _ in rectangles)
    top = 3 * HEIGHT
    height = top + rows * HEIGHT + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="monospace" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{MARGIN}" y="{HEIGHT}" font-size="13">{escape(title)}</text>',
        *_legend(legend),
        f'<g transform="translate(0 {top})">',
        *(text for _, text in rectangles),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend(legend: Mapping[str, str]) -> Iterator[str]:
    x = float(MARGIN)
    for meaning, color in legend.items():
        yield f'<rect x="{x:.0f}" y="{1.5 * HEIGHT:.0f}" width="11" height="11" fill="{color}"/>'
        yield f'<text x="{x + 15:.0f}" y="{1.5 * HEIGHT + 10:.0f}">{escape(meaning)}</text>'
        x += 15 + CHARACTER * len(meaning) + 20


def _rectangles(
    frame: Frame, whole: float, stack: Stack, x: float, color: Callable[[Stack], str]
) -> Iterator[tuple[int, str]]:
    """Yield the row and the SVG of a frame and of all below it, the widest first."""
    width = frame.total / whole * (WIDTH - 2 * MARGIN)
    row = len(stack) - 1
    label = f"{frame.name}: {frame.total * 1e3:.1f} ms, {frame.total / whole:.1%}"
    room = int((width - 6) / CHARACTER)
    shown = frame.name if len(frame.name) <= room else frame.name[: max(0, room - 1)] + "…"
    text = f'<text x="{x + 3:.1f}" y="{row * HEIGHT + 12}">{escape(shown)}</text>' if room >= 3 else ""
    yield (
        row,
        f'<g><title>{escape(label)}</title><rect x="{x:.1f}" y="{row * HEIGHT}" width="{max(0.2, width - 0.4):.1f}" '
        f'height="{HEIGHT - 1}" fill="{color(stack)}"/>{text}</g>',
    )
    for child in sorted(frame.children.values(), key=lambda one: -one.total):
        if child.total / whole >= LEAST_SHARE:
            yield from _rectangles(child, whole, (*stack, child.name), x, color)
        x += child.total / whole * (WIDTH - 2 * MARGIN)
