"""Tables of text: with lines on a terminal, plain columns elsewhere, Markdown in documents."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from megatron_gkd.reporting.start_report import Line, format_lines


@dataclass(frozen=True)
class Table:
    """Rows under a heading; all columns but the first hold numbers.

    Attributes:
        title: the heading.
        columns: their names.
        rows: as many texts as there are columns, each.
        text_columns: how many of the first columns hold text.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1

    def plain(self) -> str:
        """Return the table in aligned columns."""
        widths = [max(len(row[index]) for row in (self.columns, *self.rows)) for index in range(len(self.columns))]
        lines = [self.title]
        for row in (self.columns, *self.rows):
            cells = [
                f"{cell:<{width}}" if index < self.text_columns else f"{cell:>{width}}"
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(("  " + "  ".join(cells)).rstrip())
        return "\n".join(lines)

    def rich(self) -> RichTable:
        """Return the table with lines."""
        table = RichTable(title=escape(self.title), title_justify="left", title_style="bold")
        for index, name in enumerate(self.columns):
            table.add_column(escape(name), justify="left" if index < self.text_columns else "right")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """Return the table as Markdown, without its title."""
        marks = ["---" if index < self.text_columns else "---:" for index in range(len(self.columns))]
        return "".join(f"| {' | '.join(row)} |\n" for row in (self.columns, marks, *self.rows))


@dataclass(frozen=True)
class Lines:
    """Pairs of a name and a text, under a heading that may be empty."""

    title: str
    lines: tuple[Line, ...]

    def plain(self) -> str:
        """Return the lines, the names in a column of their own."""
        text = format_lines(self.lines)
        return f"{self.title}\n{text}" if self.title else text


@dataclass(frozen=True)
class Paragraph:
    """Sentences, or commands, one a line, under a heading that may be empty."""

    title: str
    sentences: tuple[str, ...]

    def plain(self) -> str:
        """Return the heading and the indented lines."""
        if not self.title:
            return "\n".join(self.sentences)
        return "\n".join([self.title, *(f"  {one}" for one in self.sentences)])


Block = Table | Lines | Paragraph


def print_blocks(blocks: Sequence[Block]) -> None:
    """Print blocks to stdout: drawn on a terminal, plain text elsewhere."""
    if not sys.stdout.isatty():
        print("\n\n".join(block.plain() for block in blocks), flush=True)
        return
    console = Console(file=sys.stdout)
    for index, block in enumerate(blocks):
        if index:
            console.print()
        if isinstance(block, Table):
            console.print(block.rich())
        else:
            console.print(block.plain(), markup=False, highlight=False, soft_wrap=True)
