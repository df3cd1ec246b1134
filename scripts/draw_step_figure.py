"""Draw the figure of one training step, docs/images/step.svg: python scripts/draw_step_figure.py.

The colors are readable on light and on dark pages; the background is transparent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FIGURE = Path(__file__).resolve().parents[1] / "docs/images/step.svg"
WIDTH, HEIGHT = 992, 344
LINE, TEXT = "#7d8590", "#7d8590"
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" \
font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" role="img">
<title>One training step: data, rollout, teacher, student, vocab-parallel loss, update</title>
<defs>
<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="{line}"/>
</marker>
</defs>
"""


@dataclass(frozen=True)
class Box:
    """A part of the step.

    Attributes:
        title: the part's name.
        lines: what it does.
        folder: its folder in the package.
        color: the fill.
        x: left edge.
        y: upper edge.
        width: in pixels, as all lengths.
        height: in pixels.
    """

    title: str
    lines: Sequence[str]
    folder: str
    color: str
    x: int
    y: int
    width: int = 150
    height: int = 92

    @property
    def middle(self) -> int:
        return self.y + self.height // 2

    @property
    def right(self) -> int:
        return self.x + self.width

    def svg(self) -> str:
        center = self.x + self.width // 2
        parts = [
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="9" fill="{self.color}"/>',
            f'<text x="{center}" y="{self.y + 26}" font-size="16" font-weight="600" fill="#ffffff" '
            f'text-anchor="middle">{self.title}</text>',
        ]
        for index, line in enumerate(self.lines):
            parts.append(
                f'<text x="{center}" y="{self.y + 48 + 18 * index}" font-size="12.5" fill="#ffffff" '
                f'text-anchor="middle">{line}</text>'
            )
        parts.append(
            f'<text x="{center}" y="{self.y + self.height + 18}" font-size="12" fill="{TEXT}" text-anchor="middle" '
            f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">{self.folder}</text>'
        )
        return "\n".join(parts)


DATA = Box("data", ("rows → samples", "packed microbatches"), "data/", "#57606a", 16, 126)
ROLLOUT = Box("rollout", ("with probability λ the", "student samples"), "rollout/", "#8250df", 204, 126)
TEACHER = Box("teacher", ("forward only", "hidden states or top-k"), "teachers/", "#9a6700", 410, 36, 162)
STUDENT = Box("student", ("1F1B pipeline", "hidden states"), "models/", "#0969da", 410, 206, 162)
LOSS = Box("vocab-parallel loss", ("head and divergence,", "chunk by chunk"), "ops/", "#1a7f37", 616, 116, 190, 112)
UPDATE = Box("update", ("reduced gradient", "AdamW"), "training/", "#bc4c00", 842, 126, 134)
BOXES = (DATA, ROLLOUT, TEACHER, STUDENT, LOSS, UPDATE)


def arrow(points: Sequence[tuple[int, int]], dashed: bool = False) -> str:
    """Return a line through the points with a tip at its end."""
    path = "M" + " L".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.8"{dash} marker-end="url(#tip)"/>'


def label(x: int, y: int, text: str) -> str:
    """Return a text centered at x."""
    return f'<text x="{x}" y="{y}" font-size="12" fill="{TEXT}" text-anchor="middle">{text}</text>'


def shards() -> str:
    """Return the strips in the loss box: the vocabulary's shards, one for each tensor-parallel rank."""
    count, gap = 4, 3
    left, width = LOSS.x + 14, LOSS.width - 28
    each = (width - gap * (count - 1)) / count
    return "\n".join(
        f'<rect x="{left + index * (each + gap):.1f}" y="{LOSS.y + 78}" width="{each:.1f}" height="20" rx="3" '
        f'fill="#ffffff" fill-opacity="0.25"/>\n<text x="{left + index * (each + gap) + each / 2:.1f}" '
        f'y="{LOSS.y + 92}" font-size="11" fill="#ffffff" text-anchor="middle">V/TP</text>'
        for index in range(count)
    )


def draw() -> str:
    """Return the figure as SVG."""
    turn = ROLLOUT.right + 28
    below = HEIGHT - 12
    parts = [
        *(box.svg() for box in BOXES),
        shards(),
        arrow([(DATA.right, DATA.middle), (ROLLOUT.x, ROLLOUT.middle)]),
        arrow(
            [
                (ROLLOUT.right, ROLLOUT.middle),
                (turn, ROLLOUT.middle),
                (turn, TEACHER.middle),
                (TEACHER.x, TEACHER.middle),
            ]
        ),
        arrow([(turn, ROLLOUT.middle), (turn, STUDENT.middle), (STUDENT.x, STUDENT.middle)]),
        arrow([(TEACHER.right, TEACHER.middle), (LOSS.x + 60, TEACHER.middle), (LOSS.x + 60, LOSS.y)]),
        arrow([(STUDENT.right, STUDENT.middle), (LOSS.x + 60, STUDENT.middle), (LOSS.x + 60, LOSS.y + LOSS.height)]),
        arrow([(LOSS.right, LOSS.middle), (UPDATE.x, UPDATE.middle)]),
        arrow(
            [
                (UPDATE.x + UPDATE.width // 2, UPDATE.y + UPDATE.height + 26),
                (UPDATE.x + UPDATE.width // 2, below),
                (ROLLOUT.x + ROLLOUT.width // 2, below),
                (ROLLOUT.x + ROLLOUT.width // 2, ROLLOUT.y + ROLLOUT.height + 26),
            ],
            dashed=True,
        ),
        label(728, below - 8, "new weights"),
    ]
    return HEAD.format(width=WIDTH, height=HEIGHT, line=LINE) + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    FIGURE.write_text(draw(), encoding="utf-8")
